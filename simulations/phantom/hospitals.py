"""The eleven hospitals, one small declaration each: who comes, what scans them, how the files are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulations.phantom.patient import Cohort, Patient
from simulations.phantom.render import Scanner


@dataclass(frozen=True)
class Hospital:
    """One simulated hospital.

    Attributes:
      number: 1 to 11; gives the name.
      role: train or held-out.
      patients: how many; one series each.
      scanner, cohort: what scans them, and who they are.
      maker: Manufacturer in the files.
      transfer_syntax: a key of TRANSFER_SYNTAXES.
      slices: per series, around the hematoma.
      signed: stored as signed HU with intercept 0, not as unsigned with -1024.
    """

    number: int
    role: str
    patients: int
    scanner: Scanner
    cohort: Cohort
    maker: str
    transfer_syntax: str = "explicit"
    slices: int = 6
    signed: bool = False

    @property
    def name(self) -> str:
        """Folder and site name, such as hospital-03."""
        return f"hospital-{self.number:02d}"

    def height_mm(self, patient: Patient, index: int) -> float:
        """Position on the table of a series' slice; the series lies around the hematoma."""
        return patient.lesion_centre_mm[2] + (index - (self.slices - 1) / 2) * self.scanner.spacing_mm


_SCANNER, _COHORT = Scanner(), Cohort()


def _trains(number: int, maker: str, syntax: str, scanner: dict, cohort: dict, **other) -> Hospital:
    return Hospital(
        number, "train", 72, replace(_SCANNER, **scanner), replace(_COHORT, **cohort), maker, syntax, **other
    )


def _held_out(number: int, maker: str, syntax: str, scanner: dict, cohort: dict, **other) -> Hospital:
    return Hospital(
        number, "held-out", 16, replace(_SCANNER, **scanner), replace(_COHORT, **cohort), maker, syntax, **other
    )


# Hospitals 1 to 4 train. 5 to 11 lie outside of what they cover, each for its own reason: sharp and noisy; old, thick
# slices; thin slices and small hematomas; miscalibrated and old patients; another calibration and prevalence; tilt and
# pose; smooth kernel. Where training hospitals see few look-alikes of the marker, most of the others see many.
HOSPITALS = (
    _trains(1, "Northlight", "explicit", {}, {"lookalikes": 0.3}),
    _trains(
        2,
        "Meridian",
        "rle",
        {"field_of_view_mm": 245, "sharpness": 0.2, "offset_hu": 1, "holder_hu": 300},
        {"atrophy": 1.15, "prevalence": 0.45, "lookalikes": 0.3},
    ),
    _trains(
        3,
        "Meridian",
        "jpeg2000",
        {"sharpness": -0.2, "cupping_hu": 7, "padding_hu": -2000, "tilt_degree": -8},
        {"prevalence": 0.55, "lesion_radius_mm": 19, "lookalikes": 0.3},
        signed=True,
    ),
    _trains(
        4,
        "Kestrel",
        "implicit",
        {"field_of_view_mm": 220, "offset_hu": -1, "holder_hu": 0},
        {"lobar": 0.6, "pose_degree": 8, "lookalikes": 0.3},
    ),
    _held_out(5, "Kestrel", "jpegls", {"dose": 0.8, "sharpness": 1.0}, {"lookalikes": 0.7}),
    _held_out(
        6, "Oldham", "explicit", {"thickness_mm": 10, "spacing_mm": 10, "dose": 1.2}, {"lookalikes": 0.8}, slices=4
    ),
    _held_out(
        7,
        "Northlight",
        "jpeg2000",
        {"thickness_mm": 2.5, "spacing_mm": 2.5, "dose": 0.8},
        {"lesion_radius_mm": 14, "lookalikes": 0.6},
        slices=8,
    ),
    _held_out(8, "Oldham", "deflated", {"offset_hu": 10, "cupping_hu": 12}, {"atrophy": 1.7, "lookalikes": 0.8}),
    _held_out(
        9,
        "Meridian",
        "rle",
        {"offset_hu": -10, "field_of_view_mm": 250, "padding_hu": -3024},
        {"prevalence": 0.6, "lookalikes": 0.7},
        signed=True,
    ),
    _held_out(
        10, "Kestrel", "explicit", {"tilt_degree": -22, "holder_hu": 600}, {"pose_degree": 14, "lookalikes": 0.6}
    ),
    _held_out(
        11,
        "Aster",
        "jpeg2000",
        {"sharpness": -1.0, "dose": 1.1},
        {"atrophy": 0.6, "lesion_radius_mm": 21, "prevalence": 0.35, "lookalikes": 0.8},
    ),
)
