"""Consortia: declared groups of hospitals that a study trains on and tests.

The eleven hospitals differ in everything at once, as real ones do. The other consortia change one thing: a single cause of
shift, a planted background feature, the patients' age, the scanning protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from simulations.heads.scanner import Scanner
from simulations.phantom.hospitals import HOSPITALS, Hospital
from simulations.phantom.patient import FEATURES, Cohort

TRAINING = tuple(h for h in HOSPITALS if h.role == "train")
HELD_OUT = tuple(h for h in HOSPITALS if h.role == "held-out")
_SIZED = "hospitals of "
TRAINING_RHO = 0.9  # how strongly a planted feature goes with the marker where models train


@dataclass(frozen=True)
class Consortium:
    """A study's hospitals.

    Attributes:
      training: whose training split is trained on, and whose test split is the group "seen".
      tests: group -> hospitals, all of whose patients are tested on.
    """

    training: tuple[Hospital, ...]
    tests: dict[str, tuple[Hospital, ...]]


# One hospital inside of what the training hospitals cover, and what is changed in it, one at a time. It scans the same
# patients each time, except where the patients are what changes.
_REFERENCE = Hospital(21, "held-out", 24, Scanner(), Cohort(disagreement=0.0), "Northlight")
DEVELOPMENT = replace(_REFERENCE, number=20, role="development")  # what a probe is fitted on; never tested
CAUSES: dict[str, tuple[dict, dict]] = {
    "reference": ({}, {}),
    "dose /2.5": ({"dose": 0.4}, {}),
    "kernel smooth": ({"sharpness": -1.4}, {}),
    "kernel sharp": ({"sharpness": 1.4}, {}),
    "thickness 2.5 mm": ({"thickness_mm": 2.5}, {}),
    "thickness 10 mm": ({"thickness_mm": 10.0}, {}),
    "calibration -7 HU": ({"offset_hu": -7.0}, {}),
    "calibration +7 HU": ({"offset_hu": 7.0}, {}),
    "cupping 14 HU": ({"cupping_hu": 14.0}, {}),
    "field of view 250 mm": ({"field_of_view_mm": 250.0}, {}),
    "tilt -22 degrees": ({"tilt_degree": -22.0}, {}),
    "holder 600 HU": ({"holder_hu": 600.0}, {}),
    "pose 16 degrees": ({}, {"pose_degree": 16.0}),
    "grey to white 1.2": ({"contrast": 1.2}, {}),
    "helical": ({"helical": True}, {}),
    "petrous band 14 HU": ({"petrous_hu": 14.0}, {}),
    "age 1.9": ({}, {"age": 1.9}),
    "age .3": ({}, {"age": 0.3}),
    "lesions of 10 mm": ({}, {"lesion_radius_mm": 10.0}),
    "bleedings elsewhere .5": ({}, {"others": 0.5}),
    "masks tight": ({}, {"style": "tight"}),
    "masks generous": ({}, {"style": "generous"}),
    "labels disputed .1": ({}, {"disagreement": 0.1}),
    "lobar lesions": ({}, {"lobar": 1.0}),
    "prevalence .25": ({}, {"prevalence": 0.25}),
    "look-alikes .9": ({}, {"lookalikes": 0.9}),
}


def _changed(hospital: Hospital, scanner: dict, cohort: dict) -> Hospital:
    return replace(hospital, scanner=replace(hospital.scanner, **scanner), cohort=replace(hospital.cohort, **cohort))


def _planted(feature: str) -> Consortium:
    """A background feature that goes with the marker where models train, and does not, or the other way round, elsewhere."""

    def plant(hospitals: tuple[Hospital, ...], rho: float) -> tuple[Hospital, ...]:
        return tuple(_changed(h, {}, {"feature": feature, "rho": rho}) for h in hospitals)

    return Consortium(
        training=plant(TRAINING, TRAINING_RHO),
        tests={"rho 0": plant(HELD_OUT, 0.0), "rho -0.9": plant(HELD_OUT, -TRAINING_RHO)},
    )


def _groups(numbers: range, role: str, patients: int, scanner: tuple[dict, ...], cohort: tuple[dict, ...]) -> tuple:
    """Hospitals that differ from the reference in what is given for each."""
    return tuple(
        replace(_changed(_REFERENCE, s, c), number=number, role=role, patients=patients)
        for number, s, c in zip(numbers, scanner, cohort, strict=True)
    )


def _ages() -> Consortium:
    """Groups of age on one scanner: the middle-aged train, the young and the old are unseen."""
    same = ({},) * 4
    return Consortium(
        training=_groups(range(31, 35), "train", 72, same, tuple({"age": a} for a in (0.9, 1.0, 1.1, 1.2))),
        tests={
            "young": _groups(range(35, 37), "held-out", 40, same[:2], tuple({"age": a} for a in (0.1, 0.3))),
            "old": _groups(range(37, 39), "held-out", 40, same[:2], tuple({"age": a} for a in (1.7, 1.9))),
        },
    )


def _protocols() -> Consortium:
    """Groups of scanning protocol on the same kind of patients: routine protocols train, others are unseen."""
    same = ({},) * 4
    routine = ({}, {"sharpness": 0.3}, {"sharpness": -0.3}, {"dose": 1.2})
    low_dose = ({"dose": 0.45}, {"dose": 0.45, "sharpness": 0.5})
    thick = ({"thickness_mm": 10.0, "spacing_mm": 10.0}, {"thickness_mm": 10.0, "spacing_mm": 10.0, "sharpness": -0.5})
    thin = ({"thickness_mm": 2.5, "spacing_mm": 2.5}, {"thickness_mm": 2.5, "spacing_mm": 2.5, "sharpness": 0.5})
    return Consortium(
        training=_groups(range(41, 45), "train", 72, routine, same),
        tests={
            "low dose": _groups(range(45, 47), "held-out", 40, low_dose, same[:2]),
            "10 mm": _groups(range(47, 49), "held-out", 40, thick, same[:2]),
            "2.5 mm": _groups(range(49, 51), "held-out", 40, thin, same[:2]),
        },
    )


def consortium(name: str) -> Consortium:
    """A study's hospitals by name.

    Args:
      name: "hospitals", "hospitals of N" with N patients each where models train, "causes", "ages", "protocols" or "planted FEATURE" with one of FEATURES.
    Raises:
      KeyError: no such consortium.
    """
    if name == "hospitals":
        return Consortium(TRAINING, {"unseen": HELD_OUT})
    if name.startswith(_SIZED) and name.removeprefix(_SIZED).isdigit():
        patients = int(name.removeprefix(_SIZED))
        return Consortium(tuple(replace(h, patients=patients) for h in TRAINING), {"unseen": HELD_OUT})
    if name == "causes":
        causes = {cause: (_changed(_REFERENCE, *change),) for cause, change in CAUSES.items()}
        return Consortium(TRAINING, {"unseen": HELD_OUT} | causes)
    if name == "ages":
        return _ages()
    if name == "protocols":
        return _protocols()
    if name.startswith("planted ") and name.removeprefix("planted ") in FEATURES:
        return _planted(name.removeprefix("planted "))
    raise KeyError(name)
