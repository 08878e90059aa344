"""What lies below the skull: spine, airway, jaw and teeth, muscles, vessels, shoulders.

Scans of head and neck, and the lowest slices of a head, show them. Places in numbers are MNI152 coordinates (x right,
y front, z up) in mm. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulations.heads.fields import bump, soft
from simulations.heads.head import Head

BEGINS_MM = -50.0  # below it there may be neck
_AIR, _MUSCLE, _CORD, _TOOTH = -990.0, 58.0, 32.0, 2200.0
_SEGMENT_MM = 17.0  # height of a vertebra with its disc


def shoulders(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Depth below the skin of the shoulders, mm."""
    return 75 * (1 - torch.sqrt((x / 190) ** 2 + ((y + 40) / 85) ** 2 + ((z + 245) / 75) ** 2))


def draw_neck(head: Head, hu: Tensor, points: Tensor, below_skin: Tensor, outer: Tensor, fine: Tensor) -> Tensor:
    """Put the neck into a plane that holds skin, fat and skull; HU (Y, X)."""
    x, y, z = points.unbind(-1)
    across = x.abs()
    back = y + 44 - 0.06 * (z + 60)  # 0 in the spinal canal
    here = soft(BEGINS_MM - 8 - z, 3)

    def put(hu: Tensor, where: Tensor, value: Tensor | float) -> Tensor:
        return hu + here * where * (value - hu)

    planes = soft(outer[2] + 0.7 * fine[1] + 0.9, 0.35)  # fat between muscles
    hu = put(hu, soft(below_skin - 3.5 - outer[1].abs(), 1) * planes, _MUSCLE + 3 * fine[0])
    tongue = soft(1 - torch.sqrt((x / 24) ** 2 + ((y - 22) / 26) ** 2 + ((z + 84) / 22) ** 2), 0.1)
    hu = put(hu, tongue, _MUSCLE)
    level = torch.cos((z + 62) * (2 * torch.pi / _SEGMENT_MM))
    disc = soft(level - 0.8, 0.1)
    body = soft(1 - torch.sqrt((x / 13) ** 2 + ((back - 15) / 8.5) ** 2) + 0.06 * fine[1], 0.12)
    hu = put(hu, body, head.diploe * 0.6 + 80 * fine[1] + disc * (85 - head.diploe * 0.6))
    rim = bump(1 - torch.sqrt((x / 13) ** 2 + ((back - 15) / 8.5) ** 2), 0.12)
    hu = put(hu, rim * (1 - disc), 0.7 * head.table)
    ring = torch.hypot(x / 1.25, back)
    arch = bump(ring - 11, 2.2) * soft(8 - back, 2) * soft(0.5 - level, 0.4)
    spine = soft(2.6 - across, 0.8) * soft(-9 - back, 1) * soft(back + 30, 2) * soft(0.1 - level, 0.3)
    facet = soft(1 - torch.hypot((across - 18) / 7, (back - 1) / 7), 0.12)
    for bone in (arch, spine, facet):
        hu = put(hu, bone, 0.55 * head.table + 90 * fine[1])
    hu = put(hu, soft(8.5 - ring, 0.8), 8.0)
    hu = put(hu, soft(5.5 - ring, 0.8), _CORD)
    hu = _airway(hu, put, x, y, z)
    hu = _jaw(head, hu, put, x, across, y, z, fine)
    blood = head.vessels + head.contrast
    for place, depth, radius in ((24, 28, 3.2), (30, 18, 4.8), (15, 3, 2.0)):
        vessel = soft(radius - torch.hypot(across - place + 2 * outer[3], back - depth + 2 * outer[1]), 0.6)
        hu = put(hu, vessel, blood)
    thyroid = soft(1 - torch.sqrt(((across - 17) / 8) ** 2 + ((y + 4) / 11) ** 2 + ((z + 178) / 24) ** 2), 0.12)
    hu = put(hu, thyroid, 95 + 0.5 * head.contrast)
    for place in ((34.0, -20.0, -72.0), (26.0, 18.0, -104.0)):  # parotid and submandibular glands
        away = (torch.stack([across, y, z], -1) - torch.tensor(place)) / torch.tensor((9.0, 14.0, 18.0))
        hu = put(hu, soft(1 - away.norm(dim=-1), 0.12), 20 + 15 * fine[0] + 0.3 * head.contrast)
    return hu


def _airway(hu: Tensor, put, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Pharynx above, larynx and trachea below."""
    low = soft(-140 - z, 6)
    wide, deep, front = 11 - 2 * low, 5 + 4 * low, -14 + 6 * low
    tube = soft(1 - torch.sqrt((x / wide) ** 2 + ((y - front) / deep) ** 2), 0.12)
    ring = bump(1 - torch.sqrt((x / wide) ** 2 + ((y - front) / deep) ** 2), 0.25) * low
    return put(put(hu, ring, 160.0), tube, _AIR)


def _jaw(head: Head, hu: Tensor, put, x: Tensor, across: Tensor, y: Tensor, z: Tensor, fine: Tensor) -> Tensor:
    """Mandible, teeth and what dentists leave."""
    bow = torch.sqrt((x / 44) ** 2 + ((y - 8) / 52) ** 2)
    body = soft(5 - 48 * (bow - 1).abs(), 1) * soft(y - 4, 3) * soft(-76 - z, 2) * soft(z + 106, 3)
    ramus = soft(1 - torch.hypot((across - 45) / 5, (y + 2) / 16), 0.15) * soft(-58 - z, 3) * soft(z + 100, 4)
    for bone in (body, ramus):
        hu = put(hu, bone, 0.7 * head.table + 120 * fine[1])
    along = torch.atan2(y - 8, x)
    gaps = soft(torch.cos(16 * along) + 0.75, 0.15)
    teeth = soft(4.2 - 46 * (bow - 0.98).abs(), 0.8) * soft(y - 18, 3) * soft(9 - (z + 72).abs(), 1) * gaps
    return put(hu, teeth, _TOOTH)
