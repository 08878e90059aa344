"""Whether a hospital's data are ready to train on, without writing anything but the answer.

In: a Site. Every image is read as ingest would read it. Out: check.html and check.json beside site.yaml: what is there,
what would be left out and why, and faults that would spoil training. Patients appear as keyed hashes.

Everything stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from client.check.found import Found
from client.check.problems import problems
from client.dicom.faults import Fault, by_reason
from client.dicom.hounsfield import BINS
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import Choice, CtSeries, describe, sharpness
from client.ingest.label_table import LabelError
from client.ingest.labels import splits_of
from client.ingest.read_series import OFF_HEAD_HU, CachedSeries, middle_slice
from client.ingest.resample import edge_share
from client.ingest.scan import walk
from client.ingest.survey import Progress, Survey, read_parts, survey
from client.ingest.workers import WorkerPool
from client.masks.drawn import PIECES, Tally
from client.masks.match import refused
from shared.site import Site
from shared.slices import SPLITS

MOST_PICTURES = 60  # in the contact sheet
MOST_REFUSED = 24  # of series that are left out


@dataclass(frozen=True)
class Picture:
    """One slice of the contact sheet: the one with most hematoma, or the middle one.

    Attributes:
      title: patient's hash, and the label.
      hu: int16 (224, 224).
      mask: uint8 (224, 224).
      refused: its series is left out.
    """

    title: str
    hu: NDArray[np.int16] = field(repr=False)
    mask: NDArray[np.uint8] = field(repr=False)
    refused: bool = False


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
      site, role: as in site.yaml.
      ready: no problem was found.
      temporary: hashes come from the folder, as the hospital has no key yet; ingest makes one, and they change.
      problems: what would spoil training, in words.
      notes: what is as it may be, and good to know: what may leave of small splits.
      masks: frames, contours, layers or pictures -> how many are in the mask files, taken, and left out by reason.
      counts: files, patients, series, slices, labelled, positives, masked (somebody looked), hematoma (a mask is not
        empty).
      splits: split -> patients, slices, positives.
      tables: name -> value -> number of series: scanners, kernels, spacings, thicknesses, tilts, matrices, syntaxes,
        body parts, flags.
      positives_by_scanner: scanner -> labelled slices, positives.
      choices: which series of each study was taken, and why.
      faults: what would be left out.
      histograms: scanner -> counts of HU, see client/dicom/hounsfield.py.
      pictures: the contact sheet.
    """

    site: str
    role: str
    ready: bool
    temporary: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    masks: dict[str, dict]
    counts: dict[str, int]
    splits: dict[str, dict[str, int]]
    tables: dict[str, dict[str, int]]
    positives_by_scanner: dict[str, tuple[int, int]]
    choices: tuple[Choice, ...]
    faults: tuple[Fault, ...]
    histograms: dict[str, NDArray[np.int64]] = field(repr=False)
    pictures: tuple[Picture, ...] = field(repr=False)

    def to_json(self) -> str:
        """Everything but the pictures."""
        content = {k: v for k, v in asdict(self).items() if k not in ("histograms", "pictures", "faults")}
        content["left_out"] = [{"reason": r, "count": len(w), "what": w} for r, w in by_reason(self.faults)]
        content["hu_histograms"] = {name: counts.tolist() for name, counts in self.histograms.items()}
        return json.dumps(content, indent=1) + "\n"


def pseudonyms_of(site: Site) -> tuple[Pseudonyms, bool]:
    """A hospital's pseudonyms without writing, and whether they are temporary: before the first ingest there is no key.

    The key is then the hash of every path, size and time in the folder, so only somebody with the folder can make it.
    """
    if (site.state / "key").is_file():
        return Pseudonyms(site.key()), False
    digest = hashlib.sha256()
    for root in filter(None, (site.images, site.masks)):
        for place, folders, files in os.walk(root):
            folders.sort()
            for name in sorted(files):
                stamp = ""
                with suppress(OSError):  # in a folder that may only be listed
                    stat = os.lstat(os.path.join(place, name))
                    stamp = f" {stat.st_size} {stat.st_mtime_ns}"
                digest.update(f"{place}/{name}{stamp}\n".encode())
    return Pseudonyms(digest.digest()), True


