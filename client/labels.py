"""What a hospital says of its slices and patients: the label table, and the split of its patients.

The table's UIDs become keyed hashes as it is read; a line's number is what messages name. Stays in the hospital.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.dicom import Fault, pseudonym
from client.series import CtSeries
from shared.site import Site, SiteError

SPLIT_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}


class LabelError(ValueError):
    """A label table cannot be used; lists its faults and the next step."""


@dataclass(frozen=True)
class LabelRow:
    """One line of the table.

    Attributes:
      line: its number in the file.
      series: keyed hash of the series.
      instance: keyed hash of the SOP instance; "" where the table counts slices.
      index: slice from 0, from the feet up; -1 where the table names images.
      value: "1", "0" or "" for unknown.
    """

    line: int
    series: str
    instance: str
    index: int
    value: str


def read_labels(site: Site) -> list[LabelRow]:
    """The label table, a CSV with columns series_uid, sop_uid or slice_index, and hypodensity; others are ignored.

    Lines that say nothing at all are passed over: spreadsheets end with them.

    Raises:
      LabelError: no CSV table that can be read, a missing column, a value that is none of 1, 0 and blank, or a
        slice_index that is no number; all of a table's lines at once.
    """
    if site.labels is None:
        return []
    try:
        with open(site.labels, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            table = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise _closed(site.labels, error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError(
            f"{site.labels.name} is not a CSV table in UTF-8 ({type(error).__name__}); save it as one"
        ) from error
    place = next((c for c in ("sop_uid", "slice_index") if c in columns), None)
    if "series_uid" not in columns or "hypodensity" not in columns or place is None:
        raise LabelError(
            f"{site.labels.name} has {len(columns)} columns, expected series_uid, sop_uid or slice_index, and hypodensity"
        )
    key, rows, wrong = site.key(), [], []
    for line, row in table:
        uid, where, value = ((row[column] or "").strip() for column in ("series_uid", place, "hypodensity"))
        if not (uid or where or value):
            continue
        if value not in ("", "0", "1"):
            wrong.append(f"line {line}: hypodensity is neither 1, 0 nor blank")
        elif place == "slice_index" and not re.fullmatch("[0-9]{1,6}", where):
            wrong.append(f"line {line}: slice_index is no number from 0 on")
        else:
            instance = pseudonym(key, "image", where) if place == "sop_uid" else ""
            index = int(where) if place == "slice_index" else -1
            rows.append(LabelRow(line, pseudonym(key, "series", uid), instance, index, value))
    if wrong:
        raise LabelError(f"{site.labels.name} cannot be read:\n  {_some(wrong)}\ncorrect these lines")
    return rows


def table_digest(site: Site) -> str:
    """Hash of the label table's content; "" without one.

    Raises:
      LabelError: it cannot be opened.
    """
    if site.labels is None:
        return ""
    try:
        return hashlib.sha256(site.labels.read_bytes()).hexdigest()
    except OSError as error:
        raise _closed(site.labels, error) from error


def _closed(table: Path, error: OSError) -> LabelError:
    """What to say of a table that cannot be opened."""
    return LabelError(
        f"{table.name} cannot be opened ({error.strerror}); give permission to read it, or correct data.labels"
    )


def match_labels(
    rows: Sequence[LabelRow], series: Sequence[CtSeries], table: str
) -> tuple[dict[str, str], list[Fault]]:
    """Which label belongs to which image.

    Args:
      rows: of the table.
      series: those that were taken.
      table: the table's name, for messages.
    Returns:
      Image name -> "1", "0" or ""; and the lines that belong to no image, but for blank ones, which say nothing.
    Raises:
      LabelError: two lines give one slice different labels, or there are images and no line belongs to any.
    """
    by_name = {one.name: one for one in series}
    instances = {one.name: {s.instance: s for s in one.slices} for one in series}
    counted: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        counted[row.series].add(row.index)
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    faults, wrong = [], []
    for row in rows:
        what = f"{table} line {row.line}"
        one = by_name.get(row.series)
        if one is None:
            faults += [Fault(what, "its series is not in data.images, or was left out")] if row.value else []
            continue
        if row.instance:
            image = instances[one.name].get(row.instance)
            reason = "its sop_uid is no image of its series, or was left out"
            if image is not None and image.frames > 1:
                image, reason = None, "its sop_uid is a multi-frame file; give slice_index instead"
        elif counted[one.name] == set(range(len(one.slices))):
            image = one.slices[row.index]
        else:  # with an image missing, every later count would mean its neighbour
            image = None
            reason = (
                f"slice_index counts {len(counted[one.name])} slices up to {max(counted[one.name])}, its series has "
                f"{len(one.slices)} usable ones; give every slice a line, or name images by sop_uid"
            )
        if image is None:
            faults += [Fault(what, reason)] if row.value else []
        elif labels.setdefault(image.image, row.value) != row.value:
            wrong.append(f"lines {lines[image.image]} and {row.line}: different labels for one slice")
        lines.setdefault(image.image if image else "", row.line)
    if wrong:
        raise LabelError(f"{table} contradicts itself:\n  {_some(wrong)}\ncorrect these lines")
    if rows and series and not labels:
        first = faults[0].reason if faults else "and all are blank"
        raise LabelError(f"{table}: none of {len(rows)} lines belongs to an image in data.images ({first})")
    return labels, faults


def _some(lines: list[str]) -> str:
    """The first ten, and how many more."""
    return "\n  ".join(lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else []))


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


def splits_of(site: Site, patients: Iterable[str], keep: bool = True) -> dict[str, str]:
    """Splits of a training hospital's patients, kept in its state folder; another role's patients are all test.

    Args:
      site: whose.
      patients: hashes.
      keep: whether new patients' splits are written down.
    Raises:
      SiteError: the splits written down cannot be read; without them, who was trained on could be tested on.
    """
    if site.role != "train":
        return dict.fromkeys(patients, "test")
    path = site.state / "splits.json"
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        damaged = not isinstance(known, dict) or not SPLIT_SHARES.keys() >= set(known.values())
    except (OSError, ValueError, TypeError):
        damaged = True
    if damaged:
        raise SiteError(
            f"site {site.name!r}: {path} is damaged; it says which patients are tested on: restore it from a backup"
        )
    splits = assign_splits(patients, known)
    if keep and splits != known:
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(splits, indent=1))
        os.replace(partial, path)
    return splits


def annotated_series(rows: Iterable[LabelRow], masks: Mapping[str, object]) -> dict[str, str]:
    """Series name -> "labels", "masks" or "labels and masks", for those that somebody labelled or drew on."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.value:
            found[row.series].add("labels")
    for name in masks:
        found[name].add("masks")
    return {name: " and ".join(sorted(kinds)) for name, kinds in found.items()}
