"""A slice on the cache's grid: head in the middle, 1 mm per pixel, one display convention.

Stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from client.dicom import CtSlice
from shared.slices import PIXEL_MM, SIDE_PX

TISSUE_HU = -300.0  # above it is head, holder or table; below it air
HEAD_GRID_MM = 4.0  # the head is found on a coarse grid


def head_centre(images: list[tuple[CtSlice, NDArray[np.float32]]]) -> tuple[float, float]:
    """Where the head is in a series: row and column in mm from the corner of the first pixel's grid.

    The largest connected region that is not air, on a coarse grid, its bounding box's middle, the median over slices:
    one centre for the series, so that the head does not jump from slice to slice.
    """
    middles = []
    for one, hu_YX in images:
        step = [max(1, round(HEAD_GRID_MM / spacing)) for spacing in one.spacing_mm]
        regions, count = ndimage.label(hu_YX[:: step[0], :: step[1]] > TISSUE_HU)
        if not count:
            continue
        largest = int(np.argmax(np.bincount(regions.ravel())[1:])) + 1
        box = ndimage.find_objects(regions)[largest - 1]
        middles.append([(s.start + s.stop) / 2 * n * mm for s, n, mm in zip(box, step, one.spacing_mm, strict=True)])
    if not middles:
        one, hu_YX = images[0]
        return tuple(n * mm / 2 for n, mm in zip(hu_YX.shape, one.spacing_mm, strict=True))
    return tuple(float(v) for v in np.median(middles, axis=0))


def resample(pixels_YX: NDArray, image: CtSlice, centre_mm: tuple[float, float], fill: float) -> NDArray[np.float32]:
    """A slice on the cache's grid: 224 x 224 pixels of 1 mm around a centre, antialiased.

    Args:
      pixels_YX: HU or mask in the image's own grid.
      image: gives the spacing and the direction of rows and columns.
      centre_mm: row and column of the centre, from head_centre.
      fill: value outside the image.
    Returns:
      float32 (224, 224); rows run to the back, columns to the patient's left.
    """
    reach = [SIDE_PX * PIXEL_MM / spacing for spacing in image.spacing_mm]
    first = [c / spacing - r / 2 for c, spacing, r in zip(centre_mm, image.spacing_mm, reach, strict=True)]
    # Pillow's box must lie within the picture: pad by what sticks out.
    before = [max(0, math.ceil(-f)) for f in first]
    after = [max(0, math.ceil(f + r - n)) for f, r, n in zip(first, reach, pixels_YX.shape, strict=True)]
    padded = np.pad(pixels_YX.astype(np.float32), list(zip(before, after, strict=True)), constant_values=fill)
    top, left = (f + b for f, b in zip(first, before, strict=True))
    box = (left, top, left + reach[1], top + reach[0])
    out = np.asarray(Image.fromarray(padded).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, box=box))
    if image.row_direction[0] < 0:
        out = out[:, ::-1]
    if image.column_direction[1] < 0:
        out = out[::-1]
    return out


def touches_edge(hu_YX: NDArray[np.int16]) -> bool:
    """Whether tissue reaches the edge of the field, so that part of the head may be missing."""
    edge = np.concatenate([hu_YX[0], hu_YX[-1], hu_YX[:, 0], hu_YX[:, -1]])
    return bool((edge > TISSUE_HU).mean() > 0.02)
