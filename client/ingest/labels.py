"""Labels of images, and the split of patients.

Stays in the hospital.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from client.dicom.faults import Fault
from client.dicom.series import CtSeries
from client.ingest.label_table import LabelError, LabelRow, some
from shared.host.files import replace_text
from shared.site import Site, SiteError

SPLIT_SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}


def match_labels(
    rows: Sequence[LabelRow], series: Sequence[CtSeries], table: str, lost: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[Fault]]:
    """Match labels to images.

    Args:
      rows: of the table.
      series: those that were taken.
      table: the table's name, for messages.
      lost: name of a series that was left out -> why.
    Returns:
      Image name -> "1", "0" or ""; and the lines that belong to no image, but for blank ones, which say nothing.
    Raises:
      LabelError: two lines give one slice different labels, or there are images and no line belongs to any.
    """
    by_name = {one.name: one for one in series}
    instances = {one.name: {n: s for s in one.slices for n in (s.instance, *s.copies)} for one in series}
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
            faults += [Fault(what, _no_series(row, lost or {}))] if row.value else []
            continue
        if row.instance:
            image = instances[one.name].get(row.instance)
            reason = "its sop_uid is no image of its series, or was left out"
            if image is not None and image.frames > 1:
                image, reason = None, "its sop_uid is a multi-frame file; give slice_index instead"
        elif counted[one.name] == set(range(len(one.slices))):
            image = one.slices[row.index]
        else:
            image, reason = None, _miscounted(counted[one.name], len(one.slices))
        if image is None:
            faults += [Fault(what, reason)] if row.value else []
        elif labels.setdefault(image.image, row.value) != row.value:
            wrong.append(f"lines {lines[image.image]} and {row.line}: different labels for one slice")
        lines.setdefault(image.image if image else "", row.line)
    if wrong:
        raise LabelError(f"{table} contradicts itself:\n  {some(wrong)}\ncorrect these lines")
    if rows and series and not labels:
        reasons = Counter(fault.reason for fault in faults).most_common(1)
        common = f"{reasons[0][0]}, on {reasons[0][1]} of them" if reasons else "and all are blank"
        raise LabelError(
            f"{table}: none of {len(rows)} lines belongs to an image in data.images ({common}); is it this hospital's table, and "
            "have images the UIDs that they had when they were labelled?"
        )
    return labels, faults


def _no_series(row: LabelRow, lost: Mapping[str, str]) -> str:
    """Return why a line's series is not among those that were taken."""
    if row.series in lost:
        return f"its series was left out: {lost[row.series]}"
    return "its series is not in data.images, or its files were left out"


def _miscounted(indexes: set[int], slices: int) -> str:
    """Return why the slice numbers of a series cannot be used: with an image missing, every later number would mean its neighbour."""
    if indexes == set(range(1, slices + 1)):
        return f"slice_index counts from 1 to {slices}, expected 0 to {slices - 1} from the feet up; subtract 1 on every line"
    return (
        f"slice_index counts {len(indexes)} slices up to {max(indexes)}, its series has {slices} usable ones; give every slice a "
        "line, or name images by sop_uid"
    )


def assign_splits(patients: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Assign a split to every patient: known patients keep theirs; new ones go to the split furthest below its share.

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
        replace_text(path, json.dumps(splits, indent=1))
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
