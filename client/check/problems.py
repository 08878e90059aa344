"""Problems that would spoil training, or hide that half of a hospital's data is missing.

In: everything that a check has read. Out: sentences, each with what was found and the next step. Patients appear as keyed
hashes. Stays in the hospital.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.check.found import WHO, Found
from client.check.identities import identities, leaks
from client.dicom.faults import Fault, Kind, by_reason, commonest
from client.ingest.scan import denied_text

FEW_POSITIVES = 5  # from here on it is worth asking whether one scanner has them all
MISSED_SHARE = 0.1  # of patients, files or masks left out, from which on their absence is no detail
BARE_SHARE = 0.2  # of slices without a mask where others have one
WHOLE_HEAD_SHARE = 0.4  # of the head's pixels in a mask: no hematoma is so large
EDGE_SHARE = 0.3  # of the field's edge in tissue: a head's holder and table are less, a trunk is more
# Faults of images and series that are no cause of a hospital without data.
_BESIDE = (Kind.NOT_CHOSEN, Kind.OFF_HEAD, Kind.COPY)


def problems(found: Found, trouble: Sequence[str] = ()) -> tuple[str, ...]:
    """All problems, those that explain others first; `trouble` is what is wrong with the label table."""
    denied = denied_text(found.faults)
    causes = [line for look in (_missed, identities, _anatomy, leaks) for line in look(found)]
    effects = [line for look in (_masks, _unusable, _unmatched, _contradictions, _lopsided) for line in look(found)]
    return (*filter(None, [denied]), *causes, *trouble, *effects)


def _missed(found: Found) -> list[str]:
    """Patients and files that are left out, with the commonest reason."""
    if not found.used:
        return [f"no slice can be used: {_cause(found) or 'there are no files in data.images'}"]
    problems = []
    patients = {image.patient for image in found.survey.scan.images}
    gone = patients - {part.patient for part in found.used}
    if len(gone) > MISSED_SHARE * len(patients):
        lost = {
            one.name for one in (*found.survey.refused, *found.survey.series_found) if one.slices[0].patient in gone
        }
        reason = commonest(f for f in found.faults if f.what.removeprefix("series ") in lost)
        problems.append(
            f"{len(gone)} of {len(patients)} patients are left out with all they have: {reason or 'see below'}"
        )
    refused_files = [
        Fault(f"file {f.code}", record.fault, record.kind)
        for f, record in found.survey.scan.files
        if f.place == "images" and record.fault and record.kind is not Kind.NO_HEAD_CT
    ]
    images = sum(bool(record.images) for _, record in found.survey.scan.files)
    if len(refused_files) > MISSED_SHARE * (images + len(refused_files)):
        problems.append(
            f"{len(refused_files)} files of {images + len(refused_files)} that are no localizer or the like are left out: "
            f"{commonest(refused_files)}"
        )
    dropped = [f for f in found.faults if f.what.startswith("file ") and f.kind is Kind.OUTLIER]
    if len(dropped) > MISSED_SHARE * images:
        problems.append(f"{len(dropped)} of {images} images are left out of their series: {commonest(dropped)}")
    return problems


def _cause(found: Found) -> str:
    """The commonest reason for which images, and not labels or masks, are left out."""
    images = {f"file {f.code}" for f, _ in found.survey.scan.files if f.place == "images"}
    series = {f"series {s.name}" for s in (*found.survey.refused, *found.survey.series_found)}
    masks = {f"file {mask.file}" for mask in found.survey.scan.masks}
    return commonest(f for f in found.faults if f.what in (images | series) - masks and f.kind not in _BESIDE)


def _unusable(found: Found) -> list[str]:
    """Nothing to train or test on."""
    values = list(found.survey.labels.values())
    masked = any(row.has_mask for part in found.used for row in part.rows)
    problems = []
    if not found.used:
        return []
    if found.site.role == "train" and not any(values) and not masked:
        problems.append("neither labels nor masks: there is nothing to learn but reconstruction")
    if found.site.labels and values and not any(values):
        problems.append(
            f"{found.site.labels.name} labels no slice: hypodensity is blank on every line that belongs to one"
        )
    if any(values) and len({v for v in values if v}) == 1:
        present = "with" if "1" in values else "without"
        problems.append(f"every labelled slice is {present} the marker: a classifier needs both")
    if masked and not any(part.masks.any() for part in found.used):
        problems.append("every mask is empty: is data.segment the hematoma?")
    return problems


def _masks(found: Found) -> list[str]:
    """Masks that are left out, missing, or of something else."""
    problems = [
        f"{len(which)} files among the images are not read: {reason}"
        for reason, which in by_reason(f for f in found.faults if f.kind is Kind.AMONG_IMAGES)
        if found.used
    ]
    if found.site.masks is None or not found.used:
        return problems
    known = {f"file {f.code}" for f, record in found.survey.scan.files if f.place == "masks" or record.mask}
    taken = {f"file {tally.file}" for tally in found.tallies if tally.taken}
    lost = [f for f in found.faults if f.what in known - taken]
    if not known:
        return [*problems, "data.masks holds no file: put the masks there, or remove data.masks from site.yaml"]
    if len({f.what for f in lost}) > MISSED_SHARE * len(known):
        problems.append(f"{len({f.what for f in lost})} of {len(known)} mask files are left out: {commonest(lost)}")
    partly = [f for f in found.faults if f.what in taken and f.kind is Kind.IN_PART]
    if len(partly) > MISSED_SHARE * len(taken):
        problems.append(f"{len(partly)} of {len(taken)} mask files are taken in part: {commonest(partly)}")
    rows = [(part, row) for part in found.used for row in part.rows]
    bare = [(part, row) for part, row in rows if not row.has_mask]
    series = sorted(part.series for part in found.used if not any(row.has_mask for row in part.rows))
    positive = sum(found.survey.labels.get(row.image) == "1" for _, row in bare)
    if len(bare) > BARE_SHARE * len(rows) or positive:
        also = f", {positive} of them labelled with the marker" if positive else ""
        first = f", {len(series)} series have none (such as series {series[0]}; {WHO})" if series else ""
        problems.append(
            f"{len(bare)} of {len(rows)} slices have no mask{also}{first}: masks are missing; add them, or take the series out of data.images"
        )
    return problems


def _unmatched(found: Found) -> list[str]:
    """Labels and masks that do not belong to what was taken."""
    problems, table = [], found.site.labels
    if not found.used:
        return []  # for the reason that is named already
    labels = [fault for fault in found.faults if table and fault.what.startswith(f"{table.name} line ")]
    if labels:
        lines = by_reason(labels)[0][1]
        problems.append(f"{len(labels)} lines of {table.name} match nothing: {commonest(labels)}; first, {lines[0]}")
    off = [fault for fault in found.faults if fault.kind is Kind.OFF_HEAD]
    if off:
        problems.append(f"masks of {len(off)} series lie off the head; first, {off[0].what}: {off[0].reason}")
    return problems


def _contradictions(found: Found) -> list[str]:
    """A marker where the mask shows no hematoma."""
    wrong = 0
    for part in found.used:
        for row, area in zip(part.rows, part.masks, strict=True):
            wrong += row.has_mask and not area and found.survey.labels.get(row.image) == "1"
    return [f"{wrong} slices are labelled with the marker and have an empty mask"] if wrong else []


def _lopsided(found: Found) -> list[str]:
    """All positives from one of several scanners: a model would learn the scanner."""
    known = {name: pair for name, pair in found.labelled.items() if pair[0]}
    having = [name for name, (_, positive) in known.items() if positive]
    if len(known) > 1 and len(having) == 1 and known[having[0]][1] >= FEW_POSITIVES:
        return [
            f"all {known[having[0]][1]} positives are from one of {len(known)} scanners ({having[0]}): the scanner predicts the label"
        ]
    return []


def _anatomy(found: Found) -> list[str]:
    """Pictures that are no heads, series with contrast agent, and masks of the whole head."""
    problems = []
    large = [part.series for part in found.used if found.edges[part.series] > EDGE_SHARE]
    if 2 * len(large) > len(found.used):
        bodies = Counter(found.series[name].slices[0].body for name in large).most_common(1)[0]
        problems.append(
            f"tissue fills the edge of a field of 224 mm in {len(large)} of {len(found.used)} series (BodyPartExamined {bodies[0]} in "
            f"{bodies[1]} of them): are these heads? point data.images at head CT"
        )
    agent = [part.series for part in found.used if found.series[part.series].slices[0].contrast]
    if len(agent) > MISSED_SHARE * len(found.used):
        problems.append(
            f"{len(agent)} of {len(found.used)} series taken have a contrast agent (such as series {min(agent)}; {WHO}): the model is "
            "for scans without; export those, or take these studies out"
        )
    whole = [part.series for part in found.used if _too_large(part.masks, found.heads[part.series])]
    if whole:
        problems.append(
            f"masks of {len(whole)} series cover most of the head (such as series {min(whole)}; {WHO}): is it the mask of the brain, or "
            "inverted? name the hematoma as data.segment"
        )
    return problems


def _too_large(areas: NDArray[np.int64], heads: NDArray[np.int64]) -> bool:
    """Whether a series' masks are larger than hematomas are."""
    drawn = areas > 0
    return bool(drawn.any() and areas[drawn].sum() > WHOLE_HEAD_SHARE * heads[drawn].sum())
