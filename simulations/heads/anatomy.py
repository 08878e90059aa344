"""One head: where every point of a slice lies in the template, and what tissue is there.

Axes of the patient are DICOM's: x to the patient's left, y to the back, z up, in mm from the centre of the head. A head is
the template scaled and warped at random, with a skull, a scalp and an age of its own. Places named in comments are
MNI152 coordinates (x right, y front, z up).

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simulations.heads.template import Template, sample

CENTRE_MM = (0.0, -18.0, 8.0)  # of the patient's frame, in MNI152
_BOX_MM = ((-110.0, -150.0, -110.0), (110.0, 114.0, 130.0))  # of random fields
AIR, FAT, MUSCLE, SKIN = -1000.0, -95.0, 55.0, 30.0


@dataclass(frozen=True)
class Field:
    """A smooth random function of place.

    Attributes:
      values: float32 (1, C, Z, Y, X) on a coarse grid over the head, standard deviation about 1.
    """

    values: Tensor

    def at(self, points: Tensor) -> Tensor:
        """Values at points (Y, X, 3) in MNI152 mm; (C, Y, X)."""
        low, high = (torch.tensor(edge) for edge in _BOX_MM)
        grid = 2 * (points - low) / (high - low) - 1
        return F.grid_sample(self.values, grid[None, None], padding_mode="border", align_corners=True)[0, :, 0]


def random_field(rng: np.random.Generator, length_mm: float, channels: int = 1) -> Field:
    """A field whose values change over about `length_mm`."""
    sizes = [high - low for low, high in zip(*_BOX_MM, strict=True)]
    cells = [max(int(size / length_mm) + 2, 3) for size in reversed(sizes)]
    coarse = torch.from_numpy(rng.standard_normal((1, channels, *cells), dtype=np.float32))
    fine = F.interpolate(coarse, size=tuple(2 * c for c in cells), mode="trilinear", align_corners=True)
    return Field(1.4 * fine)  # linear interpolation averages; about unit variance again


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
    calcium: tuple[tuple[tuple[float, float, float], float, float], ...]
    pneumatised: float
    swelling: tuple[tuple[float, float, float], float, float]
    scars: tuple[tuple[tuple[float, float, float], tuple[float, float, float], float], ...]
    drain: tuple[tuple[float, float, float], tuple[float, float, float], float] | None


def sample_head(rng: np.random.Generator, age: float, pose_degree: float = 4.0) -> Head:
    """Draw a head; age from 0 (young) over 1 (middle) to 2 (old) widens ventricles and sulci."""
    size = rng.normal(1.0, 0.03)
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
        skull_mm=float(rng.uniform(4.5, 8.5)),
        scalp_mm=float(rng.uniform(3.5, 7.5)),
        outer=random_field(rng, 35.0, 4),
        texture=random_field(rng, 7.0, 2),
        grey=float(rng.uniform(34, 40)),
        white=float(rng.uniform(26, 30)),
        csf=float(rng.uniform(2, 9)),
        table=float(rng.uniform(1300, 1850)),
        diploe=float(rng.uniform(450, 850)),
        rarefaction=float(max(0.0, rng.normal(5 * (age - 0.8), 3))),
        falx=float(rng.uniform(42, 62)),
        vessels=float(rng.uniform(38, 58)),
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


def soft(signed: Tensor, width: float = 0.5) -> Tensor:
    """1 where positive, 0 where negative, linear over an edge of twice the width."""
    return (0.5 + signed / (2 * width)).clamp(0, 1)


def bump(value: Tensor, width: float) -> Tensor:
    """1 at zero, falling to 0 over about the width on both sides."""
    return torch.exp(-((value / width) ** 2))


def to_template(head: Head, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Points of the scanner (each (Y, X), mm) -> MNI152 coordinates of the head, warped; (Y, X, 3)."""
    nod, lean, turn = head.turn
    x, y = x - head.shift_mm[0], y - head.shift_mm[1]
    x, y = math.cos(turn) * x + math.sin(turn) * y, -math.sin(turn) * x + math.cos(turn) * y
    y, z = math.cos(nod) * y + math.sin(nod) * z, -math.sin(nod) * y + math.cos(nod) * z
    x, z = math.cos(lean) * x + math.sin(lean) * z, -math.sin(lean) * x + math.cos(lean) * z
    right, front, up = -x / head.scale[0], -y / head.scale[1], z / head.scale[2]
    points = torch.stack([right, front, up], -1) + torch.tensor(CENTRE_MM)
    return points + head.warp_mm * head.warp.at(points).permute(1, 2, 0)


