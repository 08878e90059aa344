"""A contact sheet of random heads, to look at beside real slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from simulations.heads.pool import draw_patient

COLUMNS, ROWS = 8, 6
WINDOW_HU = (0.0, 80.0)
OUTLINE = (235, 92, 60)


def write_sheet(path: Path, seed: int, outlines: bool = True, real: Sequence[NDArray[np.float32]] = ()) -> None:
    """Draw 48 slices, of each patient the one with most bleeding, or one by chance; real slices come first.

    Args:
      path: of the picture.
      seed: decides the heads.
      outlines: of bleedings.
      real: float32 (224, 224) each, HU; as many fewer are drawn.
    """
    tiles = [_tile(hu_YX, np.zeros(hu_YX.shape, np.bool_)) for hu_YX in real[: COLUMNS * ROWS]]
    for number in range(COLUMNS * ROWS - len(tiles)):
        rng = np.random.default_rng([seed, number])
        drawn = draw_patient(rng)
        areas = drawn["mask"].sum(axis=(1, 2))
        chosen = int(np.argmax(areas)) if areas.any() else int(rng.integers(len(areas)))
        tiles.append(_tile(drawn["hu"][chosen], (drawn["mask"][chosen] > 0) & outlines))
    rows = [np.concatenate(tiles[start : start + COLUMNS], axis=1) for start in range(0, len(tiles), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)


def _tile(hu_YX: NDArray, mask_YX: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """One slice as a picture, (Y, X, 3), the mask outlined from outside."""
    low, high = WINDOW_HU
    grey_YX = np.clip((hu_YX.astype(np.float32) - low) / (high - low), 0, 1) * 255
    rgb = np.repeat(grey_YX.astype(np.uint8)[..., None], 3, axis=2)
    rgb[ndimage.binary_dilation(mask_YX) & ~mask_YX] = OUTLINE
    return rgb
