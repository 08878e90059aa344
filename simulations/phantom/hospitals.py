"""The eleven hospitals, one small declaration each: who comes, what scans them, how the files are written.

They differ in what published scanners and cohorts differ in, and were chosen before any result was looked at:

- marker: 28 % and 40 % of two cohorts, two readers agree with a kappa of .87, which is 3 % of labels turned (Boulouis et
  al. 2016, JAMA Neurology); the readers here are as sure, those of hospitals 3 and 9 half as sure.
- place: 44 % of 3,930 supratentorial hematomas were lobar (Jackson and Sudlow 2006, JNNP); where high blood pressure is the
  common cause fewer are, among the old more.
- calibration: the American College of Radiology accepts water at -7 to 7 HU (CT accreditation, phantom 464).
- noise, kernel, thickness, field of view, tilt, size of hematomas: the measured ranges in simulations/README.md.
- contrast of grey to white matter grows as the tube's voltage falls; 100 kV against 120 kV is taken as a sixth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulations.heads.scanner import Scanner
from simulations.phantom.patient import Cohort

MIDDLE_MM = 6.0  # of a series, from the centre of the head
TRAINED, TESTED = 36, 14  # patients of a hospital that trains, and of one that is held out


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
      slices: per series, from the skull's base towards the vertex.
      signed: stored as signed HU with intercept 0, not as unsigned with -1024.
    """

    number: int
    role: str
    patients: int
    scanner: Scanner
    cohort: Cohort
    maker: str
    transfer_syntax: str = "explicit"
    slices: int = 20
    signed: bool = False

    @property
    def name(self) -> str:
        """Folder and site name, such as hospital-03."""
        return f"hospital-{self.number:02d}"

    def height_mm(self, index: int) -> float:
        """Position on the table of a series' slice, from the centre of the head; index 0 is nearest to the feet."""
        return MIDDLE_MM + (index - (self.slices - 1) / 2) * self.scanner.spacing_mm


_SCANNER, _COHORT = Scanner(), Cohort()


def _trains(number: int, maker: str, syntax: str, scanner: dict, cohort: dict, **other) -> Hospital:
    return Hospital(
        number, "train", TRAINED, replace(_SCANNER, **scanner), replace(_COHORT, **cohort), maker, syntax, **other
    )


def _held_out(number: int, maker: str, syntax: str, scanner: dict, cohort: dict, **other) -> Hospital:
    return Hospital(
        number, "held-out", TESTED, replace(_SCANNER, **scanner), replace(_COHORT, **cohort), maker, syntax, **other
    )


# Hospitals 1 to 4 train: two makers' routine scanners at 5 mm, one at 100 kV. 5 to 11 are others: sharp and noisy; old and
# sequential at 10 mm; thin slices; off calibration and old patients; off calibration the other way, and another reader;
# tilted gantry; smooth kernel, another population.
HOSPITALS = (
    _trains(1, "Northlight", "explicit", {}, {}),
    _trains(
        2,
        "Meridian",
        "rle",
        {
            "field_of_view_mm": 245,
            "sharpness": 0.3,
            "offset_hu": 1,
            "helical": True,
            "rest": "cushion",
            "holder_hu": 300,
        },
        {"age": 1.4, "prevalence": 0.4, "style": "smoothed"},
    ),
    _trains(
        3,
        "Meridian",
        "jpeg2000",
        {"sharpness": -0.3, "cupping_hu": 7, "padding_hu": -2000, "tilt_degree": -8},
        {"prevalence": 0.4, "lesion_radius_mm": 15.5, "lobar": 0.25, "disagreement": 0.06},
        signed=True,
    ),
    _trains(
        4,
        "Kestrel",
        "implicit",
        {"field_of_view_mm": 220, "offset_hu": -1, "contrast": 1.15, "rest": "none", "helical": True},
        {"lobar": 0.55, "age": 1.6, "pose_degree": 6, "style": "generous"},
    ),
    _held_out(5, "Kestrel", "jpegls", {"dose": 0.7, "sharpness": 1.0, "helical": True}, {}),
    _held_out(
        6,
        "Oldham",
        "explicit",
        {"thickness_mm": 10, "spacing_mm": 10, "dose": 1.2, "petrous_hu": 12, "rest": "table"},
        {"prevalence": 0.28},
        slices=11,
    ),
    _held_out(
        7, "Northlight", "jpeg2000", {"thickness_mm": 2.5, "dose": 0.8, "helical": True}, {"lesion_radius_mm": 12}
    ),
    _held_out(8, "Oldham", "deflated", {"offset_hu": 6, "cupping_hu": 11}, {"age": 1.8, "lobar": 0.55}),
    _held_out(
        9,
        "Meridian",
        "rle",
        {"offset_hu": -6, "field_of_view_mm": 250, "padding_hu": -3024, "helical": True},
        {"others": 0.35, "style": "tight", "disagreement": 0.06},
        signed=True,
    ),
    _held_out(
        10,
        "Kestrel",
        "explicit",
        {"tilt_degree": -20, "holder_hu": 600},
        {"pose_degree": 12, "prevalence": 0.4},
    ),
    _held_out(
        11,
        "Aster",
        "jpeg2000",
        {"sharpness": -1.0, "dose": 1.1, "contrast": 0.9, "helical": True},
        {"age": 0.8, "lobar": 0.2, "lesion_radius_mm": 16, "prevalence": 0.4, "lookalikes": 0.7},
    ),
)
