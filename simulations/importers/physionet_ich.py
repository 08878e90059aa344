"""PhysioNet CT-ICH 1.3.1: 75 head CT scans after trauma with slice labels and masks, one hospital.

Layout: ct_scans/049.nii and masks/049.nii to 130.nii, without 059 to 065; int16 HU, 5 mm slices, the third axis from
the feet up. hemorrhage_diagnosis_raw_ct.csv has a row per slice: PatientNumber, SliceNumber (from 1, so that slice n is
layer n - 1 of the volume, as the set's own split_raw_data.py pairs them), Intraventricular, Intraparenchymal,
Subarachnoid, Epidural, Subdural, No_Hemorrhage and Fracture_Yes_No, 1 or 0. Masks are 0 and 255, stored with a scale
that misses the whole numbers ("rounding is needed", split_raw_data.py); they are rounded and written as 0 and 1.
Patient_demographics.csv holds age, sex and patient-level labels and is not read. Faces were blurred by the publisher.

All scans come from Al Hilla Teaching Hospital, Iraq, February to August 2018. Versions 1.0 to 1.2 publish windowed
JPEG, which holds no HU, and cannot be imported.

Source: Hssayeni et al. 2020, Data 5(1):14 (arXiv:1910.08643); physionet.org/content/ct-ich/1.3.1,
doi:10.13026/4nae-zg36, its Read_me.txt and split_raw_data.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulations.importers.hospital import CLASSES
from simulations.importers.scans import Reading, Scan, import_scans, list_volumes
from simulations.importers.source import DataSet, LeftOut, find_root, read_table

SET = DataSet(
    name="physionet-ich",
    title="Computed Tomography Images for Intracranial Hemorrhage Detection and Segmentation 1.3.1 (Hssayeni et al. 2020)",
    page="https://physionet.org/content/ct-ich/1.3.1/",
    terms="PhysioNet Restricted Health Data License 1.5.0: only for whoever signed its use agreement, not to be shared",
)
COLUMNS = (*CLASSES, "fracture")
_TABLE, _IMAGES, _MASKS = "hemorrhage_diagnosis_raw_ct.csv", "ct_scans", "masks"
_TYPES = ("Epidural", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")  # in the order of CLASSES
_NONE, _FRACTURE = "No_Hemorrhage", "Fracture_Yes_No"

Diagnoses = dict[tuple[str, int], dict[str, str]]


def import_physionet_ich(source: Path, target: Path, progress: Callable[[int, int], None]) -> list[Path]:
    """One hospital, `physionet-ich`, with the volumes as DICOM.

    Args:
      source: the unpacked set, version 1.3.1.
      target: where the hospital's folder is written.
      progress: called with scans done and scans in all.
    Returns:
      Its site.yaml.
    Raises:
      SourceError: a file, folder or column is missing, no scan can be used, or somebody else's hospital is there.
    """
    root = find_root(SET, source, target, (_TABLE, _IMAGES, _MASKS))
    left_out = LeftOut()
    diagnoses = _read_diagnoses(root / _TABLE, left_out)
    images, masks = list_volumes(root / _IMAGES, left_out), list_volumes(root / _MASKS, left_out)
    for name in sorted(masks.keys() - images.keys()):
        left_out.add(f"{_MASKS}/{masks[name].name}", f"a mask for which {_IMAGES}/ has no image")
    for number in sorted({number for number, _ in diagnoses} - images.keys()):
        left_out.add(number, f"a patient of {_TABLE} for whom {_IMAGES}/ has no image")
    scans = [Scan(name, name, path, masks.get(name)) for name, path in images.items()]

    def label(scan: Scan, mask_IJK: NDArray[np.uint8] | None, slices: int) -> list[dict[str, str]]:
        return _label(scan, slices, diagnoses, left_out)

    reading = Reading(segments=(1,), binary=True, columns=COLUMNS, label=label)
    return [import_scans(SET, target.absolute() / "physionet-ich", scans, reading, left_out, progress)]


def _read_diagnoses(path: Path, left_out: LeftOut) -> Diagnoses:
    """(patient as in file names, slice from 1) -> columns of labels.csv."""
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    contradicted = set()
    for line, (patient, number, *values) in read_table(
        path, ("PatientNumber", "SliceNumber", *_TYPES, _NONE, _FRACTURE)
    ):
        if not (_is_number(patient) and _is_number(number)):
            left_out.add(f"{_TABLE} line {line}", "PatientNumber or SliceNumber is no whole number")
            continue
        place = (f"{int(float(patient)):03d}", int(float(number)))
        if found.setdefault(place, tuple(values)) != tuple(values):
            contradicted.add(place)
    for patient, number in sorted(contradicted):
        found[patient, number] = ()
        left_out.add(f"{patient} slice {number}", f"two rows of {_TABLE} contradict each other; left blank")
    return {place: _columns(place, values, left_out) for place, values in found.items()}


def _is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 on; spreadsheets write 49 as 49.0 too."""
    head, _, tail = text.partition(".")
    return head.isascii() and head.isdecimal() and not tail.strip("0")


def _columns(place: tuple[str, int], values: tuple[str, ...], left_out: LeftOut) -> dict[str, str]:
    """A slice's labels; {} where they are unknown or contradict themselves."""
    if not values:
        return {}
    *types, none, fracture = values
    if not {*types, none, fracture} <= {"0", "1"}:
        left_out.add(f"{place[0]} slice {place[1]}", f"values in {_TABLE} that are neither 0 nor 1; left blank")
        return {}
    if ("1" in types) == (none == "1"):
        left_out.add(f"{place[0]} slice {place[1]}", f"{_NONE} contradicts the types of hemorrhage; left blank")
        return {"fracture": fracture}
    return dict(zip(COLUMNS, ("0" if none == "1" else "1", *types, fracture), strict=True))


def _label(
    scan: Scan, slices: int, diagnoses: Mapping[tuple[str, int], dict[str, str]], left_out: LeftOut
) -> list[dict[str, str]]:
    """The labels of a scan's slices; rows without slice and slices without row are counted."""
    for patient, number in sorted(place for place in diagnoses if place[0] == scan.name):
        if not 1 <= number <= slices:
            left_out.add(
                f"{patient} slice {number}",
                f"a row of {_TABLE} for a slice that the volume does not have (1 is the first)",
            )
    for number in range(1, slices + 1):
        if (scan.name, number) not in diagnoses:
            left_out.add(f"{scan.name} slice {number}", f"a slice without a row in {_TABLE}; its labels are blank")
    return [diagnoses.get((scan.name, number), {}) for number in range(1, slices + 1)]
