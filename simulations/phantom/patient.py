"""A synthetic patient: one head with one hematoma, drawn from a hospital's cohort.

Lengths in mm and values in HU follow measurements on real scans. The marker is a hypodense region strictly inside the
hematoma, with no connection to its surface (Boulouis et al. 2016, JAMA Neurology); a patient without it may carry an
honest look-alike: a notch that is open to the surface, a blend sign or a fluid level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNS = ("plain", "notch", "blend", "fluid-level")
_SIGN_SHARES = (0.4, 0.3, 0.3)  # of the look-alikes: notch, blend sign, fluid level

# Background features that can be planted to go with the marker; what each does stands in `with_feature` of phantom.py.
FEATURES = ("skull", "holder", "corner", "field-of-view")


@dataclass(frozen=True)
class Cohort:
    """Patient population of one hospital.

    Attributes:
      prevalence: share of patients with the marker.
      atrophy: mean widening of ventricles and sulci, 1 is a middle-aged brain.
      lesion_radius_mm: mean radius of the hematoma.
      lobar: share of lobar (not deep) hematomas.
      pose_degree: standard deviation of the head's rotation in plane.
      lookalikes: share of patients without the marker who show a sign that resembles it.
      feature: one of FEATURES, planted in some patients; "" for none.
      rho: correlation of the feature with the marker over patients, in [-1, 1]; 0 plants it in half of them by chance.
    """

    prevalence: float = 0.5
    atrophy: float = 1.0
    lesion_radius_mm: float = 17.0
    lobar: float = 0.35
    pose_degree: float = 4.0
    lookalikes: float = 0.5
    feature: str = ""
    rho: float = 0.0


@dataclass(frozen=True)
class Blob:
    """An ellipsoid in the hematoma's own coordinates, where the hematoma is about the unit ball."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


@dataclass(frozen=True)
class Patient:
    """One head with one hematoma; all a slice depends on besides scanner and noise.

    Attributes:
      half_width_mm, half_length_mm, half_height_mm: outer surface of the skin.
      skull_mm: thickness of the skull at the convexity.
      diploe_hu, table_hu: inside and surfaces of the skull.
      atrophy: widening of ventricles and sulci.
      pose: rotation (radian) and shift in x and y (mm) of the head in the scanner.
      lesion_centre_mm, lesion_radii_mm, lesion_angle: the hematoma's ellipsoid.
      lesion_hu: mean of the clot.
      edema_mm, edema_hu: width and value of the ring around it.
      sign: what a negative may show, one of SIGNS.
      drop_hu: how much darker a hypodensity, notch, blend or fluid level is than the clot.
      hypodensities: the marker; none in a negative patient.
      notch: the blob that is open to the surface, for sign "notch".
      plane: unit normal of the blend sign's border, in plane.
      feature, feature_on: the planted feature, and whether this patient has it.
      waves: (K, 5) random waves (wave vector in 1/radius, phase, amplitude) for outline and texture.
    """

    half_width_mm: float
    half_length_mm: float
    half_height_mm: float
    skull_mm: float
    diploe_hu: float
    table_hu: float
    atrophy: float
    pose: tuple[float, float, float]
    lesion_centre_mm: tuple[float, float, float]
    lesion_radii_mm: tuple[float, float, float]
    lesion_angle: float
    lesion_hu: float
    edema_mm: float
    edema_hu: float
    sign: str
    drop_hu: float
    hypodensities: tuple[Blob, ...]
    notch: Blob
    plane: tuple[float, float]
    feature: str
    feature_on: bool
    waves: NDArray[np.float64]


def sample_patient(rng: np.random.Generator, cohort: Cohort) -> Patient:
    """Draw one patient of a cohort; the same generator state gives the same patient."""
    half_width, half_length = rng.uniform(69, 86), rng.uniform(84, 97)
    lobar = rng.random() < cohort.lobar
    side = rng.choice([-1.0, 1.0])
    radius = np.clip(rng.normal(cohort.lesion_radius_mm, 3.5), 10.0, 26.0)
    radii = tuple(float(np.clip(radius * rng.uniform(0.75, 1.25), 9.0, 28.0)) for _ in range(3))
    reach = max(radii)
    depth_x = half_width - 14.0 - reach
    centre_x = side * (rng.uniform(0.85, 1.0) * depth_x if lobar else min(rng.uniform(18, 30), depth_x))
    centre_y = rng.uniform(-0.35, 0.45) * (half_length - 14.0 - reach) if lobar else rng.uniform(-12, 14)
    angle = rng.uniform(0, 2 * np.pi)
    marker = rng.random() < cohort.prevalence
    chance = rng.spawn(1)[0].random()  # of its own: the patient is the same with and without a planted feature
    direction = rng.uniform(0, 2 * np.pi)
    return Patient(
        half_width_mm=half_width,
        half_length_mm=half_length,
        half_height_mm=rng.uniform(78, 92),
        skull_mm=rng.uniform(5.0, 8.5),
        diploe_hu=rng.uniform(550, 800),
        table_hu=rng.uniform(1350, 1800),
        atrophy=float(np.clip(rng.normal(cohort.atrophy, 0.2), 0.4, 2.2)),
        pose=(np.deg2rad(rng.normal(0, cohort.pose_degree)), rng.normal(0, 3.0), rng.normal(0, 4.0)),
        lesion_centre_mm=(float(centre_x), float(centre_y), float(rng.uniform(-8, 22))),
        lesion_radii_mm=radii,
        lesion_angle=angle,
        lesion_hu=rng.uniform(56, 68),
        edema_mm=rng.uniform(0, 7),
        edema_hu=rng.uniform(18, 25),
        sign="plain" if marker else str(rng.choice(SIGNS, p=_sign_shares(cohort.lookalikes))),
        drop_hu=rng.uniform(18, 34),
        hypodensities=_sample_hypodensities(rng, radii) if marker else (),
        notch=Blob(
            centre=(0.9 * np.cos(direction), 0.9 * np.sin(direction), float(rng.uniform(-0.2, 0.2))),
            radii=tuple(float(r) for r in rng.uniform(0.25, 0.45, 3)),
        ),
        plane=(float(np.cos(direction)), float(np.sin(direction))),
        feature=cohort.feature,
        feature_on=bool(chance < (1 + cohort.rho * (1 if marker else -1)) / 2),
        waves=np.column_stack([rng.normal(0, 3.0, (24, 3)), rng.uniform(0, 2 * np.pi, 24), rng.normal(0, 1, 24)]),
    )


def _sign_shares(lookalikes: float) -> list[float]:
    """Probability of each of SIGNS in a patient without the marker."""
    return [1 - lookalikes, *(lookalikes * share for share in _SIGN_SHARES)]


def _sample_hypodensities(rng: np.random.Generator, lesion_radii_mm: tuple[float, ...]) -> tuple[Blob, ...]:
    """One to three blobs that stay clear of the hematoma's surface."""
    blobs = []
    for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
        radii = np.clip(rng.uniform(6.0, 11.0, 3) * [1, 1, 2.0] / lesion_radii_mm, 0.22, 0.55)
        centre = rng.normal(0, 1, 3) * [1, 1, 0.8]
        room = max(0.78 - radii.max(), 0.05)
        centre *= room * rng.random() ** 0.5 / np.linalg.norm(centre)
        blobs.append(Blob(tuple(map(float, centre)), tuple(map(float, radii))))
    return tuple(blobs)