@dataclass(frozen=True)
class Plane:
    """What lies in a plane of a head; each (Y, X), the points (Y, X, 3).

    Attributes:
      hu: without bleeding.
      brain: share of each pixel that is inside the inner table.
      points: MNI152 coordinates.
      depth: below the inner table in mm, negative outside.
      ventricle: depth inside the ventricles in mm, negative outside.
      fluid: share of cerebrospinal fluid.
      below_skin: depth below the skin in mm.
    """

    hu: Tensor
    brain: Tensor
    points: Tensor
    depth: Tensor
    ventricle: Tensor
    fluid: Tensor
    below_skin: Tensor


def draw(head: Head, template: Template, points: Tensor, moved: Tensor | None = None) -> Plane:
    """Tissue at points (Y, X, 3) of the template; `moved` is where the brain there lay before something pushed it."""
    depth, ventricle = sample(template.distances, points, template.first_distance_mm, 2.0)
    if moved is None:
        moved = points
    else:
        ventricle = sample(template.distances, moved, template.first_distance_mm, 2.0)[1]
    ventricle = ventricle + head.ventricles_mm
    grey, white = sample(template.tissue, moved, template.first_mm, 1.0)
    outer, fine = head.outer.at(points), head.texture.at(points)
    fluid = _fluid(head, 1 - grey - white, depth, ventricle)
    share = (1 - fluid) / (grey + white).clamp(min=1e-3)
    grey, white = grey * share, white * share
    rare = head.rarefaction * soft(4 + ventricle + outer[3], 5) * (white > 0.3)
    inside = grey * head.grey + white * (head.white - rare) + fluid * head.csf
    inside = inside + 0.8 * fine[0] * (1 - fluid)
    inside = _membranes(head, inside, torch.cat([moved[..., :2], points[..., 2:]], -1), depth, outer)
    outside, below_skin = _outside(head, points, depth, outer, fine)
    brain = soft(depth)
    hu = outside + brain * (inside - outside)
    for place, radii, value in head.scars:
        away = 1 - ((moved - torch.tensor(place)) / torch.tensor(radii)).norm(dim=-1) + 0.15 * fine[0]
        scar = soft(away, 0.12) * soft(depth - 1.5)
        hu = hu + scar * (value - hu) * (hu > value)
        fluid = torch.maximum(fluid, scar * (value < 10))
    if head.drain is not None:
        hu = _catheter(head, hu, points, below_skin)
    for place, radius, value in head.calcium:
        distance = (points - torch.tensor(place, dtype=torch.float32)).norm(dim=-1) + 0.6 * outer[3]
        hu = hu + soft(radius - distance, 0.7) * (value - hu)
    return Plane(hu, brain, points, depth, ventricle, fluid * brain, below_skin)


def _catheter(head: Head, hu: Tensor, points: Tensor, below_skin: Tensor) -> Tensor:
    """A drain from the frontal horn through skull and scalp."""
    low, high, value = head.drain
    start, way = torch.tensor(low), torch.tensor(high) - torch.tensor(low)
    along = ((points - start) @ way / (way @ way)).clamp(0, 1)
    distance = (points - start - along[..., None] * way).norm(dim=-1)
    return hu + soft(1.4 - distance, 0.5) * soft(below_skin + 5) * (value - hu)


