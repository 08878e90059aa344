"""Bleedings of a head: inside the brain, its ventricles, its sulci, and between brain and skull.

Every bleeding is a rule that says, for points of the template, how much of a pixel is blood and which HU it has; it may
also push the brain aside. Sizes and HU follow simulations/README.md. Places are MNI152 mm.

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from simulations.heads.anatomy import Plane
from simulations.heads.fields import Field, soft

KINDS = (
    "deep",
    "lobar",
    "cerebellar",
    "brainstem",
    "intraventricular",
    "subarachnoid",
    "subdural",
    "epidural",
    "contusion",
)
INTRACEREBRAL = ("deep", "lobar", "cerebellar", "brainstem")
BRAIN_MM = (0.0, -18.0, 0.0)
HULL_MM = (66.0, 86.0, 72.0)  # half axes of the brain, for the direction to its surface


@dataclass(frozen=True)
class Blob:
    """An ellipsoid in a hematoma's own coordinates, where the hematoma is about the unit ball."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


@dataclass(frozen=True)
class Sign:
    """What is dark inside a clot: the marker, or what resembles it.

    Attributes:
      name: plain, hypodensity (the marker), notch, blend or fluid-level.
      blobs: of hypodensity or notch.
      plane: normal of the blend sign's border, in plane.
      drop_hu: how much darker than the clot.
    """

    name: str = "plain"
    blobs: tuple[Blob, ...] = ()
    plane: tuple[float, float] = (1.0, 0.0)
    drop_hu: float = 25.0


@dataclass(frozen=True)
class Bleeding:
    """One bleeding.

    Attributes:
      kind: one of KINDS.
      centre: of a clot; the direction of a collection below the skull; the middle of a subarachnoid one.
      radii: half axes of a clot in mm; of a collection: thickness in mm, and extent along and across in radian.
      turn: of a clot's axes about z.
      hu: of fresh blood.
      rough: how irregular the outline is, as a share of the radius.
      edema_mm, edema_hu: around a clot.
      push: share of a clot's volume that displaces the brain.
      level: 0 to 1; how far ventricles or a collection are filled.
      outline, texture: random fields.
      sign: what is dark inside a clot.
    """

    kind: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    turn: float
    hu: float
    rough: float
    edema_mm: float
    edema_hu: float
    push: float
    level: float
    outline: Field
    texture: Field
    sign: Sign = field(default_factory=Sign)


@dataclass(frozen=True)
class Bled:
    """A plane with its bleedings; each (Y, X).

    Attributes:
      hu: of the plane.
      blood: share of each pixel that is bleeding, hypodensities inside a clot included.
      dark: share that is hypodensity, the marker.
      kinds: per kind of KINDS that is there, its share.
    """

    hu: Tensor
    blood: Tensor
    dark: Tensor
    kinds: dict[str, Tensor]


def displaced(points: Tensor, depth: Tensor, bleedings: tuple[Bleeding, ...]) -> Tensor:
    """Where the tissue at points (Y, X, 3) lay before the bleedings pushed it."""
    moved = points
    for one in bleedings:
        if one.kind in INTRACEREBRAL:
            offset = points - torch.tensor(one.centre)
            size = float(np.prod(one.radii)) ** (1 / 3)
            reach = (offset.norm(dim=-1, keepdim=True) / (1.5 * size)) ** 2
            moved = moved - one.push * torch.exp(-reach) * offset * soft(depth, 6)[..., None]
        elif one.kind in ("subdural", "epidural"):
            thick = _thickness(one, points, one.outline.at(points))
            decay = torch.exp(-(depth - thick).clamp(min=0) / 40) * soft(depth, 2)
            moved = moved + (thick * decay)[..., None] * _outward(points)
    return moved