def check(site: Site, workers: int | None, progress: Progress) -> Check:
    """Read a hospital's folder as ingest would, and write nothing.

    Args:
      site: whose.
      workers: processes; by default one per core.
      progress: called with "headers" or "series", how many are done, and how many there are.
    """
    pseudonyms, temporary = pseudonyms_of(site)
    files = walk(site, pseudonyms)
    parts: list[CachedSeries] = []
    pictures: dict[str, Picture] = {}
    heads: dict[str, NDArray[np.int64]] = {}
    edges: dict[str, float] = {}
    with WorkerPool(workers) as crew:
        try:
            found = survey(site, pseudonyms, files, {}, crew, progress)
            trouble = []
        except LabelError as error:  # look at the rest without labels
            found = survey(replace(site, labels=None), pseudonyms, files, {}, crew, progress)
            trouble = [str(error)]
        shown = {found.jobs[i].series.name for i in _evenly(len(found.jobs), MOST_PICTURES)}
        for done, part in enumerate(read_parts(list(found.jobs), crew), start=1):
            if part.series in shown and part.rows:
                pictures[part.series] = _picture(part, found)
            heads[part.series] = (part.hu > OFF_HEAD_HU).sum(axis=(1, 2))
            edges[part.series] = edge_share(part.hu)
            parts.append(replace(part, hu=part.hu[:0], masks=_areas(part)))
            progress("series", done, len(found.jobs))
        empty = {part.series for part in parts if not part.rows}
        refused = [*found.refused, *(job.series for job in found.jobs if job.series.name in empty)]
        for one, hu_YX in crew.run(middle_slice, [refused[i] for i in _evenly(len(refused), MOST_REFUSED)]):
            if isinstance(hu_YX, np.ndarray):
                pictures[one.name] = Picture(f"left out {one.name[:8]}", hu_YX, np.zeros(hu_YX.shape, np.uint8), True)
    return _conclude(
        site, pseudonyms, temporary, len(files), found, parts, heads, edges, tuple(pictures.values()), trouble
    )


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _areas(part: CachedSeries) -> NDArray[np.int64]:
    """Pixels of hematoma per slice: what a check needs of the masks."""
    return part.masks.reshape(len(part.rows), -1).sum(axis=1, dtype=np.int64) if part.rows else np.zeros(0, np.int64)


def _picture(part: CachedSeries, found: Survey) -> Picture:
    """The slice of a series that says most."""
    areas = _areas(part)
    best = int(np.argmax(areas)) if areas.any() else len(part.rows) // 2
    label = {"1": ", marker", "0": ", no marker"}.get(found.labels.get(part.rows[best].image, ""), "")
    return Picture(part.patient[:8] + label, part.hu[best].copy(), part.masks[best].copy())


def _conclude(
    site: Site,
    pseudonyms: Pseudonyms,
    temporary: bool,
    files: int,
    survey: Survey,
    parts: list[CachedSeries],
    heads: dict[str, NDArray[np.int64]],
    edges: dict[str, float],
    pictures: tuple[Picture, ...],
    trouble: list[str],
) -> Check:
    """Counts, tables and problems of what was read."""
    used = [part for part in parts if part.rows]
    series = {one.name: one for one in survey.series()}
    splits = splits_of(site, {part.patient for part in used}, keep=False)
    faults = (*survey.faults, *(fault for part in parts for fault in part.faults))
    tallies = [tally for part in parts for tally in part.tallies]
    labelled, histograms, by_split = _sums(used, survey, series, splits)
    known = {} if temporary and site.role == "train" else splits
    found = problems(
        Found(site, pseudonyms, survey, used, heads, edges, series, faults, tallies, known, labelled), trouble
    )
    counts = {"files": files} | _counts(used, labelled)
    return Check(
        site=site.name,
        role=site.role,
        ready=not found,
        temporary=temporary,
        problems=found,
        notes=notes(site, by_split, not known),
        masks=mask_account(survey, tallies, faults),
        counts=counts,
        splits=by_split,
        tables=_tables([series[part.series] for part in used]),
        positives_by_scanner=labelled,
        choices=survey.choices,
        faults=faults,
        histograms=histograms,
        pictures=pictures,
    )