def _fluid(head: Head, fluid: Tensor, depth: Tensor, ventricle: Tensor) -> Tensor:
    """Share of fluid with the head's own ventricles and sulci; the template's sulci are blurred over many brains."""
    fluid = fluid.clamp(0, 1)
    gain = 1.0 + 0.8 * head.sulci
    sulcal = (gain * (fluid - 0.12 + 0.1 * head.sulci)).clamp(0, 1)
    rim = soft(1.6 + 1.5 * head.sulci - depth, 0.8) * 0.9
    own = torch.maximum(sulcal, rim)
    near = soft(ventricle + 5, 2)  # the wall of the template's ventricle must not shine through where it shrank
    walls = soft(ventricle, 0.8)
    return own * (1 - near) + walls * near


def _membranes(head: Head, hu: Tensor, points: Tensor, depth: Tensor, outer: Tensor) -> Tensor:
    """Falx, tentorium, venous sinuses and the arteries at the base."""
    x, y, z = points.unbind(-1)
    inside = soft(depth, 0.7)
    across = x + 0.8 * outer[3]
    free = ((y + 8) / 66) ** 2 + ((z + 2) / 42) ** 2  # beyond the free edge of the falx, above the corpus callosum
    falx = bump(across, 0.9) * soft(free - 1, 0.05) * soft(z + 12, 2) * inside
    roof = 7 - 0.46 * x.abs() - 0.0022 * (y + 62) ** 2 + 1.0 * outer[3]
    tent = (
        bump(z - roof, 1.1)
        * soft(-18 - 0.25 * x.abs() - y, 2)
        * inside
        * soft(x.abs() - 0.14 * (y + 95).clamp(min=0), 2)
    )
    hu = hu + torch.maximum(0.8 * falx, 0.55 * tent) * (head.falx - hu) * (hu < head.falx)
    sagittal = soft(5.5 - depth - 0.9 * x.abs(), 1.0) * soft(z + 5, 3) * soft(60 - y, 5)
    transverse = soft(6.5 - depth, 1.0) * soft(3.8 - (z - roof + 2).abs(), 1.0) * soft(-32 - y, 4)
    straight = soft(2.8 - torch.hypot(x, z - (6 - 0.42 * (-45 - y).clamp(min=0))), 0.7) * soft(-45 - y, 2)
    sinus = torch.maximum(torch.maximum(sagittal, transverse), straight) * inside
    hu = hu + sinus * (head.vessels + 3 - hu)
    middle = (
        soft(1.5 - torch.hypot(z + 14 - 0.15 * (x.abs() - 12), y - 3 + 0.25 * (x.abs() - 12) + outer[3]), 0.6)
        * soft(42 - x.abs(), 3)
        * soft(x.abs() - 7, 1)
    )
    basilar = soft(1.8 - torch.hypot(x + outer[3], y + 14 - 0.2 * (z + 25)), 0.6) * soft(-14 - z, 1) * soft(z + 45, 1)
    carotid = soft(2.2 - torch.hypot(x.abs() - 12, y - 2), 0.6) * soft(-12 - z, 1) * soft(z + 24, 1)
    artery = torch.maximum(torch.maximum(middle, basilar), carotid)
    return hu + artery * (head.vessels - 4 - hu)


