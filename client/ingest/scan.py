"""A hospital's folders to records: what every file is, read once and kept.

In: the folders of a Site. Out, for each file: the CT images in it, a mask, or the reason why it is left out. Records of
files that have not changed are taken from the last ingest (client/ingest/records.py), so that a walk of the folders is all that
they cost. Records hold keyed hashes only. Stays in the hospital.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from client.dicom.elements import read_dicom
from client.dicom.faults import DicomError, Fault, Kind
from client.dicom.headers import CtSlice, images_of
from client.dicom.pseudonyms import Pseudonyms
from client.ingest.workers import ENDED_ITS_READER, WorkerPool
from client.masks.match import MaskFile, dicom_mask, is_mask, is_picture, other_format, picture_mask
from shared.site import Site

READER_VERSION = 3  # of what is read from a file; records of another version are read again
_CHUNK = 64  # files per job
_AMONG_IMAGES = {
    True: "a mask among the images; name its folder as data.masks in site.yaml",
    False: "a PNG or NIfTI among the images: of a mask, name the folder as data.masks in site.yaml; a CT image, export it as DICOM",
}


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of the hospital's folders, not yet read.

    Attributes:
      path: where it is.
      code: keyed hash of its path below its folder; what messages call it.
      place: "images" or "masks".
      stamp: its size and time of change; what tells whether it is the same.
      refused: why it is not opened; "" if it is.
      kind: of the fault, if it is not opened.
    """

    path: Path
    code: str
    place: str
    stamp: str
    refused: str = ""
    kind: Kind = Kind.UNUSABLE


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Content of a file; exactly one of the three is set.

    Attributes:
      images: its CT images.
      mask: the mask in it.
      fault: why it is left out.
      kind: of the fault.
    """

    images: tuple[CtSlice, ...] = ()
    mask: MaskFile | None = None
    fault: str = ""
    kind: Kind = Kind.UNUSABLE


@dataclass(frozen=True)
class Scan:
    """Content of a hospital's folders.

    Attributes:
      files: every file, with its record.
      images: all CT images, one per SOP instance and frame.
      masks: all mask files.
      faults: files left out.
    """

    files: list[tuple[FoundFile, FileRecord]]
    images: list[CtSlice]
    masks: list[MaskFile]
    faults: list[Fault]


def walk(site: Site, pseudonyms: Pseudonyms) -> list[FoundFile]:
    """Every file of a hospital's images and masks, in order of its path.

    A masks folder inside the images folder, the same one, or around it is walked once. Links, hidden files, special
    files, and files and folders that may not be opened are in the list, refused: nothing is passed over silently but the
    label table and what ingest itself wrote.
    """
    own = {str(site.state), str(site.labels), *(f"{site.cache}{suffix}" for suffix in ("", ".partial", ".old"))}
    found = list(_walk(site.images, "images", pseudonyms, own))
    if site.masks is not None and not site.masks.is_relative_to(site.images):
        found += _walk(site.masks, "masks", pseudonyms, own | {str(site.images)})
    return found


def _walk(root: Path, place: str, pseudonyms: Pseudonyms, own: set[str]) -> Iterator[FoundFile]:
    """One folder and those below it, depth first, without the site's own."""

    def entry(path: str, stamp: str, refused: str = "", kind: Kind = Kind.UNUSABLE) -> FoundFile:
        name = os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace")  # names may be in Latin-1
        return FoundFile(Path(path), pseudonyms.of("file", f"{place}/{name}"), place, stamp, refused, kind)

    folders = [str(root)]
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            yield entry(folder, "", f"a folder that cannot be opened ({error.strerror})", _kind_of(error))
            continue
        inner = []
        for one in entries:
            if one.path in own:
                continue
            try:
                refused, kind = _refusal(one)
                if not refused and one.is_dir():
                    inner.append(one.path)
                    continue
                stamp = "" if refused else f"{one.stat().st_size} {one.stat().st_mtime_ns}"
            except OSError as error:  # gone since its folder was listed, or in a folder that may only be listed
                refused, kind, stamp = f"cannot be opened ({error.strerror})", _kind_of(error), ""
            yield entry(one.path, stamp, refused, kind)
        folders += reversed(inner)


