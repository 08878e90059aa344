"""Where bleedings are and how large, drawn at random.

Places are MNI152 coordinates (x right, y front, z up) in mm.
"""

from __future__ import annotations

import numpy as np

from simulations.heads.bleeding import BRAIN_MM, HULL_MM, Bleeding, Sign
from simulations.heads.fields import random_field

Triple = tuple[float, float, float]


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
