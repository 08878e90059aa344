"""A hospital's files to its slice cache.

In: a Site. Out: the cache of shared/slices and a report of what was taken and what was left out. An unchanged folder
costs a walk; a changed one, what changed; an ingest that was killed resumes. Patients and series are keyed
hashes from the moment a file is read. The split is decided once per patient and kept, so nobody moves to the test when
patients are added.

Nothing here leaves the hospital.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from client.dicom.faults import Fault, Kind, by_reason
from client.dicom.pseudonyms import Pseudonyms
from client.ingest.label_table import LabelError, table_digest
from client.ingest.labels import SPLIT_SHARES, splits_of
from client.ingest.records import append_records, read_records, write_records
from client.ingest.scan import READER_VERSION, FoundFile, denied_text, manifest_of, walk
from client.ingest.store import (
    HEAD,
    RECORDS,
    PartialCache,
    StoredSeries,
    read_journal,
    remove_leftovers,
    strangers,
    swap_in,
    whole_cache,
)
from client.ingest.survey import PART_VERSION, Progress, Survey, fingerprints, read_parts, survey
from client.ingest.workers import WorkerPool
from shared.errors import HemafedError
from shared.site import Site
from shared.slices import FORMAT_VERSION, read_cache


class IngestError(HemafedError, ValueError):
    """A hospital's data cannot become a cache; says what is wrong and the next step."""


@dataclass(frozen=True)
class IngestReport:
    """Result of an ingest; stays in the hospital.

    Attributes:
      slices, patients, series: counts in the cache.
      positives, unlabelled, masked: slices with the marker, without a label, with a mask.
      files: files in the folders.
      read: series whose pixels were read now; the others had not changed.
      faults: what was left out.
      unchanged: the cache was current and nothing was read.
    """

    slices: int
    patients: int
    series: int
    positives: int
    unlabelled: int
    masked: int
    files: int
    read: int
    faults: tuple[Fault, ...]
    unchanged: bool = False


def _silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


def ingest(site: Site, workers: int | None = None, progress: Progress = _silent) -> IngestReport:
    """Write a hospital's slice cache, unless it is current.

    Args:
      site: where the files are and where the cache goes.
      workers: processes; by default one per core.
      progress: called with "headers" or "series", how many are done, and how many there are.
    Returns:
      Counts and faults.
    Raises:
      IngestError: no usable slice, a label table that does not fit, a cache folder that holds something else, another
        ingest of this site at work, a full disk, or a folder that may not be written.
    """
    try:
        pseudonyms = Pseudonyms(site.key())  # makes the state folder
        with _alone(site):
            _check_cache(site)
            swap_in(site.cache)  # what a killed ingest had finished
            files = walk(site, pseudonyms)
            manifest = _manifest(site, pseudonyms, files)
            report = _current_report(site, manifest, len(files))
            if not report:
                with WorkerPool(workers) as crew:
                    report = _write(site, pseudonyms, files, manifest, crew, progress)
            remove_leftovers(site.cache)
            return report
    except LabelError as error:
        raise IngestError(f"site {site.name!r}: {error}") from error
    except OSError as error:
        raise IngestError(
            f"site {site.name!r}: stopped by the system ({error.strerror or type(error).__name__}); the cache is as it was: "
            "make room on the disk, or give permission to write cache and state, and start again; it resumes where it stopped"
        ) from error


def _write(
    site: Site, pseudonyms: Pseudonyms, files: list[FoundFile], manifest: str, crew: WorkerPool, progress: Progress
) -> IngestReport:
    """Read what is new, copy what is not, and put the new cache in place."""
    partial = PartialCache(site.cache)
    partial.folder.mkdir(parents=True, exist_ok=True)
    records = partial.folder / RECORDS
    begun = read_records(records, site, pseudonyms)
    if not begun:
        records.unlink(missing_ok=True)
    known = read_records(site.cache / RECORDS, site, pseudonyms) | begun
    found = survey(
        site, pseudonyms, files, known, crew, progress, lambda pairs: append_records(records, site, pseudonyms, pairs)
    )
    write_records(records, site, pseudonyms, found.scan.files)
    if not found.jobs:
        raise IngestError(
            f"site {site.name!r}: no usable CT series in {site.images} ({len(files)} files{_reasons(found.faults)}); "
            + (denied_text(found.faults) or "point data.images at a folder with axial CT in DICOM")
        )
    with partial:
        read = _fill(site, partial, found, crew, progress)
        faults = (*found.faults, *(fault for part in partial.parts for fault in part.faults))
        parts = [part for part in partial.parts if part.rows]
        if not parts:
            raise IngestError(f"site {site.name!r}: no slice of {len(found.jobs)} series can be used{_reasons(faults)}")
        report = _report(found, parts, len(files), read, faults)
        content = {name: value for name, value in asdict(report).items() if name not in ("read", "unchanged")}
        head = {"format": FORMAT_VERSION, "manifest": manifest, **content}  # nothing of how it came to be
        partial.finish(found.labels, splits_of(site, {part.patient for part in parts}), head)
    return report