def _refusal(one: os.DirEntry) -> tuple[str, Kind]:
    """Return why an entry of a folder is not opened, "" if it is, and the kind of fault."""
    if one.is_symlink():
        return "a symbolic link, expected a file; it may lead out of the folder", Kind.UNUSABLE
    if one.name.startswith("."):
        return "a hidden file or folder", Kind.NO_HEAD_CT
    if one.is_dir():
        return "", Kind.UNUSABLE
    if not one.is_file():
        return "neither a file nor a folder", Kind.UNUSABLE
    one.stat()
    # Part of the walk, so that permission given later is noticed: it changes neither size nor time.
    if os.access(one.path, os.R_OK):
        return "", Kind.UNUSABLE
    return "cannot be opened (Permission denied)", Kind.DENIED


def _kind_of(error: OSError) -> Kind:
    """Return the kind of fault of a file that the system does not open."""
    return Kind.DENIED if isinstance(error, PermissionError) else Kind.UNUSABLE


def denied_text(faults: Iterable[Fault]) -> str:
    """Return the error for files and folders that this user may not open; empty if there are none."""
    which = [fault.what for fault in faults if fault.kind is Kind.DENIED]
    if not which:
        return ""
    return (
        f"{len(which)} files or folders cannot be opened (Permission denied; first, {which[0]}), so their patients are missing: give "
        "the user who runs this the right to read them; 'hemafed-client find' tells which they are"
    )


def manifest_of(files: Iterable[FoundFile]) -> str:
    """Hash of what a walk found: which files, their sizes and times."""
    digest = hashlib.sha256()
    for one in files:
        digest.update(f"{one.place} {one.code} {one.stamp} {one.refused}\n".encode())
    return digest.hexdigest()


def scan(
    site: Site,
    pseudonyms: Pseudonyms,
    files: list[FoundFile],
    known: Mapping[str, tuple[str, FileRecord]],
    crew: WorkerPool,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[list[tuple[FoundFile, FileRecord]]], None] = lambda pairs: None,
) -> Scan:
    """Find out what every file is, and take each image once.

    Args as read_records takes them.
    """
    pairs = read_records(site, pseudonyms, files, known, crew, progress, keep)
    return _sort_out(pairs, mixed=site.masks is None or site.masks.is_relative_to(site.images), masks=site.masks)


def read_records(
    site: Site,
    pseudonyms: Pseudonyms,
    files: list[FoundFile],
    known: Mapping[str, tuple[str, FileRecord]],
    crew: WorkerPool,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[list[tuple[FoundFile, FileRecord]]], None] = lambda pairs: None,
    nameless: bool = False,
) -> list[tuple[FoundFile, FileRecord]]:
    """Every file with its record.

    Args:
      site: whose folders were walked.
      pseudonyms: the hospital's.
      files: from walk.
      known: code -> stamp and record of the last ingest.
      crew: processes that read.
      progress: called with files read and files to read.
      keep: given the new records as they come, for an ingest that may be stopped.
      nameless: whether images pass that do not say whose they are.
    """
    reading = _Reading(pseudonyms, site.accept_lossy, nameless)
    fresh = [f for f in files if not f.refused and known.get(f.code, ("",))[0] != f.stamp]
    chunks = [(fresh[i : i + _CHUNK], reading) for i in range(0, len(fresh), _CHUNK)]
    records: dict[str, FileRecord] = {}
    for (chunk, _), result in crew.run(_scan_chunk, chunks):
        read = result if isinstance(result, list) else _one_by_one(crew, chunk, reading)
        records.update({f.code: record for f, record in zip(chunk, read, strict=True)})
        keep(list(zip(chunk, read, strict=True)))
        progress(len(records), len(fresh))
    pairs = []
    for f in files:
        record = (
            FileRecord(fault=f.refused, kind=f.kind)
            if f.refused
            else records.get(f.code) or _placed(known[f.code][1], f.path)
        )
        pairs.append((f, record))
    return pairs


