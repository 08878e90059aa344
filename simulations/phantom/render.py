"""A hospital's slice: a patient in its scanner, and what its reader says of it.

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from simulations.heads.scan import Patient, Scanned, marker_label, scan_slice
from simulations.heads.scanner import Scanner
from simulations.heads.template import load_template
from simulations.phantom.patient import FEATURES, Case, Cohort

DRAWING = 10  # raised with every change of a drawn slice; results stored with another number are not used


def with_feature(case: Case, scanner: Scanner) -> tuple[Patient, Scanner]:
    """Patient and scanner with what a planted feature changes in the head or in how it is scanned."""
    on, patient = case.feature_on, case.patient
    match case.feature:
        case "":
            return patient, scanner
        case "skull":
            skull_mm = (8.4 if on else 4.8) + 0.2 * (patient.head.skull_mm - 5.9)
            return replace(patient, head=replace(patient.head, skull_mm=skull_mm)), scanner
        case "holder":
            return patient, replace(scanner, holder_hu=600.0 if on else 60.0)
        case "corner":
            return patient, replace(scanner, corner_hu=300.0 if on else 0.0)
        case "field-of-view":
            return patient, replace(scanner, field_of_view_mm=250.0 if on else 215.0)
    raise ValueError(f"planted feature {case.feature!r}, expected one of {', '.join(FEATURES)}")


@dataclass(frozen=True)
class Slice:
    """One rendered slice with its reader's mask and label.

    Attributes:
      hu_YX: int16 (512, 512).
      hematoma_YX: bool (512, 512), every bleeding with its hypodensities, as the reader outlines it; empty where there is
        none.
      hypodensity_mm2: area of the marker in this slice.
      disputed: the reader says of the marker what most others would not.
    """

    hu_YX: NDArray[np.int16]
    hematoma_YX: NDArray[np.bool_]
    hypodensity_mm2: float
    disputed: bool = False

    @property
    def label(self) -> int | None:
        """1 with the marker, 0 without; None where a reader could not tell or there is no hematoma."""
        label = marker_label(bool(self.hematoma_YX.any()), self.hypodensity_mm2)
        return None if label is None else int(bool(label) != self.disputed)


def render_slice(
    patient: Patient, scanner: Scanner, z_mm: float, rng: np.random.Generator, cohort: Cohort | None = None
) -> Slice:
    """One slice at height z of the scanner's table.

    Args:
      patient, scanner: as with_feature returns them.
      z_mm: position of the slice's centre.
      rng: the slice's noise, and the reader's mood.
      cohort: says how the reader works; exactly without one.
    """
    scanned = scan_slice(patient, load_template(), scanner, z_mm, rng)
    cohort = cohort or Cohort()
    disputed = bool(rng.spawn(1)[0].random() < cohort.disagreement)
    step_mm = scanner.field_of_view_mm / scanned.hu_YX.shape[0]
    return Slice(scanned.hu_YX, outlined(scanned, cohort.style, step_mm), scanned.hypodensity_mm2, disputed)


def outlined(scanned: Scanned, style: str, step_mm: float) -> NDArray[np.bool_]:
    """A mask in a reader's style: as it is, half a mm inside, one mm outside, or with a smooth outline.

    Two readers' outlines of one hematoma overlap with a Dice of .85 to .95.
    """
    blood_YX = scanned.blood_YX
    if style == "exact" or not blood_YX.any():
        return blood_YX
    if style == "smoothed":
        return ndimage.gaussian_filter(blood_YX.astype(np.float32), 1.5 / step_mm) > 0.5
    away_mm = step_mm * (ndimage.distance_transform_edt(~blood_YX) - ndimage.distance_transform_edt(blood_YX))
    return away_mm < {"tight": -0.5, "generous": 1.0}[style]