def _fill(site: Site, partial: PartialCache, found: Survey, crew: WorkerPool, progress: Progress) -> int:
    """Bring every series into the partial cache, in order; returns how many were read."""
    prints = fingerprints(found)
    done = partial.begin(prints)
    old: dict[str, StoredSeries] = {part.fingerprint: part for part in _whole_parts(site)}
    fresh = [job for job, name in zip(found.jobs[done:], prints[done:], strict=True) if name not in old]
    reading = read_parts(fresh, crew)
    arrays = {}
    if old:
        cache = read_cache(site.cache)
        arrays = {"hu": cache.hu, "masks": cache.masks}
    for number, name in enumerate(prints[done:], start=done + 1):
        if name in old:
            part = old[name]
            rows = slice(part.start, part.start + len(part.rows))
            partial.add(name, part, arrays["hu"][rows], arrays["masks"][rows])
        else:
            part = next(reading)
            partial.add(name, part, part.hu, part.masks)
        progress("series", number, len(prints))
    return len(fresh)


def _whole_parts(site: Site) -> list[StoredSeries]:
    """Parts of the cache in place, if it is whole."""
    cache, parts = whole_cache(site.cache), read_journal(site.cache)
    return parts if cache and sum(len(part.rows) for part in parts) == len(cache.label) else []


def _report(found: Survey, parts: list[StoredSeries], files: int, read: int, faults: tuple[Fault, ...]) -> IngestReport:
    """Counts of a cache."""
    rows = [row for part in parts for row in part.rows]
    values = [found.labels.get(row.image, "") for row in rows]
    return IngestReport(
        slices=len(rows),
        patients=len({part.patient for part in parts}),
        series=len(parts),
        positives=values.count("1"),
        unlabelled=values.count(""),
        masked=sum(row.has_mask for row in rows),
        files=files,
        read=read,
        faults=faults,
    )


@contextmanager
def _alone(site: Site) -> Iterator[None]:
    """Hold the site's lock; it is let go when the process ends, however it ends."""
    with open(site.state / "ingest.lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not held on by worker processes
        except (BlockingIOError, PermissionError) as error:  # fcntl(2): one or the other, by system
            raise IngestError(f"site {site.name!r}: another ingest is at work; wait for it, or end it") from error
        yield


def _check_cache(site: Site) -> None:
    """Refuse folders that hold anything but a slice cache: ingest is about to replace them."""
    for suffix in ("", ".partial", ".old"):
        folder = site.cache.with_name(site.cache.name + suffix)
        others = strangers(folder)
        if others or (folder.exists() and not folder.is_dir()):
            raise IngestError(
                f"{folder} is no slice cache: it holds {len(others)} other things; name a folder of its own as cache"
            )


def _manifest(site: Site, pseudonyms: Pseudonyms, files: list[FoundFile]) -> str:
    """Hash of what the cache is made from: files, labels, the site's settings and this reader's versions."""
    settings = {
        "versions": [FORMAT_VERSION, READER_VERSION, PART_VERSION],
        "files": manifest_of(files),
        "labels": table_digest(site),
        "split": SPLIT_SHARES,
        "role": site.role,
        "segments": site.segments,
        "accept_lossy": site.accept_lossy,
        "key": pseudonyms.of_key(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _current_report(site: Site, manifest: str, files: int) -> IngestReport | None:
    """The report of the cache that is there, if it is whole and made from the same files."""
    try:
        head = json.loads((site.cache / HEAD).read_text())
        if head.get("manifest") != manifest:
            return None
        read_cache(site.cache)
        counts = {name: head[name] for name in ("slices", "patients", "series", "positives", "unlabelled", "masked")}
        faults = tuple(Fault(fault["what"], fault["reason"], Kind(fault["kind"])) for fault in head["faults"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none there, or damaged: it is written again
        return None
    return IngestReport(**counts, files=files, read=0, faults=faults, unchanged=True)


def _reasons(faults: tuple[Fault, ...]) -> str:
    """The three commonest reasons, for an error's text."""
    return "".join(f"; {len(which)}x {reason}" for reason, which in by_reason(faults)[:3])
