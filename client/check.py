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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID

from client.crew import Crew
from client.dicom import Fault
from client.hounsfield import BINS
from client.label_table import LabelError
from client.labels import splits_of
from client.reading import Part
from client.scan import denied_text, walk
from client.series import Choice, CtSeries, describe, sharpness
from client.survey import Progress, Survey, read_parts, survey
from shared.site import Site
from shared.slices import SPLITS

MOST_PICTURES = 60  # in the contact sheet
FEW_POSITIVES = 5  # from here on it is worth asking whether one scanner has them all


@dataclass(frozen=True)
class Picture:
    """One slice of the contact sheet: the one with most hematoma, or the middle one.

    Attributes:
      title: patient's hash, and the label.
      hu: int16 (224, 224).
      mask: uint8 (224, 224).
    """

    title: str
    hu: NDArray[np.int16] = field(repr=False)
    mask: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
      site, role: as in site.yaml.
      ready: no problem was found.
      temporary: hashes come from the folder, as the hospital has no key yet; ingest makes one, and they change.
      problems: what would spoil training, in words.
      counts: files, patients, series, slices, labelled, positives, masked (somebody looked), hematoma (a mask is not
        empty).
      splits: split -> patients, slices, positives.
      tables: name -> value -> number of series: scanners, kernels, spacings, thicknesses, tilts, matrices, syntaxes,
        body parts, flags.
      positives_by_scanner: scanner -> labelled slices, positives.
      choices: which series of each study was taken, and why.
      faults: what would be left out.
      histograms: scanner -> counts of HU, see client/hounsfield.py.
      pictures: the contact sheet.
    """

    site: str
    role: str
    ready: bool
    temporary: bool
    problems: tuple[str, ...]
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
        groups: dict[str, list[str]] = defaultdict(list)
        for fault in self.faults:
            groups[fault.reason].append(fault.what)
        content["left_out"] = [{"reason": r, "count": len(w), "what": w} for r, w in _largest_first(groups)]
        content["hu_histograms"] = {name: counts.tolist() for name, counts in self.histograms.items()}
        return json.dumps(content, indent=1) + "\n"


def _largest_first(groups: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Groups by size."""
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def with_key(site: Site) -> Site:
    """A site whose hashes can be made without writing: with its own key or, before the first ingest, one of its folder.

    The folder's key is the hash of every path, size and time in it: whoever has the folder gets the same, nobody else.
    """
    if (site.state / "key").is_file():
        return site
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
    return replace(site, lent_key=digest.digest())


def check(site: Site, workers: int | None, progress: Progress) -> Check:
    """Read a hospital's folder as ingest would, and write nothing.

    Args:
      site: whose.
      workers: processes; by default one per core.
      progress: told "headers" or "series", how many are done, and how many there are.
    """
    lent = with_key(site)
    files = walk(lent)
    parts: list[Part] = []
    pictures: dict[str, Picture] = {}
    with Crew(workers) as crew:
        try:
            found = survey(lent, files, {}, crew, progress)
            trouble = []
        except LabelError as error:  # look at the rest without labels
            found = survey(replace(lent, labels=None), files, {}, crew, progress)
            trouble = [str(error)]
        shown = {found.jobs[i].series.name for i in _evenly(len(found.jobs), MOST_PICTURES)}
        for done, part in enumerate(read_parts(list(found.jobs), crew), start=1):
            if part.series in shown and part.rows:
                pictures[part.series] = _picture(part, found)
            parts.append(replace(part, hu=part.hu[:0], masks=_areas(part)))
            progress("series", done, len(found.jobs))
    return _conclude(lent, len(files), found, parts, tuple(pictures.values()), trouble)


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _areas(part: Part) -> NDArray[np.int64]:
    """Pixels of hematoma per slice: what a check needs of the masks."""
    return part.masks.reshape(len(part.rows), -1).sum(axis=1, dtype=np.int64) if part.rows else np.zeros(0, np.int64)


def _picture(part: Part, found: Survey) -> Picture:
    """The slice of a series that says most."""
    areas = _areas(part)
    best = int(np.argmax(areas)) if areas.any() else len(part.rows) // 2
    label = {"1": ", marker", "0": ", no marker"}.get(found.labels.get(part.rows[best].image, ""), "")
    return Picture(part.patient[:8] + label, part.hu[best].copy(), part.masks[best].copy())


def _conclude(
    site: Site, files: int, found: Survey, parts: list[Part], pictures: tuple[Picture, ...], trouble: list[str]
) -> Check:
    """Counts, tables and problems of what was read."""
    temporary = site.lent_key is not None
    used = [part for part in parts if part.rows]
    series = {one.name: one for one in found.series()}
    splits = splits_of(site, {part.patient for part in used}, keep=False)
    scanners = {part.series: series[part.series].slices[0].scanner for part in used}
    labelled: dict[str, tuple[int, int]] = {}
    histograms: dict[str, NDArray[np.int64]] = {}
    by_split = {name: {"patients": 0, "slices": 0, "positives": 0} for name in SPLITS if name in splits.values()}
    for part in used:
        values = [found.labels.get(row.image, "") for row in part.rows]
        known, positive = sum(v != "" for v in values), values.count("1")
        before = labelled.get(scanners[part.series], (0, 0))
        labelled[scanners[part.series]] = (before[0] + known, before[1] + positive)
        histograms[scanners[part.series]] = (
            histograms.get(scanners[part.series], np.zeros(BINS, np.int64)) + part.counts
        )
        by_split[splits[part.patient]]["slices"] += len(part.rows)
        by_split[splits[part.patient]]["positives"] += positive
    for split, number in Counter(splits[p] for p in {part.patient for part in used}).items():
        by_split[split]["patients"] = number
    faults = (*found.faults, *(fault for part in parts for fault in part.faults))
    problems = (
        *trouble,
        *filter(None, [denied_text(faults)]),
        *_unusable(site, used, found),
        *_unmatched(faults, site),
        *_leaks(used, series, {} if temporary and site.role == "train" else splits),
        *_contradictions(used, found),
        *_lopsided(labelled),
    )
    counts = {
        "files": files,
        "patients": len({part.patient for part in used}),
        "series": len(used),
        "slices": sum(len(part.rows) for part in used),
        "labelled": sum(known for known, _ in labelled.values()),
        "positives": sum(positive for _, positive in labelled.values()),
        "masked": sum(row.has_mask for part in used for row in part.rows),
        "hematoma": int(sum((part.masks > 0).sum() for part in used)),
    }
    return Check(
        site=site.name,
        role=site.role,
        ready=not problems,
        temporary=temporary,
        problems=tuple(problems),
        counts=counts,
        splits=by_split,
        tables=_tables([series[part.series] for part in used]),
        positives_by_scanner=labelled,
        choices=found.choices,
        faults=faults,
        histograms=histograms,
        pictures=pictures,
    )


