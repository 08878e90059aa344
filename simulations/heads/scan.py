"""A patient in the scanner: slices in HU with the mask of every bleeding.

Axes of the scanner are DICOM's (PS3.3 C.7.6.2.1.1), in mm from the centre of the head: x to the patient's left, y to the
back, z up. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from simulations.heads.anatomy import Plane, draw, to_template
from simulations.heads.bleeding import INTRACEREBRAL, KINDS, Bled, Bleeding, bleed, displaced
from simulations.heads.fields import bump, soft
from simulations.heads.head import Head, sample_head
from simulations.heads.places import sample_bleeding, sample_sign
from simulations.heads.scanner import MATRIX, RESTS, Scanner, blur_and_noise
from simulations.heads.skull import AIR, skin_depth
from simulations.heads.template import Template, sample

_DRAWN = 256  # pixels of a drawn plane's side: every scanner's blur is wider than a drawn pixel
# Two planes have the mean and the spread of a slice's profile: distance from its middle in thicknesses.
_BOX, _TRIANGLE = 12**-0.5, 6**-0.5
_THIN_MM = 2.0  # one plane is enough up to here
_CELL, _MARGIN_MM = 8, 6.0  # how finely, and how far around, the patient is looked for in a plane
# A slice is called positive once the hypodensity is as large as a reader can name, and left without a
# label (unknown) where there is some, but less: 30 mm2 is a spot of 6 mm.
POSITIVE_AREA_MM2, SUSPECT_AREA_MM2 = 30.0, 3.0
_FAR_MM = -50.0  # below the skin, where nobody is


@dataclass(frozen=True)
class Patient:
    """A head with its bleedings.

    Attributes:
      head: without bleeding.
      bleedings: none in a healthy one.
      streaks: (x, y, HU) of dense things outside of our model from which streaks go out.
      motion: rotation in radian between two halves of a turn; 0 for none.
    """

    head: Head
    bleedings: tuple[Bleeding, ...] = ()
    streaks: tuple[tuple[float, float, float], ...] = ()
    motion: float = 0.0


@dataclass(frozen=True)
class Scanned:
    """One slice.

    Attributes:
      hu_YX: int16 (512, 512).
      blood_YX: bool (512, 512), every bleeding with the hypodensities inside.
      kind_YX: uint8 (512, 512); 0 for no bleeding, else 1 + the number of its kind in KINDS.
      hypodensity_mm2: area of the marker.
    """

    hu_YX: NDArray[np.int16]
    blood_YX: NDArray[np.bool_]
    kind_YX: NDArray[np.uint8]
    hypodensity_mm2: float


def marker_label(blood: bool, hypodensity_mm2: float) -> int | None:
    """Label of a slice: 1 with the marker, 0 without; None where a reader could not tell or there is no blood."""
    if not blood or SUSPECT_AREA_MM2 <= hypodensity_mm2 < POSITIVE_AREA_MM2:
        return None
    return int(hypodensity_mm2 >= POSITIVE_AREA_MM2)


def scan_slice(
    patient: Patient, template: Template, scanner: Scanner, z_mm: float, rng: np.random.Generator
) -> Scanned:
    """One slice at height z of the scanner's table.

    Args:
      patient, template: who lies there.
      scanner: what looks.
      z_mm: position of the slice's centre.
      rng: the slice's noise.
    """
    step = scanner.field_of_view_mm / _DRAWN
    centres = (torch.arange(_DRAWN) + 0.5) * step - scanner.field_of_view_mm / 2
    x, y = centres[None, :].expand(_DRAWN, _DRAWN), centres[:, None].expand(_DRAWN, _DRAWN)
    z = z_mm + math.tan(math.radians(scanner.tilt_degree)) * y
    box = _box(patient, template, x, y, z)
    away = _TRIANGLE if scanner.helical else _BOX
    shares = (-away, away) if scanner.thickness_mm > _THIN_MM else (0.0,)
    planes = [
        _plane(patient, template, scanner, x[box], y[box], z[box] + share * scanner.thickness_mm) for share in shares
    ]
    hu = torch.full_like(x, AIR)
    hu[box] = sum(_hardened(plane, bled, scanner) for plane, bled in planes) / len(planes)
    hu = hu + scanner.offset_hu * (hu > -500)
    below_skin = torch.full_like(x, _FAR_MM)
    below_skin[box] = planes[0][0].below_skin
    hu = _rest(hu, below_skin, scanner, x, y)
    hu = _streaks(_moved(hu, patient.motion), patient, x, y)
    if scanner.corner_hu:  # lies on the head's rest
        hu[((x - patient.head.shift_mm[0] - 92).abs() < 5) & ((y - patient.head.shift_mm[1] + 92).abs() < 5)] = (
            scanner.corner_hu
        )

    hu_YX = blur_and_noise(_fine(hu), scanner, rng)
    if scanner.padding_hu is not None:
        hu_YX[_fine(torch.hypot(x, y)) > scanner.field_of_view_mm / 2] = scanner.padding_hu
    blood_YX, kind_YX = np.zeros((MATRIX, MATRIX), np.bool_), np.zeros((MATRIX, MATRIX), np.uint8)
    blood = sum(bled.blood for _, bled in planes) / len(planes)
    if bool((blood > 0.4).any()):
        blood_YX = _pasted(blood, box) > 0.5
        kind_YX = _kinds([bled for _, bled in planes], blood_YX, box)
    area = float((sum(bled.dark for _, bled in planes) / len(planes) > 0.5).sum()) * step**2
    return Scanned(np.rint(hu_YX).clip(-4096, 4095).astype(np.int16), blood_YX, kind_YX, area)


def _with_contrast(head: Head, contrast: float) -> Head:
    """Grey and white matter moved apart, or nearer to each other, about their middle."""
    if contrast == 1:
        return head
    middle = (head.grey + head.white) / 2
    return replace(head, grey=middle + contrast * (head.grey - middle), white=middle + contrast * (head.white - middle))


def _box(patient: Patient, template: Template, x: Tensor, y: Tensor, z: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a plane between which the patient lies, multiples of _CELL."""
    some = slice(_CELL // 2, None, _CELL)
    points = to_template(patient.head, x[some, some], y[some, some], z[some, some])
    depth = sample(template.distances, points, template.first_distance_mm, 2.0)[0]
    near = skin_depth(patient.head, points, depth) > -_MARGIN_MM
    edges = []
    for axis in (1, 0):
        cells = torch.nonzero(near.any(axis)).flatten()
        first, last = (int(cells[0]), int(cells[-1])) if len(cells) else (0, 0)
        edges.append(slice(max(first - 1, 0) * _CELL, (last + 2) * _CELL))
    return edges[0], edges[1]


def _pasted(share: Tensor, box: tuple[slice, slice]) -> NDArray[np.float32]:
    """A share of a plane's box, at the slice's resolution."""
    whole = torch.zeros((_DRAWN, _DRAWN))
    whole[box] = share
    return _fine(whole)


def _kinds(planes: list[Bled], blood_YX: NDArray[np.bool_], box: tuple[slice, slice]) -> NDArray[np.uint8]:
    """Number of the kind that holds most of each pixel of blood."""
    most, kind_YX = np.zeros((MATRIX, MATRIX), np.float32), np.zeros((MATRIX, MATRIX), np.uint8)
    for number, kind in enumerate(KINDS, start=1):
        there = [bled.kinds[kind] for bled in planes if kind in bled.kinds]
        if there:
            share_YX = _pasted(sum(there) / len(planes), box)
            kind_YX[share_YX > most] = number
            most = np.maximum(most, share_YX)
    return np.where(blood_YX, kind_YX, 0).astype(np.uint8)


def _plane(
    patient: Patient, template: Template, scanner: Scanner, x: Tensor, y: Tensor, z: Tensor
) -> tuple[Plane, Bled]:
    """One plane without thickness."""
    head = _with_contrast(patient.head, scanner.contrast)
    points = to_template(patient.head, x, y, z)
    moved = None
    if patient.bleedings:
        depth = sample(template.distances, points, template.first_distance_mm, 2.0)[0]
        moved = displaced(points, depth, patient.bleedings)
    plane = draw(head, template, points, moved)
    return plane, bleed(plane, patient.bleedings, y)


def _fine(values: Tensor) -> NDArray[np.float32]:
    """A drawn plane at the slice's resolution, linear between."""
    return functional.interpolate(values[None, None], size=(MATRIX, MATRIX), mode="bilinear")[0, 0].numpy()


def _hardened(plane: Plane, bled: Bled, scanner: Scanner) -> Tensor:
    """HU with cupping below the skull and the dark band between the petrous bones."""
    hu = bled.hu + plane.brain * scanner.cupping_hu * torch.exp(-plane.depth.clamp(min=0) / 9)
    if scanner.petrous_hu:
        px, py, pz = plane.points.unbind(-1)
        band = bump(py + 27, 9) * soft(38 - px.abs(), 12) * bump(pz + 38, 11)
        hu = hu - scanner.petrous_hu * band * plane.brain * (1 + 0.5 * torch.sin(0.5 * py))
    return hu


def _rest(hu: Tensor, below_skin: Tensor, scanner: Scanner, x: Tensor, y: Tensor) -> Tensor:
    """What the head lies on."""
    if not scanner.holder_hu:
        return hu
    air = soft(-below_skin - 1) * (hu < -500)
    behind = float(y[below_skin > 0].max()) if bool((below_skin > 0).any()) else 90.0
    shell = (torch.hypot(x, (y - (behind - 92)) * 0.97) - 99).abs()
    if scanner.rest == "shell":
        return hu + soft(1.6 - shell, 0.6) * (y > 35) * air * (scanner.holder_hu + 1000)
    if scanner.rest == "cushion":
        foam = soft(torch.hypot(x, y - (behind - 92)) - 93) * soft(107 - torch.hypot(x, y - (behind - 92))) * (y > 10)
        hu = hu + foam * air * 60
        return hu + soft(1.2 - (torch.hypot(x, y - (behind - 92)) - 108).abs(), 0.6) * (y > 10) * air * (
            scanner.holder_hu + 1000
        )
    if scanner.rest == "table":
        return hu + soft(1.5 - (y - behind - 5).abs(), 0.6) * air * (scanner.holder_hu + 1000)
    return hu


def _moved(hu: Tensor, angle: float) -> Tensor:
    """The mean of two poses, as when the head turns during the scan."""
    if not angle:
        return hu
    cos, sin = math.cos(angle), math.sin(angle)
    grid = functional.affine_grid(
        torch.tensor([[[cos, -sin, 0.01], [sin, cos, 0.0]]]), [1, 1, *hu.shape], align_corners=False
    )
    other = functional.grid_sample(hu[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    return 0.6 * hu + 0.4 * other


def _streaks(hu: Tensor, patient: Patient, x: Tensor, y: Tensor) -> Tensor:
    """Bright and dark rays from dense things, such as clips, coils and teeth."""
    for px, py, value in patient.streaks:
        radius = torch.hypot(x - px, y - py)
        angle = torch.atan2(y - py, x - px)
        rays = torch.cos(7 * angle + px) + torch.cos(12 * angle + py) + 0.7 * torch.cos(23 * angle)
        inside = hu > -300
        hu = hu + value * rays * inside / (1 + radius / 12)
        hu = hu + soft(2.2 - radius, 0.6) * (60 * value - hu)
    return hu


def sample_scan(rng: np.random.Generator, patient: Patient) -> tuple[Patient, Scanner]:
    """Draw a scanner, wider than real ones differ (domain randomisation; Billot et al. 2023, arXiv:2107.09559).

    Returns:
      The patient with what moves or throws streaks, and the scanner.
    """
    thickness = float(rng.choice([1.5, 2.5, 4.0, 5.0, 5.0, 7.0, 10.0]))
    streaks = ()
    if rng.random() < 0.08:
        streaks = ((float(rng.uniform(-60, 60)), float(rng.uniform(-80, 70)), float(rng.uniform(3, 25))),)
    scanner = Scanner(
        dose=float(np.exp(rng.normal(0, 0.45)) * 5.0 / max(thickness, 2.5) * 0.8),
        sharpness=float(rng.uniform(-1.4, 1.6)),
        thickness_mm=thickness,
        spacing_mm=thickness,
        offset_hu=float(rng.normal(0, 3)),
        cupping_hu=float(rng.uniform(0, 12)),
        field_of_view_mm=float(rng.uniform(205, 260)),
        tilt_degree=float(rng.choice([0.0, rng.uniform(-24, 6)])),
        rest=str(rng.choice(RESTS)),
        holder_hu=float(rng.uniform(-300, 700)),
        petrous_hu=float(rng.uniform(0, 14)),
        helical=bool(rng.random() < 0.5),
    )
    motion = float(rng.normal(0, 0.03)) if rng.random() < 0.05 else 0.0
    return replace(patient, streaks=streaks, motion=motion), scanner


def sample_patient(rng: np.random.Generator, bleeding_share: float = 0.6) -> Patient:
    """Draw a patient for a stream of heads: any age, no bleeding, one, or several that go together."""
    contrast = float(rng.uniform(50, 220)) if rng.random() < _CONTRAST_SHARE else 0.0
    head = sample_head(rng, float(rng.uniform(0, 2)), pose_degree=6.0, contrast=contrast)
    if rng.random() >= bleeding_share:
        return Patient(head)
    kinds = [str(rng.choice(KINDS, p=_SHARES))]
    for other, chance in _TOGETHER.get(kinds[0], {}).items():
        if rng.random() < chance:
            kinds.append(other)
    return Patient(head, tuple(_sample_bled(rng, kind) for kind in kinds))


def _sample_bled(rng: np.random.Generator, kind: str) -> Bleeding:
    """Draw a bleeding of any size; clots of the brain with the marker, a sign that resembles it, or neither."""
    one = sample_bleeding(rng, kind, float(rng.uniform(6, 24)))
    if kind not in INTRACEREBRAL:
        return one
    return replace(one, sign=sample_sign(rng, one.radii, _MARKER_SHARE, _LOOKALIKE_SHARE))


_MARKER_SHARE, _LOOKALIKE_SHARE = 0.4, 0.5  # of clots, and of those without the marker
_CONTRAST_SHARE = 0.12  # of patients with a contrast agent in their vessels
_SHARES = (0.18, 0.17, 0.06, 0.03, 0.08, 0.12, 0.17, 0.10, 0.09)  # of KINDS
_TOGETHER = {
    "deep": {"intraventricular": 0.4},
    "lobar": {"intraventricular": 0.12, "subarachnoid": 0.15, "subdural": 0.05},
    "cerebellar": {"intraventricular": 0.25},
    "subarachnoid": {"intraventricular": 0.3, "lobar": 0.1},
    "subdural": {"subarachnoid": 0.25, "contusion": 0.2},
    "epidural": {"contusion": 0.25, "subdural": 0.15},
    "contusion": {"subarachnoid": 0.5, "subdural": 0.4, "contusion": 0.5},
}
