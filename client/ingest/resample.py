"""A slice on the cache's grid: head in the middle, 1 mm per pixel, one display convention.

Every slice comes out with rows running to the patient's back and columns to the patient's left, whether it was taken
prone, feet first, on the side or flipped. A tilted slice stays in its own plane: its scale is that of the plane.

Stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from client.dicom.headers import CtSlice
from shared.slices import PIXEL_MM, SIDE_PX

TISSUE_HU = -300.0  # above it is head, holder or table; below it air
HEAD_GRID_MM = 4.0  # the head is found on a coarse grid


@dataclass(frozen=True)
class UprightGrid:
    """Position of the pixels of an upright picture.

    Attributes:
      transposed, flip_rows, flip_columns: what makes a slice's stored picture upright, in this order.
      spacing_mm: distance of rows, distance of columns.
      corner_mm: x and y of the first pixel's centre.
      plane: x and y of one mm down a column, of one mm along a row; (2, 2), columns are these vectors.
    """

    transposed: bool
    flip_rows: bool
    flip_columns: bool
    spacing_mm: tuple[float, float]
    corner_mm: NDArray[np.float64]
    plane: NDArray[np.float64]

    def place_mm(self, row_mm: float, column_mm: float) -> NDArray[np.float64]:
        """Patient's x and y of a point given in mm from the picture's corner."""
        return self.corner_mm + self.plane @ [row_mm - self.spacing_mm[0] / 2, column_mm - self.spacing_mm[1] / 2]

    def offset_mm(self, place_mm: tuple[float, float]) -> NDArray[np.float64]:
        """The inverse: rows and columns in mm from the picture's corner."""
        return np.linalg.solve(self.plane, np.subtract(place_mm, self.corner_mm)) + np.array(self.spacing_mm) / 2


def upright_grid(image: CtSlice) -> UprightGrid:
    """Return how to turn a slice's picture upright (PS3.3 C.7.6.2.1.1)."""
    down, right = np.array(image.column_direction), np.array(image.row_direction)
    (rows, columns), (down_mm, right_mm) = image.shape, image.spacing_mm
    transposed = abs(right[0]) < abs(right[1])
    if transposed:
        down, right, rows, columns, down_mm, right_mm = right, down, columns, rows, right_mm, down_mm
    first = np.array(image.position_mm)
    flip_rows, flip_columns = bool(down[1] < 0), bool(right[0] < 0)
    if flip_rows:
        first, down = first + (rows - 1) * down_mm * down, -down
    if flip_columns:
        first, right = first + (columns - 1) * right_mm * right, -right
    plane = np.array([down[:2], right[:2]]).T
    return UprightGrid(transposed, flip_rows, flip_columns, (down_mm, right_mm), first[:2], plane)


def upright(pixels_YX: NDArray, grid: UprightGrid) -> NDArray:
    """A slice's picture, or a mask on its pixels, turned upright; a view."""
    pixels_YX = pixels_YX.T if grid.transposed else pixels_YX
    pixels_YX = pixels_YX[::-1] if grid.flip_rows else pixels_YX
    return pixels_YX[:, ::-1] if grid.flip_columns else pixels_YX


def head_centre(images: list[tuple[CtSlice, NDArray[np.float32]]]) -> tuple[float, float]:
    """Return the centre of the head in a series: the patient's x and y in mm.

    The largest connected region that is not air, on a coarse grid, its bounding box's middle, the median over slices:
    one centre for the series, so that the head does not jump from slice to slice.

    Args:
      images: some slices of a series with their HU, as stored.
    """
    middles = []
    for one, stored_YX in images:
        grid = upright_grid(one)
        hu_YX = upright(stored_YX, grid)
        step = [max(1, round(HEAD_GRID_MM / spacing)) for spacing in grid.spacing_mm]
        regions, count = ndimage.label(hu_YX[:: step[0], :: step[1]] > TISSUE_HU)
        if not count:
            continue
        largest = int(np.argmax(np.bincount(regions.ravel())[1:])) + 1
        box = ndimage.find_objects(regions)[largest - 1]
        middle = [(s.start + s.stop) / 2 * n * mm for s, n, mm in zip(box, step, grid.spacing_mm, strict=True)]
        middles.append(grid.place_mm(*middle))
    if not middles:
        grid = upright_grid(images[0][0])
        shape = upright(images[0][1], grid).shape
        middles = [grid.place_mm(*(n * mm / 2 for n, mm in zip(shape, grid.spacing_mm, strict=True)))]
    x_mm, y_mm = np.median(middles, axis=0)
    return float(x_mm), float(y_mm)