def _counts(used: list[CachedSeries], labelled: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Patients, series, slices, labels and masks."""
    return {
        "patients": len({part.patient for part in used}),
        "series": len(used),
        "slices": sum(len(part.rows) for part in used),
        "labelled": sum(known for known, _ in labelled.values()),
        "positives": sum(positive for _, positive in labelled.values()),
        "masked": sum(row.has_mask for part in used for row in part.rows),
        "hematoma": int(sum((part.masks > 0).sum() for part in used)),
    }


def _sums(
    used: list[CachedSeries], found: Survey, series: dict[str, CtSeries], splits: dict[str, str]
) -> tuple[dict[str, tuple[int, int]], dict[str, NDArray[np.int64]], dict[str, dict[str, int]]]:
    """Scanner -> labelled slices and positives; scanner -> values; split -> patients, slices and positives."""
    labelled: dict[str, tuple[int, int]] = {}
    histograms: dict[str, NDArray[np.int64]] = {}
    by_split = {name: {"patients": 0, "slices": 0, "positives": 0} for name in SPLITS if name in splits.values()}
    for part in used:
        scanner = series[part.series].slices[0].scanner
        values = [found.labels.get(row.image, "") for row in part.rows]
        known, positive = sum(v != "" for v in values), values.count("1")
        before = labelled.get(scanner, (0, 0))
        labelled[scanner] = (before[0] + known, before[1] + positive)
        histograms[scanner] = histograms.get(scanner, np.zeros(BINS, np.int64)) + part.counts
        by_split[splits[part.patient]]["slices"] += len(part.rows)
        by_split[splits[part.patient]]["positives"] += positive
    for split, number in Counter(splits[p] for p in {part.patient for part in used}).items():
        by_split[split]["patients"] = number
    return labelled, histograms, by_split


def mask_account(found: Survey, tallies: Iterable[Tally], faults: Iterable[Fault]) -> dict[str, dict]:
    """Frames, contours, layers and pictures of all mask files that could be opened: in = taken + left out by reason."""
    read = {tally.file: tally for tally in tallies}
    reasons = {fault.what.removeprefix("file "): fault.reason for fault in reversed(list(faults))}
    account: dict[str, dict] = {}
    for mask in found.scan.masks:
        tally = read.get(mask.file) or refused(mask, reasons.get(mask.file, "its series was left out"))
        entry = account.setdefault(PIECES[mask.kind], {"in": 0, "taken": 0, "left": []})
        entry["in"] += tally.total
        entry["taken"] += tally.taken
        entry["left"] += [Fault("", reason) for reason, count in tally.left for _ in range(count)]
    for entry in account.values():
        left = by_reason(entry.pop("left"), name_first=False)
        entry["left_out"] = [{"reason": reason, "count": len(which)} for reason, which in left]
        assert entry["in"] == entry["taken"] + sum(group["count"] for group in entry["left_out"]), (
            "a mask's pieces are lost"
        )
    return account


def notes(site: Site, splits: Mapping[str, Mapping[str, int]], unknown: bool) -> tuple[str, ...]:
    """Explain what the splits mean for what may leave.

    Args:
      splits: split -> patients and more.
      unknown: the first ingest draws them again; their sizes stay.
    """
    least, lines = site.policy.min_patients, []
    meaning = {
        "train": "the numbers of training stay in the hospital",
        "val": "the numbers of its rounds stay in the hospital",
        "test": "the numbers of its test stay in the hospital",
    }
    for name, row in splits.items():
        if row["patients"] < least:
            encoder = (
                "; the encoder takes part all the same" if site.role == "train" else ": it has no part in the result"
            )
            lines.append(
                f"split {name} {'will have' if unknown else 'has'} {row['patients']} patients, fewer than policy.min_patients ({least}): "
                f"{meaning[name]}{encoder}"
            )
    return tuple(lines)


def _tables(series: Iterable[CtSeries]) -> dict[str, dict[str, int]]:
    """Count series by scanner, kernel, geometry and syntax."""
    tables: dict[str, Counter[str]] = defaultdict(Counter)
    for one in series:
        first = one.slices[0]
        tables["scanner"][first.scanner] += 1
        tables["kernel"][f"{first.kernel} ({sharpness(first)})"] += 1
        tables["distance of slices"][f"{one.spacing_mm:.1f} mm" if one.spacing_mm else "one slice"] += 1
        tables["slice thickness"][f"{first.thickness_mm:g} mm" if first.thickness_mm else "not given"] += 1
        tables["pixel spacing"]["{:.2f} x {:.2f} mm".format(*first.spacing_mm)] += 1
        tables["matrix"]["{} x {}".format(*first.shape)] += 1
        tables["gantry tilt"][f"{one.tilt_degree:.0f}°"] += 1
        tables["transfer syntax"][UID(first.syntax).name] += 1
        tables["BodyPartExamined (not used)"][first.body] += 1
        for flag in one.flags:
            tables["unusual"][flag] += 1
    return {name: dict(counter.most_common()) for name, counter in tables.items()}


def describe_choice(choice: Choice, series: dict[str, CtSeries]) -> str:
    """Describe which series of a study was taken."""
    taken = "; ".join(describe(series[name]) for name in choice.taken if name in series)
    return f"{taken}: {choice.reason}"


def write_json(result: Check, folder: Path) -> Path:
    """check.json."""
    path = folder / "check.json"
    path.write_text(result.to_json(), encoding="utf-8")
    return path
