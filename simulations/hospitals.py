"""The eleven hospitals, one small declaration each: who comes, what scans them, how the files are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulations.patient import Cohort
from simulations.phantom import Scanner


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
# slices; thin slices; miscalibrated and old patients; another field of view and prevalence; tilt and pose; smooth kernel.
HOSPITALS = (
    _trains(1, "Northlight", "explicit", {}, {}),
    _trains(
        2,
        "Meridian",
        "rle",
        {
            "field_of_view_mm": 245,
            "noise_hu": 3.4,
            "noise_peak_per_mm": 0.26,
            "blur_mm": 0.55,
            "offset_hu": 2,
            "holder_hu": 300,
        },
        {"atrophy": 1.3, "prevalence": 0.45},
    ),
    _trains(
        3,
        "Meridian",
        "jpeg2000",
        {"noise_hu": 2.3, "blur_mm": 0.8, "cupping_hu": 9, "padding_hu": -2000, "tilt_degree": -15},
        {"prevalence": 0.55, "lesion_radius_mm": 21},
        signed=True,
    ),
    _trains(
        4,
        "Kestrel",
        "implicit",
        {"field_of_view_mm": 220, "offset_hu": -3, "noise_hu": 3.0, "holder_hu": 0},
        {"lobar": 0.6, "pose_degree": 8},
    ),
    _held_out(5, "Kestrel", "jpegls", {"noise_hu": 4.2, "noise_peak_per_mm": 0.3, "blur_mm": 0.5}, {}),
    _held_out(6, "Oldham", "explicit", {"thickness_mm": 10, "spacing_mm": 10, "noise_hu": 1.8}, {}, slices=4),
    _held_out(
        7,
        "Northlight",
        "jpeg2000",
        {"thickness_mm": 2.5, "spacing_mm": 2.5, "noise_hu": 4.4},
        {"lesion_radius_mm": 16},
        slices=8,
    ),
    _held_out(8, "Oldham", "deflated", {"offset_hu": 7, "cupping_hu": 11}, {"atrophy": 1.7}),
    _held_out(
        9,
        "Meridian",
        "rle",
        {"offset_hu": -6, "field_of_view_mm": 250, "padding_hu": -3024},
        {"prevalence": 0.6},
        signed=True,
    ),
    _held_out(10, "Kestrel", "explicit", {"tilt_degree": -22, "holder_hu": 600}, {"pose_degree": 14}),
    _held_out(
        11,
        "Aster",
        "jpeg2000",
        {"blur_mm": 0.95, "noise_peak_per_mm": 0.14, "noise_hu": 2.0},
        {"atrophy": 0.6, "lesion_radius_mm": 23, "prevalence": 0.35},
    ),
)