def resample(pixels_YX: NDArray, image: CtSlice, centre_mm: tuple[float, float], fill: float) -> NDArray[np.float32]:
    """A slice on the cache's grid: 224 x 224 pixels of 1 mm around a centre, antialiased.

    Args:
      pixels_YX: HU or mask in the image's own grid, as stored.
      image: gives the spacing, position and direction of rows and columns.
      centre_mm: the patient's x and y of the centre, from head_centre.
      fill: value outside the image.
    Returns:
      float32 (224, 224); rows run to the back, columns to the patient's left.
    """
    grid = upright_grid(image)
    pixels_YX = upright(pixels_YX, grid)
    reach = [SIDE_PX * PIXEL_MM / spacing for spacing in grid.spacing_mm]
    first = [
        c / spacing - r / 2 for c, spacing, r in zip(grid.offset_mm(centre_mm), grid.spacing_mm, reach, strict=True)
    ]
    # Pillow's box must lie within the picture: pad by what sticks out.
    before = [max(0, math.ceil(-f)) for f in first]
    after = [max(0, math.ceil(f + r - n)) for f, r, n in zip(first, reach, pixels_YX.shape, strict=True)]
    padded = pixels_YX.astype(np.float32, copy=False)
    if any(before) or any(after):
        padded = np.pad(padded, list(zip(before, after, strict=True)), constant_values=fill)
    top, left = (f + b for f, b in zip(first, before, strict=True))
    box = (left, top, left + reach[1], top + reach[0])
    padded = np.ascontiguousarray(padded)
    picture = Image.frombuffer("F", padded.shape[::-1], padded.data, "raw", "F", 0, 1)  # without a copy
    return np.asarray(picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, box=box))


def restore(values_YX: NDArray[np.float32], image: CtSlice, centre_mm: tuple[float, float]) -> NDArray[np.float32]:
    """Values on the cache's grid back on an image's own pixels: the inverse of resample, linear between pixels.

    Args:
      values_YX: float32 (224, 224).
      image: gives the spacing, position and direction of rows and columns, and how many there are.
      centre_mm: as resample was given.
    Returns:
      float32 (rows, columns) as stored; 0 outside of the cache's grid.
    """
    grid = upright_grid(image)
    shape = image.shape[::-1] if grid.transposed else image.shape
    steps = [spacing / PIXEL_MM for spacing in grid.spacing_mm]
    # The middle of pixel n lies (n + .5) spacings from the corner, that of the grid's pixel i at offset - half a side + i + .5.
    starts = [
        0.5 * step + SIDE_PX / 2 - offset / PIXEL_MM - 0.5
        for step, offset in zip(steps, grid.offset_mm(centre_mm), strict=True)
    ]
    upright_YX = ndimage.affine_transform(values_YX, steps, starts, shape, np.float32, order=1, mode="constant")
    stored_YX = upright_YX[:, ::-1] if grid.flip_columns else upright_YX
    stored_YX = stored_YX[::-1] if grid.flip_rows else stored_YX
    return np.ascontiguousarray(stored_YX.T if grid.transposed else stored_YX)


def touches_edge(hu_YX: NDArray[np.int16]) -> bool:
    """Whether tissue reaches the edge of the field, so that part of the head may be missing."""
    return edge_share(hu_YX) > 0.02


def edge_share(hu_NYX: NDArray[np.int16]) -> float:
    """Share of the edge of one or more slices, int16 (..., Y, X), that is tissue; 0 without slices."""
    edge = np.concatenate([hu_NYX[..., 0, :], hu_NYX[..., -1, :], hu_NYX[..., :, 0], hu_NYX[..., :, -1]], axis=-1)
    return float((edge > TISSUE_HU).mean()) if edge.size else 0.0
