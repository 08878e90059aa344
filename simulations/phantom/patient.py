"""A synthetic patient: one head with its bleedings, or none, drawn from a hospital's cohort.

The marker is a hypodense region strictly inside a hematoma of the brain, with no connection to its surface (Boulouis et
al. 2016, JAMA Neurology); a hematoma without it may carry an honest look-alike: a notch that is open to the surface, a
blend sign or a fluid level. Other bleedings have no marker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from simulations.heads.anatomy import to_scanner
from simulations.heads.bleeding import INTRACEREBRAL, Bleeding
from simulations.heads.head import sample_head
from simulations.heads.places import sample_bleeding, sample_sign
from simulations.heads.scan import Patient

OTHERS = ("subdural", "epidural", "subarachnoid", "intraventricular", "contusion")
_OTHER_SHARES = (0.4, 0.15, 0.25, 0.05, 0.15)
_INTO_VENTRICLES = 0.3  # of deep hematomas that break through

# Background features that can be planted to go with the marker; what each does stands in `with_feature` of render.py.
FEATURES = ("skull", "holder", "corner", "field-of-view")
STYLES = ("exact", "tight", "generous", "smoothed")


@dataclass(frozen=True)
class Cohort:
    """Patient population of one hospital, and how its reader works.

    Attributes:
      healthy: share of patients without any bleeding.
      others: share of the bleeding ones who bleed elsewhere than into the brain, one of OTHERS.
      prevalence: share of patients with a hematoma of the brain who have the marker.
      age: mean, 0 (young) to 2 (old): ventricles and sulci widen, the white matter darkens.
      lesion_radius_mm: mean radius of a hematoma.
      lobar: share of lobar hematomas; the rest are deep.
      infratentorial: share of hematomas of the cerebellum and the brainstem.
      pose_degree: standard deviation of the head's rotation in plane.
      lookalikes: share of hematomas without the marker that show a sign that resembles it.
      style: how the reader outlines, one of STYLES.
      disagreement: share of labelled slices that another reader would have labelled otherwise; they are labelled so.
      feature: one of FEATURES, planted in some patients; "" for none.
      rho: correlation of the feature with the marker over patients, in [-1, 1]; 0 plants it in half of them by chance.
    """

    healthy: float = 0.25
    others: float = 0.15
    prevalence: float = 0.34
    age: float = 1.2
    lesion_radius_mm: float = 14.0
    lobar: float = 0.4
    infratentorial: float = 0.1
    pose_degree: float = 4.0
    lookalikes: float = 0.5
    style: str = "exact"
    disagreement: float = 0.03
    feature: str = ""
    rho: float = 0.0


@dataclass(frozen=True)
class Case:
    """A patient of a cohort.

    Attributes:
      patient: head and bleedings.
      feature, feature_on: the planted feature, and whether this patient has it.
    """

    patient: Patient
    feature: str = ""
    feature_on: bool = False

    @property
    def hematoma(self) -> Bleeding | None:
        """The hematoma of the brain, None without one."""
        return next((one for one in self.patient.bleedings if one.kind in INTRACEREBRAL), None)

    @property
    def marker(self) -> bool:
        """Whether it holds the marker."""
        return self.hematoma is not None and self.hematoma.sign.name == "hypodensity"

    def lesion_centre_mm(self) -> tuple[float, float, float]:
        """Centre of the hematoma in the scanner: x, y, z."""
        if self.hematoma is None:
            raise ValueError("this patient has no hematoma of the brain")
        return to_scanner(self.patient.head, self.hematoma.centre)


def sample_case(rng: np.random.Generator, cohort: Cohort) -> Case:
    """Draw one patient of a cohort; the same generator state gives the same patient."""
    chance = rng.spawn(1)[0].random()  # of its own: the patient is the same with and without a planted feature
    head = sample_head(rng, float(np.clip(rng.normal(cohort.age, 0.4), 0, 2)), cohort.pose_degree)
    bleedings: tuple[Bleeding, ...] = ()
    if rng.random() >= cohort.healthy:
        bleedings = _sample_bleedings(rng, cohort)
    marker = any(one.sign.name == "hypodensity" for one in bleedings)
    on = bool(chance < (1 + cohort.rho * (1 if marker else -1)) / 2)
    return Case(Patient(head, bleedings), cohort.feature, on)


def _sample_bleedings(rng: np.random.Generator, cohort: Cohort) -> tuple[Bleeding, ...]:
    """What one patient bled."""
    radius = float(np.clip(rng.normal(cohort.lesion_radius_mm, 3.5), 7.0, 26.0))
    if rng.random() < cohort.others:
        return (sample_bleeding(rng, str(rng.choice(OTHERS, p=_OTHER_SHARES)), radius),)
    below = cohort.infratentorial
    shares = [(1 - below) * (1 - cohort.lobar), (1 - below) * cohort.lobar, below * 2 / 3, below / 3]
    kind = str(rng.choice(INTRACEREBRAL, p=shares))
    clot = sample_bleeding(rng, kind, radius)
    clot = replace(clot, sign=sample_sign(rng, clot.radii, cohort.prevalence, cohort.lookalikes))
    if kind == "deep" and rng.random() < _INTO_VENTRICLES:
        return clot, sample_bleeding(rng, "intraventricular")
    return (clot,)
