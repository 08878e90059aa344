"""What lies around the brain: skull, scalp, face, skull base and air.

Places in numbers are MNI152 coordinates (x right, y front, z up) in mm. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simulations.heads.fields import bump, soft
from simulations.heads.head import Head
from simulations.heads.neck import BEGINS_MM, draw_neck, shoulders

AIR, FAT, MUSCLE, SKIN = -1000.0, -95.0, 55.0, 30.0


def outside(head: Head, points: Tensor, depth: Tensor, outer: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """Bone, scalp, face and air.

    Returns:
      HU, and depth below the skin in mm.
    """
    x, y, z = points.unbind(-1)
    low = soft(-14 - z, 10)  # 1 at the base, 0 at the vault
    below_skin, skull, temporal, swollen = _surface(head, points, depth, outer)
    flesh = FAT + (MUSCLE - FAT) * torch.maximum(
        soft(temporal - 1.5, 1) * soft(-(depth + skull) - 0.6, 0.5) * soft(temporal + 0.5 + (depth + skull), 1),
        low * soft(outer[2] + 0.4 * fine[1], 0.5) * 0.9,
    )
    flesh = flesh + soft(swollen - 1.5, 1.5) * soft(outer[2] + fine[0] + 0.9, 0.6) * (45 - flesh)
    flesh = flesh + soft(1.9 - below_skin, 0.6) * (SKIN - flesh)
    hu = AIR + soft(below_skin, 0.3) * (flesh - AIR)
    bone_in = soft(-depth) * soft(depth + skull)
    middle = (depth + skull / 2) / (skull / 2).clamp(min=0.5)
    diploe = soft(1 - middle.abs() - 0.35, 0.25) * soft(skull - 4, 1)
    grain = fine[1]
    value = head.table + diploe * (head.diploe + 120 * grain - head.table)
    value = value - (head.table - 250) * _sutures(x, y, z, outer) * soft(-depth - 0.5)
    hu = hu + bone_in * (value - hu)
    lowest = float(z.min())
    if lowest < 8:  # everything of the base lies lower
        hu = _base(head, hu, x, y, z, depth, outer, grain, below_skin)
    if lowest < BEGINS_MM:
        neck = draw_neck(head, hu, points, below_skin, outer, fine)
        hu = hu + soft(-depth - 2) * (neck - hu)
    return hu, below_skin


def skin_depth(head: Head, points: Tensor, depth: Tensor) -> Tensor:
    """Depth below the skin in mm, negative outside."""
    return _surface(head, points, depth, head.outer.at(points))[0]


def _surface(head: Head, points: Tensor, depth: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth below the skin, and thickness of the skull, the temporal muscle and a swelling, mm."""
    x, y, z = points.unbind(-1)
    across = x.abs()
    skull = (head.skull_mm * (1 + 0.18 * outer[0]) + 2.5 * soft(z - 60, 12)).clamp(min=2.8)
    skull = skull * (1 - 0.35 * bump(across - 66, 8) * bump(z + 5, 18))  # the temporal squama is thin
    temporal = 9 * bump(y - 12, 28) * bump(z + 14, 30) * soft(across - 46, 6)  # muscle
    nape = 24 * soft(-58 - y, 30) * soft(-40 - z, 26)
    scalp = (head.scalp_mm * (1 + 0.2 * outer[1])).clamp(min=2.5)
    way, mm, extent = head.swelling
    swollen = torch.zeros_like(depth)
    if mm:
        ray = points - torch.tensor((0.0, -18.0, 0.0))
        ray = (ray / ray.norm(dim=-1, keepdim=True).clamp(min=1e-6) * torch.tensor(way)).sum(-1)
        swollen = mm * soft(ray - math.cos(extent), 0.5 * (1 - math.cos(extent)))
    below_skin = depth + skull + scalp + temporal + nape + swollen
    if float(z.min()) < 20:  # face and neck reach up to here
        below_skin = torch.maximum(below_skin, _face(x, y, z, outer))
    return below_skin, skull, temporal, swollen


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
    skin = torch.maximum(torch.maximum(58 * face, 13 * nose), 58 * neck)
    return torch.maximum(skin, shoulders(x, y, z)) + 1.5 * outer[1]


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