def bleed(plane: Plane, bleedings: tuple[Bleeding, ...], back: Tensor) -> Bled:
    """Put bleedings into a plane.

    Args:
      plane: a head without bleeding.
      bleedings: whose rules apply in order.
      back: (Y, X), mm towards the back in the scanner, for levels of fluid.
    """
    hu, kinds = plane.hu, {}
    blood, dark = torch.zeros_like(hu), torch.zeros_like(hu)
    for one in bleedings:
        if _is_far(one, plane):
            continue
        share, value, darker, edema = _RULES[one.kind](
            one, plane, back, one.outline.at(plane.points), one.texture.at(plane.points)
        )
        share = share * soft(200 - hu, 60)  # bone that a plane grazes stays bone
        hu = hu + edema * (one.edema_hu - hu) * (hu < 60)
        hu = hu + share * (value - hu)
        blood = torch.maximum(blood, share)
        dark = torch.maximum(dark, darker * share)
        kinds[one.kind] = torch.maximum(kinds.get(one.kind, torch.zeros_like(hu)), share)
    return Bled(hu, blood, dark, kinds)


def _is_far(one: Bleeding, plane: Plane) -> bool:
    """Whether a clot cannot reach a plane."""
    if one.kind not in (*INTRACEREBRAL, "contusion"):
        return False
    middle = plane.points[::8, ::8] - torch.tensor(one.centre)
    return float(middle.norm(dim=-1).min()) > 1.8 * max(one.radii) + 8


