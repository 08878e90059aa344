"""Where bleedings are and how large, drawn at random.

Places are MNI152 coordinates (x right, y front, z up) in mm.
"""

from __future__ import annotations

import numpy as np

from simulations.heads.bleeding import BRAIN_MM, HULL_MM, Bleeding, Blob, Sign
from simulations.heads.fields import random_field

Triple = tuple[float, float, float]
SIGNS = ("plain", "notch", "blend", "fluid-level")  # of a clot without the marker
_SIGN_SHARES = (0.4, 0.3, 0.3)  # of the look-alikes: notch, blend sign, fluid level


def sample_bleeding(rng: np.random.Generator, kind: str, radius_mm: float = 17.0, sign: Sign | None = None) -> Bleeding:
    """Draw a bleeding of a kind; `radius_mm` is a clot's mean radius."""
    side = float(rng.choice([-1.0, 1.0]))
    centre, radii = _PLACES[kind](rng, side, radius_mm)
    return Bleeding(
        kind=kind,
        centre=tuple(float(c) for c in centre),
        radii=tuple(float(r) for r in radii),
        turn=float(rng.uniform(0, 2 * np.pi)),
        hu=float(rng.uniform(52, 69) if kind != "subarachnoid" else rng.uniform(42, 66)),
        rough=float(rng.uniform(0.08, 0.42) if kind != "contusion" else rng.uniform(0.3, 0.6)),
        edema_mm=float(rng.uniform(0, 8)),
        edema_hu=float(rng.uniform(17, 25)),
        push=float(rng.uniform(0.25, 0.6)),
        level=float(rng.uniform(0.1, 1.0)),
        outline=random_field(rng, 13.0, 2),
        texture=random_field(rng, 6.0, 2),
        sign=sign or Sign(),
    )


def sample_sign(rng: np.random.Generator, radii_mm: Triple, prevalence: float, lookalikes: float) -> Sign:
    """Draw what is dark inside a clot.

    Args:
      radii_mm: the clot's half axes.
      prevalence: share of clots with the marker.
      lookalikes: share of the others that show a sign which resembles it.
    """
    drop_hu = float(rng.uniform(18, 34))
    if rng.random() < prevalence:
        return Sign("hypodensity", _sample_hypodensities(rng, radii_mm), drop_hu=drop_hu)
    direction = rng.uniform(0, 2 * np.pi)
    plane = (float(np.cos(direction)), float(np.sin(direction)))
    centre = (0.9 * plane[0], 0.9 * plane[1], float(rng.uniform(-0.2, 0.2)))
    notch = Blob(centre, tuple(float(r) for r in rng.uniform(0.25, 0.45, 3)))
    return Sign(str(rng.choice(SIGNS, p=_sign_shares(lookalikes))), (notch,), plane, drop_hu)


def _sign_shares(lookalikes: float) -> list[float]:
    """Probability of each of SIGNS in a hematoma without the marker."""
    return [1 - lookalikes, *(lookalikes * share for share in _SIGN_SHARES)]


def _sample_hypodensities(rng: np.random.Generator, lesion_radii_mm: Triple) -> tuple[Blob, ...]:
    """One to three blobs that stay clear of the hematoma's surface."""
    blobs = []
    for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])):
        radii = np.clip(rng.uniform(6.0, 11.0, 3) * [1, 1, 2.0] / lesion_radii_mm, 0.22, 0.55)
        centre = rng.normal(0, 1, 3) * [1, 1, 0.8]
        room = max(0.78 - radii.max(), 0.05)
        centre *= room * rng.random() ** 0.5 / np.linalg.norm(centre)
        blobs.append(Blob(tuple(map(float, centre)), tuple(map(float, radii))))
    return tuple(blobs)


def _deep(rng: np.random.Generator, side: float, radius: float) -> tuple:
    centre = (side * rng.uniform(20, 31), rng.uniform(-24, 12), rng.uniform(-4, 18))
    return centre, radius * rng.uniform(0.6, 1.4, 3)


def _lobar(rng: np.random.Generator, side: float, radius: float) -> tuple:
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(-0.05, 0.75)
    flat = np.sqrt(1 - height**2)
    ray = np.array([abs(np.cos(azimuth)) * flat * side, np.sin(azimuth) * flat, height])
    room = np.array(HULL_MM) - 6 - radius
    return np.array(BRAIN_MM) + ray * room * rng.uniform(0.75, 1.05), radius * rng.uniform(0.7, 1.3, 3)


def _cerebellar(rng: np.random.Generator, side: float, radius: float) -> tuple:
    return (side * rng.uniform(8, 30), rng.uniform(-72, -54), rng.uniform(-48, -28)), 0.65 * radius * rng.uniform(
        0.75, 1.2, 3
    )


def _brainstem(rng: np.random.Generator, side: float, radius: float) -> tuple:
    return (rng.normal(0, 3), rng.uniform(-32, -22), rng.uniform(-38, -18)), 0.45 * radius * rng.uniform(0.75, 1.2, 3)


def _in_ventricles(rng: np.random.Generator, side: float, radius: float) -> tuple:
    return (side * rng.choice([0.0, 0.0, 1.0]), 0, 0), (1, 1, 1)


def _in_sulci(rng: np.random.Generator, side: float, radius: float) -> tuple:
    if rng.random() < 0.5:  # an aneurysm's, at the base
        return (side * rng.uniform(0, 12), rng.uniform(-10, 12), rng.uniform(-22, -10)), rng.uniform(25, 65, 3)
    centre, _ = _lobar(rng, side, 4.0)
    return centre, rng.uniform(15, 40, 3)


def _below_skull(rng: np.random.Generator, side: float, radius: float) -> tuple:
    azimuth, height = rng.normal(0, 0.5), rng.uniform(-0.1, 0.8)
    direction = (side * np.cos(azimuth), np.sin(azimuth), height)
    return direction, (rng.uniform(3, 14), rng.uniform(0.9, 1.7), rng.uniform(0.7, 1.3))


def _beneath_fracture(rng: np.random.Generator, side: float, radius: float) -> tuple:
    azimuth, height = rng.normal(0, 0.8), rng.uniform(-0.3, 0.7)
    direction = (side * np.cos(azimuth), np.sin(azimuth), height)
    return direction, (rng.uniform(6, 28), rng.uniform(0.3, 0.75), rng.uniform(0.3, 0.75))


def _bruise(rng: np.random.Generator, side: float, radius: float) -> tuple:
    places = ((22, 48, -14), (42, 10, -26), (44, -45, -14), (30, 55, 10), (50, -20, 20))
    place = np.array(places[rng.integers(len(places))]) + rng.normal(0, 6, 3)
    return place * [side, 1, 1], 0.75 * radius * rng.uniform(0.6, 1.2, 3)


_PLACES = {
    "deep": _deep,
    "lobar": _lobar,
    "cerebellar": _cerebellar,
    "brainstem": _brainstem,
    "intraventricular": _in_ventricles,
    "subarachnoid": _in_sulci,
    "subdural": _below_skull,
    "epidural": _beneath_fracture,
    "contusion": _bruise,
}
