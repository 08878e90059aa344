"""One head: where every point of a slice lies in the template, and what tissue is there.

Axes of the patient are DICOM's: x to the patient's left, y to the back, z up, in mm from the centre of the head. A head is
the template scaled and warped at random, with a skull, a scalp and an age of its own. Places named in comments are
MNI152 coordinates (x right, y front, z up).

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simulations.heads.fields import bump, soft
from simulations.heads.head import Head
from simulations.heads.skull import outside
from simulations.heads.template import Template, sample

_HIGHEST_TENTORIUM_MM = 16.0  # above it lie neither tentorium nor the sinuses and arteries below
CENTRE_MM = (0.0, -18.0, 8.0)  # of the patient's frame, in MNI152


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
    outer, fine = head.outer.at(points), head.texture.at(points)
    around, below_skin = outside(head, points, depth, outer, fine)
    brain = soft(depth)
    if not bool((brain > 0).any()):
        return Plane(around, brain, points, depth, ventricle, torch.zeros_like(brain), below_skin)
    grey, white = _crisp(*sample(template.tissue, moved, template.first_mm, 1.0))
    fluid = _fluid(head, 1 - grey - white, depth, ventricle)
    share = (1 - fluid) / (grey + white).clamp(min=1e-3)
    grey, white = grey * share, white * share
    rare = head.rarefaction * soft(4 + ventricle + outer[3], 5) * (white > 0.3)
    inside = grey * head.grey + white * (head.white - rare) + fluid * head.csf
    inside = inside + 0.8 * fine[0] * (1 - fluid)
    inside = _membranes(head, inside, torch.cat([moved[..., :2], points[..., 2:]], -1), depth, outer)
    hu = around + brain * (inside - around)
    heights = float(points[..., 2].min()), float(points[..., 2].max())
    for place, radii, value in head.scars:
        if not _reaches(place, 1.5 * radii[2], heights):
            continue
        away = 1 - ((moved - torch.tensor(place)) / torch.tensor(radii)).norm(dim=-1) + 0.15 * fine[0]
        scar = soft(away, 0.12) * soft(depth - 1.5)
        hu = hu + scar * (value - hu) * (hu > value)
        fluid = torch.maximum(fluid, scar * (value < 10))
    if head.drain is not None:
        hu = _catheter(head, hu, points, below_skin)
    for place, radius, value in head.calcium:
        if _reaches(place, radius + 3, heights):
            distance = (points - torch.tensor(place, dtype=torch.float32)).norm(dim=-1) + 0.6 * outer[3]
            hu = hu + soft(radius - distance, 0.7) * (value - hu)
    return Plane(hu, brain, points, depth, ventricle, fluid * brain, below_skin)


def _reaches(place: tuple[float, float, float], reach_mm: float, heights: tuple[float, float]) -> bool:
    """Whether something around a place meets a plane that lies between two heights."""
    return heights[0] - reach_mm < place[2] < heights[1] + reach_mm


def _crisp(grey: Tensor, white: Tensor) -> tuple[Tensor, Tensor]:
    """Shares with the border of one brain; the template's is a mean over many."""
    both = grey + white
    white = (0.5 + 2.2 * (white / both.clamp(min=1e-3) - 0.5)).clamp(0, 1) * both
    return both - white, white


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
    aside = x.abs()
    inside = soft(depth, 0.7)
    free = ((y + 8) / 66) ** 2 + ((z + 2) / 42) ** 2  # beyond the free edge of the falx, above the corpus callosum
    sheet = 0.8 * bump(x + 0.8 * outer[3], 0.9) * soft(free - 1, 0.05) * soft(z + 12, 2) * inside
    sinus = soft(5.5 - depth - 0.9 * aside, 1.0) * soft(z + 5, 3) * soft(60 - y, 5)  # the sagittal one
    low = float(z.min()) < _HIGHEST_TENTORIUM_MM
    if low:
        roof = 7 - 0.46 * aside - 0.0022 * (y + 62) ** 2 + 1.0 * outer[3]
        edge = soft(-18 - 0.25 * aside - y, 2) * soft(aside - 0.14 * (y + 95).clamp(min=0), 2)
        sheet = torch.maximum(sheet, 0.55 * bump(z - roof, 1.1) * edge * inside)
        transverse = soft(6.5 - depth, 1.0) * soft(3.8 - (z - roof + 2).abs(), 1.0) * soft(-32 - y, 4)
        straight = soft(2.8 - torch.hypot(x, z - (6 - 0.42 * (-45 - y).clamp(min=0))), 0.7) * soft(-45 - y, 2)
        sinus = torch.maximum(torch.maximum(sinus, transverse), straight)
    membrane = head.falx + 0.35 * head.contrast
    hu = hu + sheet * (membrane - hu) * (hu < membrane)
    hu = hu + sinus * inside * (head.vessels + 3 + head.contrast - hu)
    return hu + _arteries(x, y, z, outer) * (head.vessels - 4 + head.contrast - hu) if low else hu


def _arteries(x: Tensor, y: Tensor, z: Tensor, outer: Tensor) -> Tensor:
    """Middle cerebral and basilar artery and the carotids; share of each pixel."""
    aside = x.abs()
    middle = (
        soft(1.5 - torch.hypot(z + 14 - 0.15 * (aside - 12), y - 3 + 0.25 * (aside - 12) + outer[3]), 0.6)
        * soft(42 - aside, 3)
        * soft(aside - 7, 1)
    )
    basilar = soft(1.8 - torch.hypot(x + outer[3], y + 14 - 0.2 * (z + 25)), 0.6) * soft(-14 - z, 1) * soft(z + 45, 1)
    carotid = soft(2.2 - torch.hypot(aside - 12, y - 2), 0.6) * soft(-12 - z, 1) * soft(z + 24, 1)
    return torch.maximum(torch.maximum(middle, basilar), carotid)


def to_scanner(head: Head, place: tuple[float, float, float]) -> tuple[float, float, float]:
    """The inverse of to_template for one place, without the warp: x, y, z in the scanner, mm."""
    nod, lean, turn = head.turn
    right, front, up = (p - c for p, c in zip(place, CENTRE_MM, strict=True))
    x, y, z = -right * head.scale[0], -front * head.scale[1], up * head.scale[2]
    x, z = math.cos(lean) * x - math.sin(lean) * z, math.sin(lean) * x + math.cos(lean) * z
    y, z = math.cos(nod) * y - math.sin(nod) * z, math.sin(nod) * y + math.cos(nod) * z
    x, y = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
    return x + head.shift_mm[0], y + head.shift_mm[1], z
