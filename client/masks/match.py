"""Match masks to images, whatever file they come in.

A mask belongs to an image when its file refers to the image: DICOM SEG and RTSTRUCT by SOP instance UID, a SEG without
references by the places of its frames, PNG by a file name that is a UID, NIfTI by a file name that is the series' UID or by
an affine that fits one series alone. An image that the file lists and shows nothing on has an empty mask: somebody looked and
found nothing. Several files of one series add up, or none of them is taken.

Everything here stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import RTStructureSetStorage

from client.dicom.elements import DicomFile, class_name, text
from client.dicom.faults import DicomError, Fault, Kind
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries
from client.masks.drawn import EXPECTED, PIECES, Drawn, OtherSegment, Tally, unite
from client.masks.label_maps import fits, misfit, nifti_grid, read_nifti, read_png
from client.masks.rtstruct import contour_count, contour_references, read_contours
from client.masks.seg import PLACE_TOLERANCE_MM, SEG_CLASSES, read_seg, seg_head

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NIFTI_SUFFIXES = (".nii", ".nii.gz")
_OTHER_FORMATS = {".nrrd": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage", ".hdr": "Analyze", ".mgz": "FreeSurfer"}


@dataclass(frozen=True)
class MaskFile:
    """A mask file and what it speaks of.

    Attributes:
      path: the file.
      file: its keyed hash, for messages.
      kind: "seg", "rtstruct", "nifti" or "png".
      name: keyed hash of what the file name would mean as a UID: "series" of a NIfTI, "image" of a PNG; "" otherwise.
      instances: keyed hashes of the SOP instances that a SEG or RTSTRUCT refers to.
      sources: those of them that its frames or contours name.
      places: positions of a SEG's frames that names no image, in mm, x, y, z one after the other.
      space: keyed hash of a SEG's frame of reference; "" without.
      grid: shape (3) and affine (12, first three rows, patient's axes) of a NIfTI; () otherwise.
      pieces: how many frames, contours, layers or pictures are in it.
    """

    path: Path
    file: str
    kind: str
    name: str = ""
    instances: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    places: tuple[float, ...] = ()
    space: str = ""
    grid: tuple[float, ...] = ()
    pieces: int = 1


@dataclass(frozen=True)
class SeriesMasks:
    """The masks of one series.

    Attributes:
      masks: image name -> uint8 (Y, X) of 0 and 1, for every image that somebody looked at.
      pieces: per file, image name -> pieces taken.
      tallies: the account of every file.
      faults: what could not be used.
    """

    masks: dict[str, NDArray[np.uint8]] = field(repr=False)
    pieces: dict[str, Mapping[str, int]]
    tallies: tuple[Tally, ...]
    faults: tuple[Fault, ...]


def is_picture(path: Path, head: bytes) -> bool:
    """Whether a file can be a mask without being DICOM."""
    return head.startswith(PNG_MAGIC) or path.name.lower().endswith(NIFTI_SUFFIXES)


def other_format(path: Path) -> str:
    """The name of a format that masks are kept in and that is not read; "" otherwise."""
    return _OTHER_FORMATS.get(
        path.suffix.lower() if path.suffix.lower() != ".gz" else Path(path.stem).suffix.lower(), ""
    )


def picture_mask(path: Path, head: bytes, pseudonyms: Pseudonyms, code: str) -> MaskFile:
    """A PNG or NIfTI file as a mask.

    Raises:
      DicomError: a NIfTI whose header cannot be read.
    """
    if head.startswith(PNG_MAGIC):
        stem = path.name[: -len(".png")] if path.name.lower().endswith(".png") else path.name
        return MaskFile(path, code, "png", pseudonyms.of("image", stem))
    stem = path.name[: -len(".nii.gz" if path.name.lower().endswith(".gz") else ".nii")]
    grid = nifti_grid(path)
    return MaskFile(path, code, "nifti", pseudonyms.of("series", stem), grid=grid, pieces=int(grid[2]))


def is_mask(file: DicomFile) -> bool:
    """Whether a DICOM file is of a kind that holds masks."""
    return text(file.ds, "SOPClassUID") in (*SEG_CLASSES, RTStructureSetStorage)


def dicom_mask(file: DicomFile, path: Path, pseudonyms: Pseudonyms, code: str) -> MaskFile:
    """A SEG or RTSTRUCT as a mask.

    Raises:
      DicomError: another kind of object, or it does not say what it belongs to.
    """
    ds, sop_class = file.ds, text(file.ds, "SOPClassUID")
    if not is_mask(file):
        raise DicomError(
            f"{class_name(sop_class)}, expected Segmentation or RT Structure Set Storage, NIfTI or PNG; remove it from data.masks"
        )

    def hashed(uids: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({pseudonyms.of("image", uid) for uid in uids}))

    try:
        if sop_class == RTStructureSetStorage:
            listed, sources = contour_references(ds)
            return MaskFile(path, code, "rtstruct", "", hashed(listed), hashed(sources), pieces=contour_count(ds))
        head = seg_head(ds)
        space = pseudonyms.of("space", head.space) if head.space else ""
        pieces = len(ds.get("PerFrameFunctionalGroupsSequence") or [])
        return MaskFile(
            path, code, "seg", "", hashed(head.listed), hashed(head.sources), head.places, space, pieces=pieces
        )
    except DicomError:
        raise
    except Exception as error:  # a damaged sequence fails in many ways
        raise DicomError("its references are damaged and cannot be decoded; export the mask again") from error


def match_masks(files: Iterable[MaskFile], series: Sequence[CtSeries]) -> tuple[dict[str, list[MaskFile]], list[Fault]]:
    """Match mask files to series.

    Returns:
      Series name -> its mask files, all of one kind; and what belongs to none.
    """
    owner = {name: one.name for one in series for s in one.slices for name in (s.instance, *s.copies)}
    matched: dict[str, list[MaskFile]] = defaultdict(list)
    faults = []
    for mask in sorted(files, key=lambda m: m.file):
        names, reason = _series_of(mask, series, owner)
        if len(names) != 1:
            faults.append(Fault(f"file {mask.file}", reason))
        else:
            matched[names[0]].append(mask)
    for found in matched.values():
        kinds = sorted({mask.kind for mask in found})
        if len(kinds) > 1:
            reason = f"masks of one series in {' and '.join(kinds)}: which counts is not known, expected one kind; remove the others"
            faults += [Fault(f"file {mask.file}", reason) for mask in found]
            found.clear()
    return {name: found for name, found in matched.items() if found}, faults


def _series_of(mask: MaskFile, series: Sequence[CtSeries], owner: dict[str, str]) -> tuple[list[str], str]:
    """Names of the series that a mask can belong to, and what to say if they are not one."""
    if mask.kind == "png":
        names = [owner[mask.name]] if mask.name in owner else []
        return names, "named after no image in data.images; expected SOPInstanceUID.png"
    if mask.kind == "nifti":
        names = [one.name for one in series if one.name == mask.name]
        names = names or [one.name for one in series if fits(mask.grid, one)]
        return names, "" if len(names) == 1 else misfit(mask.grid, series)
    if mask.places:
        names = [one.name for one in series if _lies_on(mask, one)]
        return names, (
            f"names no image, and its frames lie on those of {len(names)} series, expected 1; export it with its references"
        )
    names = sorted({owner[name] for name in mask.sources if name in owner})
    names = names or sorted({owner[name] for name in mask.instances if name in owner})
    if names:
        return names, f"refers to images of {len(names)} series, expected 1; export a mask for each"
    return [], (
        f"refers to {len(mask.instances)} images, none of which is in data.images or could be used; is it of another export, or "
        "were images given new UIDs?"
    )


def _lies_on(mask: MaskFile, series: CtSeries) -> bool:
    """Whether a frame of a SEG that names no image lies on an image of a series, in the same frame of reference."""
    if mask.space and any(s.space not in ("", mask.space) for s in series.slices):
        return False
    places = np.reshape(mask.places, (-1, 3))
    slices = np.array([s.position_mm for s in series.slices])
    return bool((np.abs(places[:, None] - slices[None]).max(axis=2) < PLACE_TOLERANCE_MM).any())


def read_masks(
    files: Sequence[MaskFile],
    series: CtSeries,
    pseudonyms: Pseudonyms,
    segments: Sequence[str | int],
    begin: Callable[[], None] = lambda: None,
) -> SeriesMasks:
    """The hematoma on a series' images, of all its mask files.

    Args:
      files: those that match_masks gave to this series.
      series: the images; the masks come in their pixel grid.
      pseudonyms: the hospital's, to recognise images.
      segments: what is the hematoma: labels, codes as "SCT:35566002" or numbers; () where a file holds one thing only.
      begin: called before each file is read.
    Returns:
      Masks, accounts and faults. A file that cannot be used costs the others of its series, as a slice would have half a
      mask or an empty one; but a PNG costs its own image alone, and a file without the segment nothing.
    """
    drawn: dict[str, Drawn] = {}
    faults: dict[str, str] = {}
    broken: list[MaskFile] = []
    for file in files:
        begin()
        try:
            drawn[file.file] = _read(file, series, pseudonyms, segments)
        except DicomError as error:
            faults[file.file] = str(error)
            broken += [] if isinstance(error, OtherSegment) else [file]
    masks: dict[str, NDArray[np.uint8]] = {}
    try:
        faults |= _spoiled(files, broken, drawn, series)
        drawn = {file: one for file, one in drawn.items() if file not in faults}
        _check_one_segment(drawn.values(), segments)
        masks = unite(drawn.values(), {s.image: s.shape for s in series.slices})
    except DicomError as error:
        faults |= dict.fromkeys(drawn, str(error))
        drawn = {}
    tallies = tuple(
        drawn[file.file].tally(file.file, file.kind) if file.file in drawn else refused(file, faults[file.file])
        for file in files
    )
    remarks = [
        r
        for file, tally in zip(files, tallies, strict=True)
        if file.file in drawn
        for r in _remarks(file, tally, series)
    ]
    found = [Fault(f"file {file}", reason) for file, reason in faults.items()]
    return SeriesMasks(masks, {name: one.taken for name, one in drawn.items()}, tallies, (*found, *remarks))


def _spoiled(
    files: Sequence[MaskFile], broken: Sequence[MaskFile], drawn: Mapping[str, Drawn], series: CtSeries
) -> dict[str, str]:
    """Files, and why, that cannot be used because another one cannot: what both draw would be half a mask."""
    if not broken:
        return {}
    if {file.kind for file in files} != {"png"}:
        reason = "another mask file of its series cannot be used, and a mask would be half a mask; correct that one"
        return dict.fromkeys(drawn, reason)
    lost = {file.name for file in broken}
    images = {s.image for s in series.slices if lost & {s.instance, *s.copies}}
    reason = "another mask file of its image cannot be used; correct that one"
    return {file: reason for file, one in drawn.items() if images & one.looked}


def refused(file: MaskFile, reason: str) -> Tally:
    """The account of a file of which nothing is taken."""
    return Tally(file.file, PIECES[file.kind], file.pieces, 0, ((reason, file.pieces),) if file.pieces else ())


def _read(file: MaskFile, series: CtSeries, pseudonyms: Pseudonyms, segments: Sequence[str | int]) -> Drawn:
    """Read the masks that one file draws on a series.

    Raises:
      DicomError: the file is damaged, its segment is not named, or its grid or frame of reference is another.
    """
    try:
        if file.kind == "png":
            return read_png(file.path, file.name, series, segments)
        if file.kind == "nifti":
            return read_nifti(file.path, series, segments)
        return (read_seg if file.kind == "seg" else read_contours)(file.path, series, pseudonyms, segments)
    except DicomError:
        raise
    except OSError as error:
        raise DicomError(
            f"cannot be opened or read to its end ({error.strerror or 'cut'}); export the mask again"
        ) from error
    except Exception as error:  # readers raise many types for a damaged file
        raise DicomError("is damaged: its content is not what its header says; export the mask again") from error


def _check_one_segment(drawn: Iterable[Drawn], segments: Sequence[str | int]) -> None:
    """Refuse several files that hold different things of which site.yaml names none."""
    names = {name for one in drawn for name, masks in one.masks.items() if any(m.any() for m in masks.values())}
    if not segments and len(names) > 1:
        raise DicomError(
            f"the mask files of its series hold {len(names)} different segments: expected one, the hematoma; name those that are "
            "it in site.yaml, as data.segment: [Hematoma, ...]"
        )


def _remarks(file: MaskFile, tally: Tally, series: CtSeries) -> list[Fault]:
    """Return what of a used file was left out and is missed."""
    missed = [
        Fault(f"file {file.file}", f"{count} of its {tally.total} {tally.kind} left out: {reason}", Kind.IN_PART)
        for reason, count in tally.left
        if reason not in EXPECTED
    ]
    there = {name for s in series.slices for name in (s.instance, *s.copies)}
    absent = len(set(file.instances) - there) if not missed else 0
    reason = f"refers to {absent} images that are not in data.images or were left out, without drawing on them"
    return [*missed, Fault(f"file {file.file}", reason)] if absent else missed
