"""A hospital's files to its slice cache.

In: a Site. Out: the cache of shared/slices, written beside the old one and swapped in whole, and a report of what
was taken and what was left out. Patients and series become keyed hashes here; names, dates and identifiers go no
further. The split is decided once per patient and kept, so nobody moves to the test when patients are added.

Nothing here leaves the hospital. Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.dicom import AIR_HU, CtSeries, DicomError, Fault, clamp_hu, find_files, read_hu, read_series
from client.masks import MaskFile, find_masks, read_masks
from client.resample import head_centre, resample, touches_edge
from shared.site import Site
from shared.slices import COLUMNS, FORMAT_VERSION, SIDE_PX, read_cache

_CACHE_FILES = {"slices.npy", "masks.npy", "index.csv", "cache.json", "slices.npy.cut", "masks.npy.cut"}
SPLIT_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}


class IngestError(ValueError):
    """A hospital's data cannot become a cache; lists every fault and the next step."""


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did; for the hospital's own eyes.

    Attributes:
      slices, patients, series: counts in the cache.
      positives, unlabelled, masked: slices with the marker, without a label, with a mask.
      faults: what was left out.
      unchanged: the cache was current and nothing was read.
    """

    slices: int
    patients: int
    series: int
    positives: int
    unlabelled: int
    masked: int
    faults: tuple[Fault, ...]
    unchanged: bool = False


@dataclass(frozen=True)
class _Ingested:
    """One series, ready for the cache."""

    hu: NDArray[np.int16]
    masks: NDArray[np.uint8]
    rows: list[dict[str, str]]
    faults: list[Fault]


def ingest(
    site: Site, workers: int | None = None, progress: Callable[[int, int], None] = lambda d, n: None
) -> IngestReport:
    """Write a hospital's slice cache, unless it is current.

    Args:
      site: where the files are and where the cache goes.
      workers: processes; by default one per core.
      progress: told series done and series in all.
    Returns:
      Counts and faults.
    Raises:
      IngestError: no usable slice, or a label table that does not fit the images.
    """
    manifest = _manifest(site)
    current = _current_report(site, manifest)
    if current:
        return current
    series, faults = read_series(site.images)
    if not series:
        raise IngestError(
            f"site {site.name!r}: no CT series in {site.images} ({len(faults)} files left out{_reasons(faults)}); "
            "point data.images at a folder with axial CT in DICOM"
        )
    masks, mask_faults = find_masks(site.masks)
    known = {s.uid for s in series}
    for uid in sorted(masks.keys() - known):
        mask_faults.append(Fault(masks[uid].path.name, f"refers to series {short(uid)}, which is not in data.images"))
    labels = read_labels(site, series)
    key = site.key()
    owners = {one.uid: {pseudonym(key, "patient", s.patient_id) for s in one.slices} for one in series}
    splits = _kept_splits(site, set().union(*owners.values()))
    jobs = [
        (one, masks.get(one.uid), labels.get(one.uid, {}), {owner: splits[owner] for owner in owners[one.uid]}, key)
        for one in series
    ]
    partial = site.cache.with_name(site.cache.name + ".partial")
    _check_cache(site.cache)  # before the work, not after
    _remove_cache(partial)
    partial.mkdir(parents=True)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        done = _watched(pool.map(_ingest_series, jobs, chunksize=2), len(jobs), progress)
        rows, read_faults = _write_arrays(partial, done, sum(len(s.slices) for s in series))
    faults = tuple(faults + mask_faults + read_faults)
    if not rows:
        raise IngestError(f"site {site.name!r}: no slice of {len(series)} series could be read{_reasons(faults)}")
    report = IngestReport(
        slices=len(rows),
        patients=len({row["patient"] for row in rows}),
        series=len({row["series"] for row in rows}),
        positives=sum(row["label"] == "1" for row in rows),
        unlabelled=sum(row["label"] == "" for row in rows),
        masked=sum(row["has_mask"] == "1" for row in rows),
        faults=faults,
    )
    _write_index(partial, rows, report, manifest)
    _remove_cache(site.cache)
    os.replace(partial, site.cache)
    return report


def _check_cache(folder: Path) -> None:
    """Refuse a folder that holds anything but a slice cache: ingest is about to delete it."""
    strangers = [p.name for p in folder.iterdir() if p.name not in _CACHE_FILES] if folder.is_dir() else []
    if strangers or (folder.exists() and not folder.is_dir()):
        raise IngestError(
            f"{folder} is no slice cache: it holds {len(strangers)} other things; name a folder of its own as cache"
        )


def _remove_cache(folder: Path) -> None:
    """Delete a slice cache, and nothing else."""
    _check_cache(folder)
    shutil.rmtree(folder, ignore_errors=True)


def short(uid: str) -> str:
    """A UID for a message: enough to find it in the export, not the whole."""
    return uid if len(uid) <= 16 else f"{uid[:6]}…{uid[-8:]}"


def pseudonym(key: bytes, kind: str, identifier: str) -> str:
    """Keyed hash of a patient or series identifier, 16 hexadecimal digits; not to be undone without the key."""
    return hmac.new(key, f"{kind}/{identifier}".encode(), hashlib.sha256).hexdigest()[:16]


def assign_splits(patients: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """The split of every patient: who has one keeps it, who is new goes where most are missing.

    Args:
      patients: hashes; new ones are taken in their order, which says nothing about the patient.
      known: hash -> split of earlier ingests, so that nobody moves from training to test when patients are added.
    Returns:
      Hash -> split, of known and new patients; the shares are those of SPLIT_SHARES, to within one patient of the new.
    """
    splits = dict(known)
    counts = Counter(splits.values())
    for patient in sorted(set(patients) - splits.keys()):
        total = len(splits) + 1
        split = max(SPLIT_SHARES, key=lambda name: SPLIT_SHARES[name] * total - counts[name])
        splits[patient] = split
        counts[split] += 1
    return splits


def _kept_splits(site: Site, patients: Iterable[str]) -> dict[str, str]:
    """Splits of a training hospital's patients, kept in its state folder; another role's patients are all test."""
    if site.role != "train":
        return dict.fromkeys(patients, "test")
    path = site.state / "splits.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    splits = assign_splits(patients, known)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(splits, indent=1))
    os.replace(partial, path)
    return splits


def read_labels(site: Site, series: list[CtSeries]) -> dict[str, dict[str, str]]:
    """The label table.

    Args:
      site: its data.labels is a CSV with columns series_uid, sop_uid or slice_index (from 0, from the feet up), and
        hypodensity (1, 0 or blank for unknown).
      series: all the series there are.
    Returns:
      Series UID -> SOP instance UID -> "1", "0" or "".
    Raises:
      IngestError: a missing column, an unknown series or image, or another value; all of them at once.
    """
    if site.labels is None:
        return {}
    with open(site.labels, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        table = [(reader.line_num, row) for row in reader]
    place = next((c for c in ("sop_uid", "slice_index") if c in columns), None)
    if "series_uid" not in columns or "hypodensity" not in columns or place is None:
        raise IngestError(
            f"site {site.name!r}: {site.labels.name} has columns {columns}, expected series_uid, "
            "sop_uid or slice_index, and hypodensity"
        )
    by_uid = {s.uid: [one.sop_uid for one in s.slices] for s in series}
    labels: dict[str, dict[str, str]] = {}
    wrong = []
    for line, row in table:
        uid, where, value = ((row[column] or "").strip() for column in ("series_uid", place, "hypodensity"))
        if uid not in by_uid:
            wrong.append(f"line {line}: series {short(uid)} is not among the {len(by_uid)} series in data.images")
            continue
        image = _image_of(where, place, by_uid[uid])
        if image is None:
            wrong.append(
                f"line {line}: {place} {short(where)} is not among the {len(by_uid[uid])} slices of its series"
            )
        elif value not in ("", "0", "1"):
            wrong.append(f"line {line}: hypodensity {value!r}, expected 1, 0 or blank")
        elif labels.setdefault(uid, {}).setdefault(image, value) != value:
            wrong.append(f"line {line}: another label than an earlier line gives the same slice")
    if wrong:
        shown = "\n  ".join(wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise IngestError(
            f"site {site.name!r}: {site.labels.name} does not fit the images:\n  {shown}\n"
            "correct the table, or export the images that it speaks of"
        )
    return labels


def _image_of(value: str, place: str, sop_uids: list[str]) -> str | None:
    """The SOP instance UID that a label row means; None if there is none."""
    if place == "sop_uid":
        return value if value in sop_uids else None
    return sop_uids[int(value)] if value.isdecimal() and int(value) < len(sop_uids) else None


def _ingest_series(job: tuple[CtSeries, MaskFile | None, dict[str, str], dict[str, str], bytes]) -> _Ingested:
    """Read, resample and describe one series; runs in a worker process."""
    series, mask_file, labels, splits, key = job
    faults, masks = [], {}
    if mask_file is not None:
        try:
            masks = read_masks(mask_file, series)
        except DicomError as error:
            faults.append(Fault(mask_file.path.name, str(error)))
    images = []
    for one in series.slices:
        try:
            images.append((one, clamp_hu(read_hu(one.path))))
        except DicomError as error:
            faults.append(Fault(one.path.name, str(error)))
    hu, resampled, rows = [], [], []
    centre = head_centre(images) if images else (0.0, 0.0)
    for one, hu_YX in images:
        mask_YX = masks.get(one.sop_uid)
        patient = pseudonym(key, "patient", one.patient_id)
        hu.append(np.rint(resample(hu_YX, one, centre, fill=AIR_HU)).astype(np.int16))
        empty = np.zeros(hu_YX.shape, np.uint8)
        resampled.append(resample(empty if mask_YX is None else mask_YX, one, centre, fill=0) > 0.5)
        rows.append(
            {
                "patient": patient,
                "series": pseudonym(key, "series", series.uid),
                "z_mm": f"{one.height_mm:.2f}",
                "spacing_mm": f"{series.spacing_mm:.2f}",
                "label": labels.get(one.sop_uid, ""),
                "has_mask": "0" if mask_YX is None else "1",
                "split": splits[patient],
                "flags": "head-cut" if touches_edge(hu[-1]) else "",
            }
        )
    shape = (len(rows), SIDE_PX, SIDE_PX)
    return _Ingested(np.array(hu).reshape(shape), np.array(resampled, np.uint8).reshape(shape), rows, faults)


def _watched(results: Iterator[_Ingested], total: int, progress: Callable[[int, int], None]) -> Iterator[_Ingested]:
    """Pass results on and say how many."""
    for number, result in enumerate(results, start=1):
        progress(number, total)
        yield result


def _write_arrays(folder: Path, parts: Iterator[_Ingested], most: int) -> tuple[list[dict[str, str]], list[Fault]]:
    """Stream series into the two arrays; memory holds one series at a time."""
    shape = (most, SIDE_PX, SIDE_PX)
    hu = np.lib.format.open_memmap(folder / "slices.npy", mode="w+", dtype=np.int16, shape=shape)
    masks = np.lib.format.open_memmap(folder / "masks.npy", mode="w+", dtype=np.uint8, shape=shape)
    rows: list[dict[str, str]] = []
    faults: list[Fault] = []
    for part in parts:
        stretch = slice(len(rows), len(rows) + len(part.rows))
        hu[stretch], masks[stretch] = part.hu, part.masks
        rows += part.rows
        faults += part.faults
    for array, name in ((hu, "slices.npy"), (masks, "masks.npy")):
        array.flush()
        if len(rows) < most:  # some slices could not be read
            shorter = np.lib.format.open_memmap(
                folder / f"{name}.cut", mode="w+", dtype=array.dtype, shape=(len(rows), SIDE_PX, SIDE_PX)
            )
            shorter[:] = array[: len(rows)]
            shorter.flush()
            os.replace(folder / f"{name}.cut", folder / name)
    return rows, faults


def _write_index(folder: Path, rows: list[dict[str, str]], report: IngestReport, manifest: str) -> None:
    """index.csv and cache.json; the latter last, as its presence says that the cache is whole."""
    with open(folder / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    counts = {key: value for key, value in asdict(report).items() if key not in ("faults", "unchanged")}
    head = {"format": FORMAT_VERSION, "manifest": manifest, "faults": len(report.faults), **counts}
    (folder / "cache.json").write_text(json.dumps(head, indent=2) + "\n")


def _manifest(site: Site) -> str:
    """Hash of what the cache is made from: files by path, size and time, the role and this reader's settings."""
    digest = hashlib.sha256()
    settings = {
        "format": FORMAT_VERSION,
        "split": SPLIT_SHARES,
        "role": site.role,
        "key": pseudonym(site.key(), "key", ""),
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    files = [
        *find_files(site.images),
        *(find_files(site.masks) if site.masks else ()),
        *([site.labels] if site.labels else ()),
    ]
    for path in files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _current_report(site: Site, manifest: str) -> IngestReport | None:
    """The report of the cache that is there, if it is whole and made from the same files."""
    head_file = site.cache / "cache.json"
    if not head_file.is_file():
        return None
    try:
        head = json.loads(head_file.read_text())
        if head.get("manifest") != manifest or head.get("faults"):
            return None
        read_cache(site.cache)
    except ValueError:  # a damaged cache is written anew
        return None
    counts = {key: head[key] for key in ("slices", "patients", "series", "positives", "unlabelled", "masked")}
    return IngestReport(**counts, faults=(), unchanged=True)


def _reasons(faults: tuple[Fault, ...] | list[Fault]) -> str:
    """The three commonest reasons, for an error's text."""
    reasons = [fault.reason for fault in faults]
    common = sorted(set(reasons), key=reasons.count, reverse=True)[:3]
    return "".join(f"; {reasons.count(reason)}x {reason}" for reason in common)