@dataclass(frozen=True)
class _Reading:
    """How files are read; goes to the workers."""

    pseudonyms: Pseudonyms
    accept_lossy: bool
    nameless: bool


def _scan_chunk(job: tuple[list[FoundFile], _Reading]) -> list[FileRecord]:
    """Records of some files; runs in a worker."""
    files, how = job
    return [scan_file(f, how.pseudonyms, how.accept_lossy, how.nameless) for f in files]


def _one_by_one(crew: WorkerPool, chunk: list[FoundFile], reading: _Reading) -> list[FileRecord]:
    """Records of files one of which ended its reader."""
    jobs = [([f], reading) for f in chunk]
    results = [result for _, result in crew.run(_scan_chunk, jobs)]
    return [r[0] if isinstance(r, list) else FileRecord(fault=ENDED_ITS_READER) for r in results]


def scan_file(found: FoundFile, pseudonyms: Pseudonyms, accept_lossy: bool, nameless: bool = False) -> FileRecord:
    """Find out what one file is."""
    try:
        with open(found.path, "rb") as file:
            head = file.read(132)
        if not head:
            raise DicomError("an empty file")
        if is_picture(found.path, head):
            return FileRecord(mask=picture_mask(found.path, head, pseudonyms, found.code))
        if head[128:] != b"DICM" and other_format(found.path):
            raise DicomError(
                f"a {other_format(found.path)} file, which is not read; save the mask as DICOM SEG or NIfTI"
            )
        dicom = read_dicom(found.path)
        if is_mask(dicom) or found.place == "masks":
            return FileRecord(mask=dicom_mask(dicom, found.path, pseudonyms, found.code))
        return FileRecord(images=images_of(dicom, found.path, pseudonyms, accept_lossy, found.code, nameless))
    except DicomError as error:
        return FileRecord(fault=str(error), kind=error.kind)
    except OSError as error:
        return FileRecord(fault=f"cannot be opened ({error.strerror or type(error).__name__})", kind=_kind_of(error))
    except Exception:  # one bad file never stops a hospital's ingest
        return FileRecord(fault="damaged: its content cannot be read; export the file again")


def _sort_out(pairs: list[tuple[FoundFile, FileRecord]], mixed: bool, masks: Path | None) -> Scan:
    """Images, masks and faults of all records; an image that comes twice counts once, or not at all if the two differ."""
    faults, images, mask_files = [], [], []
    instances: dict[str, list[tuple[FoundFile, FileRecord]]] = defaultdict(list)
    for f, record in pairs:
        what = f"file {f.code}"
        if record.fault:
            faults.append(Fault(what, record.fault, record.kind))
        elif record.mask is None:
            instances[record.images[0].instance].append((f, record))
        elif f.place == "masks" or (mixed and masks is not None and f.path.is_relative_to(masks)):
            mask_files.append(record.mask)
        else:
            faults.append(Fault(what, _AMONG_IMAGES[record.mask.kind in ("seg", "rtstruct")], Kind.AMONG_IMAGES))
    for (first, record), *others in instances.values():
        if all(_same_content(first.path, f.path) for f, _ in others):
            images += record.images
            reason = f"the same image as file {first.code}, byte for byte; counted once"
            faults += [Fault(f"file {f.code}", reason, Kind.COPY) for f, _ in others]
        else:
            reason = f"one SOPInstanceUID on {len(others) + 1} files that differ: which is right is not known, none is taken; export them again"
            faults += [Fault(f"file {f.code}", reason) for f in (first, *(f for f, _ in others))]
    return Scan(pairs, images, mask_files, faults)


def _same_content(one: Path, other: Path) -> bool:
    """Whether two files are equal, byte for byte."""
    try:
        with open(one, "rb") as a, open(other, "rb") as b:
            return hashlib.file_digest(a, "sha256").digest() == hashlib.file_digest(b, "sha256").digest()
    except OSError:
        return False


def _placed(record: FileRecord, path: Path) -> FileRecord:
    """A kept record with the path of today's walk."""
    return FileRecord(
        tuple(replace(image, path=path) for image in record.images),
        replace(record.mask, path=path) if record.mask else None,
        record.fault,
    )