def _tables(series: Iterable[CtSeries]) -> dict[str, dict[str, int]]:
    """How many series have which scanner, kernel, geometry and syntax."""
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


def _unusable(site: Site, used: list[Part], found: Survey) -> list[str]:
    """Nothing to train or test on."""
    if not used:
        return ["no slice can be used: see what was left out"]
    values = list(found.labels.values())
    problems = []
    if site.role == "train" and not any(values) and not any(row.has_mask for part in used for row in part.rows):
        problems.append("neither labels nor masks: there is nothing to learn but reconstruction")
    if any(values) and len({v for v in values if v}) == 1:
        present = "with" if "1" in values else "without"
        problems.append(f"every labelled slice is {present} the marker: a classifier needs both")
    if any(row.has_mask for part in used for row in part.rows) and not any(part.masks.any() for part in used):
        problems.append("every mask is empty: is data.segment the hematoma?")
    return problems


def _unmatched(faults: tuple[Fault, ...], site: Site) -> list[str]:
    """Labels and masks that do not belong to what was taken."""
    problems = []
    labels = [fault for fault in faults if site.labels and fault.what.startswith(f"{site.labels.name} line ")]
    if labels:
        problems.append(
            f"{len(labels)} lines of {site.labels.name} match nothing; first, {labels[0].what}: {labels[0].reason}"
        )
    off = [fault for fault in faults if "of its mask lie in air" in fault.reason]
    if off:
        problems.append(f"masks of {len(off)} series lie off the head; first, {off[0].what}: {off[0].reason}")
    return problems


def _leaks(used: list[Part], series: dict[str, CtSeries], splits: dict[str, str]) -> list[str]:
    """One patient in two splits: equal pictures, or one study, under two identifiers.

    Without splits, as before the first ingest, which makes the key that they follow, any two identifiers may come apart.
    """
    problems = []
    for kind, groups in (("pictures", _by_content(used)), ("studies", _by_study(used, series))):
        shared = [patients for patients in groups.values() if len(patients) > 1]
        apart = [patients for patients in shared if not splits or len({splits[p] for p in patients}) > 1]
        if apart:
            where = "are in different splits" if splits else "may come into different splits"
            problems.append(
                f"{len(apart)} {kind} belong to several patients that {where} (such as {' and '.join(sorted(apart[0])[:2])}): "
                "one patient with two identifiers, half trained on and half tested on; give them one PatientID"
            )
    return problems


def _by_content(used: list[Part]) -> dict[str, set[str]]:
    """Slice content -> patients; slices of one value, as air alone, say nothing and are not told apart."""
    groups: dict[str, set[str]] = defaultdict(set)
    for part in used:
        for row in part.rows:
            if row.content:
                groups[row.content].add(part.patient)
    return groups


def _by_study(used: list[Part], series: dict[str, CtSeries]) -> dict[str, set[str]]:
    """Study -> patients."""
    groups: dict[str, set[str]] = defaultdict(set)
    for part in used:
        groups[series[part.series].slices[0].study].add(part.patient)
    return groups


def _contradictions(used: list[Part], found: Survey) -> list[str]:
    """A marker where the mask shows no hematoma."""
    wrong = 0
    for part in used:
        for row, area in zip(part.rows, part.masks, strict=True):
            wrong += row.has_mask and not area and found.labels.get(row.image) == "1"
    return [f"{wrong} slices are labelled with the marker and have an empty mask"] if wrong else []


def _lopsided(labelled: dict[str, tuple[int, int]]) -> list[str]:
    """All positives from one of several scanners: a model would learn the scanner."""
    known = {name: pair for name, pair in labelled.items() if pair[0]}
    having = [name for name, (_, positive) in known.items() if positive]
    if len(known) > 1 and len(having) == 1 and known[having[0]][1] >= FEW_POSITIVES:
        return [
            f"all {known[having[0]][1]} positives are from one of {len(known)} scanners ({having[0]}): the scanner predicts the label"
        ]
    return []


def describe_choice(choice: Choice, series: dict[str, CtSeries]) -> str:
    """What was taken of a study, in words."""
    taken = "; ".join(describe(series[name]) for name in choice.taken if name in series)
    return f"{taken}: {choice.reason}"


def write_json(result: Check, folder: Path) -> Path:
    """check.json."""
    path = folder / "check.json"
    path.write_text(result.to_json(), encoding="utf-8")
    return path