def _clot(
    one: Bleeding, plane: Plane, back: Tensor, outline: Tensor, texture: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A clot inside the brain: the level set of a distance and a random field."""
    nothing = torch.zeros_like(plane.hu)
    offset = plane.points - torch.tensor(one.centre)
    cos, sin = float(np.cos(one.turn)), float(np.sin(one.turn))
    x, y, z = offset.unbind(-1)
    own = torch.stack([(cos * x + sin * y) / one.radii[0], (-sin * x + cos * y) / one.radii[1], z / one.radii[2]], -1)
    size = float(np.prod(one.radii)) ** (1 / 3)
    rim = _two(outline) + 0.35 * texture[1]
    inside_mm = (1 + one.rough * rim - own.norm(dim=-1)) * size
    where = soft(plane.depth - 0.5, 0.7) * (plane.brain > 0)
    share = soft(inside_mm, 0.7) * where
    value = one.hu + 3.0 * texture[0] - 9 * torch.exp(-inside_mm.clamp(min=0) / 2.2)
    dark, drop = nothing, nothing
    sign = one.sign
    if sign.name in ("hypodensity", "notch"):
        for blob in sign.blobs:
            drop = torch.maximum(drop, soft(_blob_mm(blob, own, size), 0.9))
        if sign.name == "hypodensity":
            drop = drop * soft(inside_mm - 2.5) * soft(plane.depth - 3.0)
            dark = drop
    elif sign.name == "blend":
        drop = soft((own[..., 0] * sign.plane[0] + own[..., 1] * sign.plane[1] - 0.1) * size)
    elif sign.name == "fluid-level":
        middle = (back * share).sum() / share.sum().clamp(min=1)
        drop = soft(middle + 0.1 * size - back)
    edema = soft(inside_mm + one.edema_mm * (1 + 0.4 * outline[1]), 2.0) * where * (plane.hu > 15)
    return share, value - sign.drop_hu * drop, dark, edema


def _ventricles(
    one: Bleeding, plane: Plane, back: Tensor, outline: Tensor, texture: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blood in the ventricles: it sinks to the back of a patient who lies, or clots."""
    y = plane.points[..., 1]
    dense = soft((one.level - 0.5) * 90 - (y + 40) + 8 * outline[0], 2)  # filled from the back
    side = soft(one.centre[0] * plane.points[..., 0] / 10 + 6 * one.push, 2)
    share = soft(plane.ventricle, 0.7) * soft(plane.depth - 1) * dense * side
    return share, one.hu + 2 * texture[0], torch.zeros_like(share), torch.zeros_like(share)


def _sulci(
    one: Bleeding, plane: Plane, back: Tensor, outline: Tensor, texture: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blood in cisterns and sulci around a place."""
    away = (plane.points - torch.tensor(one.centre)) / torch.tensor(one.radii)
    near = soft(1 - away.norm(dim=-1) + 0.5 * outline[0], 0.25)
    outside = soft(-plane.ventricle - 1.5, 1)
    share = (2.2 * plane.fluid - 0.3).clamp(0, 1) * near * outside * soft(plane.depth - 0.3, 0.5)
    return share, one.hu + 2 * texture[0], torch.zeros_like(share), torch.zeros_like(share)


def _collection(
    one: Bleeding, plane: Plane, back: Tensor, outline: Tensor, texture: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blood between brain and inner table."""
    thick = _thickness(one, plane.points, outline)
    share = soft(thick - plane.depth, 0.6) * soft(plane.depth, 0.5) * soft(thick - 1.0, 0.6)
    older = soft(texture[1] - 1.2 + 2 * (1 - one.level), 0.5)  # not yet clotted, or older
    value = one.hu - 22 * older + 2.5 * texture[0]
    return share, value, torch.zeros_like(share), torch.zeros_like(share)


def _contusion(
    one: Bleeding, plane: Plane, back: Tensor, outline: Tensor, texture: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spots of blood in bruised cortex."""
    away = (plane.points - torch.tensor(one.centre)) / torch.tensor(one.radii)
    near = 1 - away.norm(dim=-1)
    spots = _two(outline) * 0.7 + texture[1] * 0.5
    share = soft(near + one.rough * spots - 0.35, 0.12) * soft(plane.depth - 1.0, 0.7)
    edema = soft(near + 0.25, 0.3) * soft(plane.depth - 0.5) * (plane.hu > 15)
    return share, one.hu + 3 * texture[0], torch.zeros_like(share), edema


_RULES = dict.fromkeys(INTRACEREBRAL, _clot) | {
    "intraventricular": _ventricles,
    "subarachnoid": _sulci,
    "subdural": _collection,
    "epidural": _collection,
    "contusion": _contusion,
}


def _two(values: Tensor) -> Tensor:
    """A coarse and a fine channel as one."""
    return values[0] + 0.45 * values[1]


def _blob_mm(blob: Blob, own: Tensor, size_mm: float) -> Tensor:
    """Signed distance to a blob's surface in mm, positive inside, approximate."""
    scaled = (own - torch.tensor(blob.centre)) / torch.tensor(blob.radii)
    return (1 - scaled.norm(dim=-1)) * size_mm * min(blob.radii[:2])


def _outward(points: Tensor) -> Tensor:
    """About the direction to the inner table, unit vectors (Y, X, 3)."""
    normal = (points - torch.tensor(BRAIN_MM)) / torch.tensor(HULL_MM) ** 2
    return normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _thickness(one: Bleeding, points: Tensor, outline: Tensor) -> Tensor:
    """Thickness of a collection below the skull at points, mm: a lens (epidural) or a crescent (subdural)."""
    ray = (points - torch.tensor(BRAIN_MM)) / torch.tensor(HULL_MM)
    ray = ray / ray.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    middle = torch.tensor(one.centre) / float(np.linalg.norm(one.centre))
    angle = torch.arccos((ray * middle).sum(-1).clamp(-1, 1))
    bearing = torch.atan2(ray[..., 2] - middle[2], ray[..., 1] - middle[1])
    stretch = torch.hypot(torch.cos(bearing) / one.radii[1], torch.sin(bearing) / one.radii[2])
    share = angle * stretch + 0.18 * outline[0] * (one.kind == "subdural")
    if one.kind == "epidural":
        return one.radii[0] * (1 - share**2).clamp(min=0)
    same_side = soft(points[..., 0] * (1 if middle[0] > 0 else -1) - 1, 1)
    return one.radii[0] * (1 - share**4).clamp(min=0) * (1 + 0.35 * outline[1]).clamp(min=0.2) * same_side