def _outside(head: Head, points: Tensor, depth: Tensor, outer: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """Bone, scalp, face and air.

    Returns:
      HU, and depth below the skin in mm.
    """
    x, y, z = points.unbind(-1)
    across = x.abs()
    low = soft(-14 - z, 10)  # 1 at the base, 0 at the vault
    skull = (head.skull_mm * (1 + 0.18 * outer[0]) + 2.5 * soft(z - 60, 12)).clamp(min=2.8)
    skull = skull * (1 - 0.35 * bump(across - 66, 8) * bump(z + 5, 18))  # the temporal squama is thin
    temporal = 9 * bump(y - 12, 28) * bump(z + 14, 30) * soft(across - 46, 6)  # muscle
    nape = 28 * soft(-52 - y, 10) * soft(-30 - z, 12)
    scalp = (head.scalp_mm * (1 + 0.2 * outer[1])).clamp(min=2.5)
    way, mm, extent = head.swelling
    swollen = torch.zeros_like(depth)
    if mm:
        ray = points - torch.tensor((0.0, -18.0, 0.0))
        ray = (ray / ray.norm(dim=-1, keepdim=True).clamp(min=1e-6) * torch.tensor(way)).sum(-1)
        swollen = mm * soft(ray - math.cos(extent), 0.5 * (1 - math.cos(extent)))
    below_skin = depth + skull + scalp + temporal + nape + swollen
    below_skin = torch.maximum(below_skin, _face(x, y, z, outer))
    flesh = FAT + (MUSCLE - FAT) * torch.maximum(
        soft(temporal - 1.5, 1) * soft(-(depth + skull) - 0.6, 0.5) * soft(temporal + 0.5 + (depth + skull), 1),
        low * soft(outer[2] + 0.4 * fine[1], 0.5) * 0.9,
    )
    flesh = flesh + soft(swollen - 1.5, 1.5) * soft(outer[2] + fine[0] + 0.9, 0.6) * (45 - flesh)
    flesh = flesh + soft(1.9 - below_skin, 0.6) * (SKIN - flesh)
    hu = AIR + soft(below_skin) * (flesh - AIR)
    bone_in = soft(-depth) * soft(depth + skull)
    middle = (depth + skull / 2) / (skull / 2).clamp(min=0.5)
    diploe = soft(1 - middle.abs() - 0.35, 0.25) * soft(skull - 4, 1)
    grain = fine[1]
    value = head.table + diploe * (head.diploe + 120 * grain - head.table)
    value = value - (head.table - 250) * _sutures(x, y, z, outer) * soft(-depth - 0.5)
    hu = hu + bone_in * (value - hu)
    if float(z.min()) < 8:  # everything of the base lies lower
        hu = _base(head, hu, x, y, z, depth, outer, grain, below_skin)
    return hu, below_skin


def _sutures(x: Tensor, y: Tensor, z: Tensor, outer: Tensor) -> Tensor:
    """Coronal, sagittal and lambdoid suture."""
    wiggle = 1.2 * torch.sin(1.3 * z) + 2 * outer[3]
    coronal = bump(y - 5 - 0.35 * (x.abs() - 30) + wiggle, 0.5) * soft(z - 5, 4)
    sagittal = bump(x + 1.2 * torch.sin(1.1 * y), 0.5) * soft(z - 30, 4) * soft(5 - y, 3)
    lambdoid = bump(y + 98 - 0.75 * x.abs() + wiggle + 0.3 * (z - 20), 0.6) * soft(z + 10, 4) * soft(45 - z, 4)
    return torch.maximum(torch.maximum(coronal, sagittal), lambdoid)


def _face(x: Tensor, y: Tensor, z: Tensor, outer: Tensor) -> Tensor:
    """Depth below the skin of face and neck, which the cavity's hull does not reach."""
    face = 1 - torch.sqrt((x / 62) ** 2 + ((y - 26) / 62) ** 2 + ((z + 62) / 52) ** 2)
    nose = 1 - torch.sqrt((x / 14) ** 2 + ((y - 88) / 16) ** 2 + ((z + 62) / 22) ** 2)
    neck = 1 - torch.sqrt((x / 60) ** 2 + ((y + 32) / 62) ** 2) - 0.02 * (z + 60).clamp(min=0)
    return torch.maximum(torch.maximum(58 * face, 13 * nose), 58 * neck) + 1.5 * outer[1]


def _base(
    head: Head,
    hu: Tensor,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    depth: Tensor,
    outer: Tensor,
    grain: Tensor,
    below_skin: Tensor,
) -> Tensor:
    """Skull base: petrous bones, mastoid and sinus air, orbits, nose; air and bone vary much between heads."""
    across = x.abs()
    free = soft(-depth)  # never in the cavity
    deep = soft(below_skin - 3, 1)

    def ball(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> Tensor:
        return 1 - torch.sqrt(((across - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2) + 0.12 * grain

    def put(hu: Tensor, where: Tensor, value: Tensor | float) -> Tensor:
        return hu + where * free * deep * (value - hu)

    facial = soft(-34 - z, 3) * soft(y - 15, 3) * soft(outer[2] + 0.5 * grain - 0.6, 0.15)
    hu = put(hu, facial, 500 + 250 * grain)
    along = (across - 14) * 0.78 + (-18 - y) * 0.62
    beside = (across - 14) * 0.62 - (-18 - y) * 0.78
    petrous = (
        soft(1 - torch.sqrt((beside / 10) ** 2 + ((z + 39) / 10) ** 2) + 0.15 * grain, 0.12)
        * soft(along + 4, 2)
        * soft(58 - along, 4)
    )
    hu = put(hu, petrous, head.table + 100 * grain)
    clivus = soft(1 - torch.sqrt((x / 14) ** 2 + ((y + 4 + 0.35 * (z + 35)) / 9) ** 2), 0.15) * soft(-32 - z, 3)
    hu = put(hu, clivus, head.diploe + 150 * grain)
    mastoid = soft(ball(54, -42, -44, 15, 17, 17), 0.15)
    hu = put(hu, mastoid, 700 + 200 * grain)
    cells = soft(grain + head.pneumatised - 0.9, 0.3)
    hu = put(hu, mastoid * cells, AIR + 150)
    canal = soft(1 - torch.sqrt(((y + 22) / 4) ** 2 + ((z + 44) / 4) ** 2), 0.2) * soft(across - 44, 2)
    hu = hu + canal * free * (AIR - hu)
    orbit = soft(ball(32, 52, -38, 19, 26, 18), 0.08)
    hu = put(hu, orbit, FAT)
    for distance in (across - (22 + 0.28 * (y - 40)), across - (41 - 0.02 * (y - 40))):
        hu = put(hu, bump(distance, 2) * orbit * soft(66 - y, 4) * soft(9 - (z + 38).abs(), 2), MUSCLE - 5)
    nerve = bump(torch.hypot(across - (20 + 0.25 * (y - 25)), z + 36), 2.2) * orbit * soft(52 - y, 2)
    hu = put(hu, nerve, 35.0)
    globe = torch.sqrt((across - 33) ** 2 + (y - 64) ** 2 + (z + 38) ** 2)
    hu = hu + soft(12.5 - globe) * free * (12 + 25 * bump(globe - 12, 1.0) - hu)
    lens = 1 - torch.sqrt(((across - 33) / 4.5) ** 2 + ((y - 72.5) / 2.2) ** 2 + ((z + 38) / 4.5) ** 2)
    hu = hu + soft(lens, 0.2) * free * (75 - hu)
    sphenoid = soft(ball(6, 18, -42, 13, 13, 10), 0.12)
    ethmoid = soft(ball(7, 45, -42, 9, 22, 12), 0.12) * soft(grain + 0.6, 0.3)
    maxillary = soft(ball(30, 40, -68, 17, 18, 16), 0.1)
    nasal = soft(ball(6, 50, -66, 10, 30, 16), 0.1) * soft(grain + 0.5, 0.4)
    for place in (sphenoid, ethmoid, maxillary, nasal):
        hu = put(hu, place, AIR + 40)
    walls = soft(depth + 13, 1) * soft(-depth - 2.5, 0.5)
    frontal = walls * soft(ball(12, 74, -14, 13 + 8 * head.pneumatised, 16, 14 * head.pneumatised), 0.15)
    return put(hu, frontal * soft(below_skin - 5, 1), AIR + 30)
