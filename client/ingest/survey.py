"""Survey of a hospital's folder before its pixels are read: series, masks, labels, and how they belong together.

`ingest` and `check` both begin here, so that what the one reports is what the other takes. Stays in the hospital.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from client.dicom.faults import Fault
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import Choice, CtSeries, build_series, choose
from client.ingest.label_table import read_labels
from client.ingest.labels import annotated_series, match_labels
from client.ingest.read_series import CachedSeries, SeriesJob, can_read, image_name, read_part
from client.ingest.resent import without_copies
from client.ingest.scan import READER_VERSION, FileRecord, FoundFile, Scan, scan
from client.ingest.workers import ENDED_ITS_READER, WorkerEnded, WorkerPool
from client.masks.match import match_masks
from shared.site import Site

PART_VERSION = 2  # of what read_part makes; parts of another version are made again

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Survey:
    """A hospital's data, ready to be read.

    Attributes:
      scan: every file and what it is.
      jobs: one per series that was taken, in order of its name.
      choices: which series of each study was taken, and why.
      labels: image name -> "1", "0" or "".
      faults: what was left out so far.
      series_found: every series that holds together, taken or not.
      refused: those that do not, to be looked at.
    """

    scan: Scan
    jobs: tuple[SeriesJob, ...]
    choices: tuple[Choice, ...]
    labels: dict[str, str]
    faults: tuple[Fault, ...]
    series_found: tuple[CtSeries, ...]
    refused: tuple[CtSeries, ...]

    def series(self) -> list[CtSeries]:
        """The series that were taken."""
        return [job.series for job in self.jobs]


def survey(
    site: Site,
    pseudonyms: Pseudonyms,
    files: list[FoundFile],
    known: Mapping[str, tuple[str, FileRecord]],
    crew: WorkerPool,
    progress: Progress,
    keep: Callable[[list[tuple[FoundFile, FileRecord]]], None] = lambda pairs: None,
) -> Survey:
    """Read the headers of a hospital's files and decide what is taken.

    Args:
      site: whose.
      pseudonyms: the hospital's.
      files, known, crew, keep: as scan takes them.
      progress: called with "headers", how many files are read, and how many there are to read.
    Raises:
      LabelError: the label table cannot be used.
    """
    rows = read_labels(site, pseudonyms)  # before the long part: a table's faults are soon corrected
    found = scan(site, pseudonyms, files, known, crew, lambda done, total: progress("headers", done, total), keep)
    images, copies = without_copies(found.images, crew)
    series, refused, series_faults = build_series(images)
    masks, mask_faults = match_masks(found.masks, series)
    taken, choices, left = choose(series, annotated_series(rows, masks))
    lost = {fault.what.removeprefix("series "): fault.reason for fault in (*series_faults, *left)}
    labels, label_faults = match_labels(rows, taken, site.labels.name if site.labels else "", lost)
    jobs = tuple(SeriesJob(one, tuple(masks.get(one.name, ())), pseudonyms, site.segments) for one in taken)
    faults = (*found.faults, *copies, *series_faults, *mask_faults, *left, *label_faults)
    return Survey(found, jobs, tuple(choices), labels, faults, tuple(series), tuple(refused))


def fingerprints(survey: Survey) -> list[str]:
    """Per job, a hash of all that its Part depends on: its files, by stamp, and which segment of a mask is meant."""
    stamps = {f.code: f.stamp for f, _ in survey.scan.files}
    prints = []
    for job in survey.jobs:
        content = [
            [READER_VERSION, PART_VERSION],
            [(s.file, stamps[s.file], s.frame, s.copies) for s in job.series.slices],
            [(m.file, stamps[m.file]) for m in job.masks],
            job.segments if job.masks else None,
        ]
        prints.append(hashlib.sha256(json.dumps(content).encode()).hexdigest())
    return prints


def read_parts(jobs: list[SeriesJob], crew: WorkerPool) -> Iterator[CachedSeries]:
    """The parts of some jobs, in their order; images that end their reader are left out."""
    for job, result in crew.run(read_part, jobs):
        yield result if isinstance(result, CachedSeries) else _without_killers(job, crew)


def _without_killers(job: SeriesJob, crew: WorkerPool) -> CachedSeries:
    """The part of a series whose reading ended a process: without the images that do so alone, else without its masks."""
    killers = {
        image.image for image, result in crew.run(can_read, job.series.slices) if isinstance(result, WorkerEnded)
    }
    faults = [Fault(image_name(s), ENDED_ITS_READER) for s in job.series.slices if s.image in killers]
    rest = replace(job.series, slices=tuple(s for s in job.series.slices if s.image not in killers))
    if rest.slices and killers:
        part = _alone(replace(job, series=rest), crew)
        if part:
            return replace(part, faults=(*faults, *part.faults))
    if rest.slices and job.masks:
        part = _alone(replace(job, series=rest, masks=()), crew)
        if part:
            faults += [Fault(f"file {m.file}", ENDED_ITS_READER) for m in job.masks]
            return replace(part, faults=(*faults, *part.faults))
    what = Fault(
        f"series {job.series.name}", f"{ENDED_ITS_READER}; its {len(job.series.slices)} images and masks are left out"
    )
    return CachedSeries.empty(job.series.name, job.series.slices[0].patient, (*faults, what))


def _alone(job: SeriesJob, crew: WorkerPool) -> CachedSeries | None:
    """One series; None if it ends its process."""
    return next((result for _, result in crew.run(read_part, [job]) if isinstance(result, CachedSeries)), None)
