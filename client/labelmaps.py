"""NIfTI and PNG label maps to hematoma masks.

A NIfTI must have the series' own grid: its affine says where each voxel lies, and a voxel must lie on a pixel. A mask of
another grid is refused, never stretched. Stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.dicom import DicomError
from client.images import CtSlice
from client.seg import choose_segments
from client.series import CtSeries

VOXEL_TOLERANCE = 0.1  # of a voxel, between a voxel's centre and its pixel's, at every corner of the picture
_TO_PATIENT = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI counts x to the right and y to the front


def nifti_grid(path: Path) -> tuple[float, ...]:
    """Shape (3) and the affine's first three rows (12) in the patient's axes, from the header alone.

    Raises:
      DicomError: no NIfTI, not three-dimensional, or an affine that is none.
    """
    try:
        image = nibabel.load(path)
        shape, affine = image.shape, _TO_PATIENT @ np.asarray(image.affine, dtype=float)
    except Exception as error:  # nibabel and gzip raise many types
        raise DicomError(f"cannot be read as NIfTI ({type(error).__name__})") from error
    if len(shape) != 3 and shape[3:] != (1,) * (len(shape) - 3):
        raise DicomError(f"NIfTI of shape {shape}, expected three dimensions")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DicomError("NIfTI whose affine is not invertible; expected one that places voxels in mm")
    return (*map(float, shape[:3]), *map(float, affine[:3].ravel()))


def fits(grid: tuple[float, ...], series: CtSeries) -> bool:
    """Whether every slice of a series is a layer of a NIfTI's grid, and every layer a slice."""
    if grid[:3].count(len(series.slices)) == 0:
        return False
    return all(_layer(grid, image) is not None for image in series.slices)


def _layer(
    grid: tuple[float, ...], image: CtSlice
) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]] | None:
    """Where an image's pixels are in a volume: first voxel, (axis, step) along a row's pixels, (axis, step) down a column.

    None if the pixels are not voxels of the volume, or not a whole layer of it.
    """
    shape, affine = np.array(grid[:3]), np.vstack([np.array(grid[3:]).reshape(3, 4), [0, 0, 0, 1]])
    inverse = np.linalg.inv(affine)
    first = (inverse @ [*image.position_mm, 1])[:3]
    right = inverse[:3, :3] @ (np.array(image.row_direction) * image.spacing_mm[1])
    down = inverse[:3, :3] @ (np.array(image.column_direction) * image.spacing_mm[0])
    axes = [int(np.argmax(np.abs(right))), int(np.argmax(np.abs(down)))]
    steps = [int(np.sign(right[axes[0]])), int(np.sign(down[axes[1]]))]
    start = np.rint(first).astype(int)
    last_row, last_column = image.shape[0] - 1, image.shape[1] - 1
    if axes[0] == axes[1] or (shape[axes[0]], shape[axes[1]]) != (image.shape[1], image.shape[0]):
        return None
    for row, column in ((0, 0), (0, last_column), (last_row, 0), (last_row, last_column)):
        voxel, expected = first + column * right + row * down, start.copy()
        expected[axes[0]] += steps[0] * column
        expected[axes[1]] += steps[1] * row
        if np.abs(voxel - expected).max() > VOXEL_TOLERANCE or (expected < 0).any() or (expected >= shape).any():
            return None
    return tuple(start.tolist()), (axes[0], steps[0]), (axes[1], steps[1])


def read_nifti(path: Path, series: CtSeries, segments: Sequence[str | int]) -> dict[str, NDArray[np.uint8]]:
    """Masks of a series' images; see client/masks.py read_mask."""
    grid = nifti_grid(path)
    layers = {image: _layer(grid, image) for image in series.slices}
    off = sum(layer is None for layer in layers.values())
    if off:
        raise DicomError(
            f"{off} of {len(layers)} slices are no layer of the NIfTI's grid; expected the series' own grid"
        )
    volume = np.asanyarray(nibabel.load(path).dataobj).reshape([int(n) for n in grid[:3]])
    chosen_volume = _chosen(volume, segments)
    masks = {}
    for image, (start, (right_axis, right_step), (down_axis, down_step)) in layers.items():
        depth_axis = 3 - right_axis - down_axis
        layer = np.take(chosen_volume, start[depth_axis], axis=depth_axis)
        layer_YX = layer.T if right_axis < down_axis else layer
        masks[image.image] = np.ascontiguousarray(layer_YX[::down_step, ::right_step])
    return masks


def read_png(path: Path, name: str, series: CtSeries, segments: Sequence[str | int]) -> dict[str, NDArray[np.uint8]]:
    """The mask of one image; see client/masks.py read_mask."""
    image = next((s for s in series.slices if s.image == name), None)
    if image is None:
        raise DicomError("a PNG for a multi-frame image, expected one image per file; export the mask as SEG or NIfTI")
    with Image.open(path) as picture:
        if picture.size != image.shape[::-1]:
            raise DicomError(f"mask is {picture.size[::-1]} pixels, its image {image.shape}; expected the same")
        if len(picture.getbands()) != 1:
            raise DicomError(f"a PNG of mode {picture.mode}, expected one channel with a number per pixel")
        pixels_YX = np.asarray(picture)
    return {name: _chosen(pixels_YX.astype(np.int64), segments)}


def _chosen(values: NDArray, segments: Sequence[str | int]) -> NDArray[np.uint8]:
    """1 where a label map has a number that is the hematoma: one of data.segment, else the only one there is."""
    present = np.unique(values)
    if not np.isfinite(present).all() or (present != np.rint(present)).any():
        raise DicomError("a label map with numbers that are not whole, expected 0 and the number of each segment")
    numbers = [s for s in segments if isinstance(s, int)]
    found = {int(value): () for value in present if value}
    if found and not numbers:
        numbers = choose_segments(found, ())
    return np.isin(values, numbers).astype(np.uint8)
