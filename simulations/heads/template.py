"""Maps of the head in MNI152 coordinates, from the tissue maps that nilearn's package carries.

Axes are those of MNI152 (x right, y front, z up), in mm. The template ends at the brain; the cranial cavity is its closed
hull, and skull and scalp are drawn outside by distance from it (simulations/heads/anatomy.py).

Source: ICBM 152 Nonlinear Symmetric 2009a (Fonov et al. 2011, NeuroImage), as packaged by nilearn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distribution

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

ORIGIN_MM = (-98.0, -134.0, -72.0)  # of the template's first voxel
PAD_MM = 32  # voxels of 1 mm added on every side, for skull and scalp
_CLOSE_MM, _CLOSE_HIGH_MM, _HIGH_MM = (
    6.0,
    24.0,
    -4.0,
)  # closing of the hull; wider above _HIGH_MM, where the skull is smooth
# Where ventricles are: x, y, z; even distances from the padded volume's first voxel (-130, -166, -104).
_DEEP_MM = ((-50, 50), (-96, 44), (-56, 44))
_FAR_MM = 40.0  # depth in the ventricles outside of there
_FLUID_MM = 1.5  # between brain and inner table


@dataclass(frozen=True)
class Template:
    """Maps of one brain; each Tensor is float32 (1, channels, z, y, x).

    Attributes:
      tissue: shares of grey and white matter, 1 mm.
      distances: depth below the inner table and depth inside the ventricles in mm, negative outside; 2 mm.
      first_mm, step_mm: of tissue; its first voxel in mm (x, y, z).
      first_distance_mm, step_distance_mm: of distances.
    """

    tissue: Tensor
    distances: Tensor
    first_mm: tuple[float, float, float]
    first_distance_mm: tuple[float, float, float]


@lru_cache(maxsize=1)
def load_template() -> Template:
    """Read the tissue maps and derive the distances; takes some seconds and 200 MB, once a process."""
    grey, white, t1 = (_map(name) for name in ("gm", "wm", "t1"))
    first = tuple(o - PAD_MM for o in ORIGIN_MM)
    depth = _cavity_depth(_largest((t1 > 40)[::2, ::2, ::2]), first)
    ventricles = np.full(depth.shape, np.float32(-_FAR_MM))
    fine = tuple(slice(int(low - o), int(high - o)) for (low, high), o in zip(_DEEP_MM, first, strict=True))
    coarse = tuple(slice(one.start // 2, one.stop // 2) for one in fine)
    fluid = np.clip(1 - grey[fine] - white[fine], 0, 1)
    ventricles[coarse] = _signed_distance(
        _ventricles(fluid, ndimage.zoom(depth[coarse], 2, order=1), tuple(low for low, _ in _DEEP_MM)), 0.7
    )[::2, ::2, ::2]
    return Template(_channels(np.stack([grey, white])), _channels(np.stack([depth, ventricles])), first, first)


def sample(volume: Tensor, points_mm: Tensor, first_mm: tuple[float, float, float], step_mm: float) -> Tensor:
    """Values of maps at points, linear between voxels, those of the edge outside.

    Args:
      volume: float32 (1, C, Z, Y, X).
      points_mm: float32 (Y, X, 3), x, y, z.
      first_mm, step_mm: place of the first voxel, and distance of voxels.
    Returns:
      float32 (C, Y, X).
    """
    size = torch.tensor([volume.shape[4], volume.shape[3], volume.shape[2]])
    grid = 2 * (points_mm - torch.tensor(first_mm)) / (step_mm * (size - 1)) - 1
    return F.grid_sample(volume, grid[None, None], padding_mode="border", align_corners=True)[0, :, 0]


def _map(name: str) -> NDArray[np.float32]:
    """One of nilearn's maps, padded; 0 to 1, (X, Y, Z)."""
    file = f"nilearn/datasets/data/mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    values = np.asarray(nib.load(distribution("nilearn").locate_file(file)).dataobj)  # importing nilearn takes seconds
    scale = 1 if name == "t1" else 255
    return np.pad(values.astype(np.float32) / scale, PAD_MM)


def _channels(maps: NDArray[np.float32]) -> Tensor:
    """(C, X, Y, Z) as grid_sample takes it."""
    return torch.from_numpy(np.ascontiguousarray(maps.transpose(0, 3, 2, 1), dtype=np.float32))[None]


def _cavity_depth(brain: NDArray[np.bool_], first: tuple[float, ...]) -> NDArray[np.float32]:
    """Depth below the inner table in mm: the brain's closed hull, and a layer of fluid; on a grid of 2 mm."""
    high = _closed(brain, _CLOSE_HIGH_MM)
    x, y, z = np.ogrid[tuple(slice(0, n) for n in brain.shape)]
    x, y, z = (2 * axis + o for axis, o in zip((x, y, z), first, strict=True))
    high &= z >= _HIGH_MM
    high |= ((x / 15) ** 2 + ((y + 2) / 15) ** 2 + ((z + 14) / 12) ** 2) < 1  # the cistern above the sella
    cavity = ndimage.binary_fill_holes(brain | high | _closed(brain, _CLOSE_MM))
    return 2 * _signed_distance(cavity, 0.75) + np.float32(_FLUID_MM)


def _closed(mask: NDArray[np.bool_], radius_mm: float) -> NDArray[np.bool_]:
    """Morphological closing with a ball, on a grid of 2 mm."""
    grown = ndimage.distance_transform_edt(~mask) <= radius_mm / 2
    return ndimage.distance_transform_edt(grown) > radius_mm / 2


def _signed_distance(mask: NDArray[np.bool_], smooth_mm: float) -> NDArray[np.float32]:
    """Distance to the mask's surface in voxels, positive inside."""
    distance = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return ndimage.gaussian_filter(distance.astype(np.float32), smooth_mm)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part."""
    labels, _ = ndimage.label(mask)
    return labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1


def _ventricles(fluid: NDArray[np.float32], depth: NDArray[np.float32], first: tuple[float, ...]) -> NDArray[np.bool_]:
    """Fluid of the lateral, third and fourth ventricles, found by place."""
    x, y, z = (np.arange(n) + o for n, o in zip(fluid.shape, first, strict=True))
    across, y, z = np.abs(x)[:, None, None], y[None, :, None], z[None, None, :]
    bodies = _between(across, 2, 24) & _between(y, -46, 34) & _between(z, -4, 33)
    bodies &= ~((across < 4) & (y > 8)) & ~((across < 10) & (y < -32) & (z < 16))  # fissure and cistern
    occipital = _between(across, 12, 36) & _between(y, -82, -30) & _between(z, -6, 24)
    temporal = _between(across, 24, 42) & _between(y, -40, 2) & _between(z, -26, -2)
    third = (across < 4) & _between(y, -24, 4) & _between(z, -10, 10)
    fourth = (across < 9) & _between(y, -56, -38) & _between(z, -46, -20)
    found = (fluid > 110 / 255) & (depth > 10) & (bodies | occipital | temporal | third | fourth)
    labels, _ = ndimage.label(found)
    return np.isin(labels, np.flatnonzero(np.bincount(labels.ravel()) > 60)[1:])


def _between(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.bool_]:
    return (values > low) & (values < high)
