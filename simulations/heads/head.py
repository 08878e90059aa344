"""One head: its size, age, skull and what has happened to it, drawn at random.

Places are MNI152 coordinates (x right, y front, z up) in mm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from simulations.heads.fields import Field, random_field

Place = tuple[float, float, float]


@dataclass(frozen=True)
class Head:
    """One head without any bleeding.

    Attributes:
      scale: size relative to the template, per axis of the template.
      turn: rotation about the template's axes in radian: nod, tilt to a side, turn in the axial plane.
      shift_mm: of the head in the scanner, x and y.
      warp, warp_mm: smooth displacement and its standard deviation.
      ventricles_mm: how far the ventricles' walls are moved outwards.
      sulci: how wide sulci are; 0 is the template's, -1 closed, 1 wide.
      skull_mm, scalp_mm: mean thickness.
      outer: field of skull, scalp, diploe and texture (4 channels).
      grey, white, csf: HU.
      table, diploe: HU of bone.
      rarefaction: how much darker white matter around the ventricles is, HU.
      falx, vessels: HU of membranes and of blood in vessels.
      contrast: what a contrast agent adds to blood, HU; 0 without.
      calcium: (place, radius, HU) of calcified spots.
      pneumatised: how much air is in mastoids and sinuses, about 1.
      swelling: of the scalp; direction, mm, and extent in radian; 0 mm for none.
      scars: old infarcts; (place, half axes, HU).
      drain: two points of a catheter and its HU, or None.
    """

    scale: tuple[float, float, float]
    turn: tuple[float, float, float]
    shift_mm: tuple[float, float]
    warp: Field
    warp_mm: float
    ventricles_mm: float
    sulci: float
    skull_mm: float
    scalp_mm: float
    outer: Field
    texture: Field
    grey: float
    white: float
    csf: float
    table: float
    diploe: float
    rarefaction: float
    falx: float
    vessels: float
    contrast: float
    calcium: tuple[tuple[tuple[float, float, float], float, float], ...]
    pneumatised: float
    swelling: tuple[tuple[float, float, float], float, float]
    scars: tuple[tuple[tuple[float, float, float], tuple[float, float, float], float], ...]
    drain: tuple[tuple[float, float, float], tuple[float, float, float], float] | None


def sample_head(rng: np.random.Generator, age: float, pose_degree: float = 4.0, contrast: float = 0.0) -> Head:
    """Draw a head; age from 0 (young) over 1 (middle) to 2 (old) widens ventricles and sulci."""
    size = rng.normal(0.98, 0.03)  # the template is larger than most
    scale = tuple(float(size * s) for s in rng.normal(1.0, 0.035, 3))
    calcium = []
    if rng.random() < 0.45:
        calcium.append(
            (
                (rng.normal(0, 1), -27 + rng.normal(0, 1), 3 + rng.normal(0, 1)),
                rng.uniform(1.2, 3.5),
                rng.uniform(80, 500),
            )
        )
    if rng.random() < 0.5:
        for side in (-1, 1):
            if rng.random() < 0.85:
                calcium.append(
                    (
                        (side * rng.normal(25, 2), rng.normal(-42, 2), rng.normal(10, 2)),
                        rng.uniform(1.5, 4.0),
                        rng.uniform(80, 500),
                    )
                )
    if rng.random() < 0.15:
        for side in (-1, 1):
            calcium.append(
                (
                    (side * rng.normal(19, 1.5), rng.normal(-3, 2), rng.normal(0, 2)),
                    rng.uniform(2, 4),
                    rng.uniform(50, 140),
                )
            )
    return Head(
        scale=scale,
        turn=tuple(
            float(math.radians(a))
            for a in (rng.normal(0, 7), rng.normal(0, 0.6 * pose_degree), rng.normal(0, pose_degree))
        ),
        shift_mm=(float(rng.normal(0, 4)), float(rng.normal(0, 5))),
        warp=random_field(rng, 45.0, 3),
        warp_mm=float(rng.uniform(1.5, 4.0)),
        ventricles_mm=float(np.clip(rng.normal(2.2 * age - 1.6, 1.0), -2.0, 7.0)),
        sulci=float(np.clip(rng.normal(0.7 * (age - 1), 0.35), -1, 1.3)),
        skull_mm=float(rng.uniform(4.0, 7.8)),
        scalp_mm=float(rng.uniform(3.5, 7.5)),
        outer=random_field(rng, 35.0, 4),
        texture=random_field(rng, 7.0, 2),
        grey=float(rng.uniform(35.5, 40.5)),
        white=float(rng.uniform(25.5, 29.5)),
        csf=float(rng.uniform(2, 9)),
        table=float(rng.uniform(1500, 2000)),
        diploe=float(rng.uniform(450, 850)),
        rarefaction=float(max(0.0, rng.normal(5 * (age - 0.8), 3))),
        falx=float(rng.uniform(42, 62)),
        vessels=float(rng.uniform(38, 58)),
        contrast=contrast,
        calcium=tuple(calcium),
        pneumatised=float(rng.uniform(0.3, 1.3)),
        swelling=_sample_swelling(rng),
        scars=_sample_scars(rng, age),
        drain=_sample_drain(rng),
    )


def _sample_swelling(rng: np.random.Generator) -> tuple[tuple[float, float, float], float, float]:
    ray = rng.normal(0, 1, 3) * [1, 1, 0.5] + [0, 0, 0.3]
    mm = float(rng.uniform(3, 14)) if rng.random() < 0.2 else 0.0
    return tuple(float(r) for r in ray / np.linalg.norm(ray)), mm, float(rng.uniform(0.25, 0.7))


def _sample_scars(rng: np.random.Generator, age: float) -> tuple:
    scars = []
    if rng.random() < 0.08 + 0.06 * age:
        side, radius = rng.choice([-1.0, 1.0]), rng.uniform(8, 26)
        place = (side * rng.uniform(20, 62), rng.uniform(-90, 50), rng.uniform(-5, 50))
        scars.append((place, tuple(radius * rng.uniform(0.6, 1.3, 3)), rng.uniform(6, 24)))
    for _ in range(rng.poisson(0.35 * age)):  # lacunes
        place = (rng.choice([-1.0, 1.0]) * rng.uniform(10, 32), rng.uniform(-22, 18), rng.uniform(-6, 26))
        scars.append((place, tuple(rng.uniform(1.5, 5.0, 3)), rng.uniform(6, 18)))
    return tuple((tuple(map(float, p)), tuple(map(float, r)), float(v)) for p, r, v in scars)


def _sample_drain(rng: np.random.Generator) -> tuple | None:
    if rng.random() >= 0.04:
        return None
    side = float(rng.choice([-1.0, 1.0]))
    return (
        (side * 6.0, float(rng.uniform(-5, 15)), float(rng.uniform(2, 12))),
        (side * 30.0, 45.0, 75.0),
        float(rng.uniform(120, 700)),
    )
