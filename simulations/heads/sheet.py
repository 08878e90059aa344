"""A contact sheet of random heads, to look at beside real slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from simulations.heads.pool import draw_patient

COLUMNS, ROWS = 8, 6


def write_sheet(path: Path, seed: int, outlines: bool = True) -> None:
    """Draw 48 patients, the slice with most bleeding of each, or one by chance; window 0 to 80 HU.

    Args:
      path: of the picture.
      seed: decides the heads.
      outlines: of bleedings, in red.
    """
    figure = Figure(figsize=(3 * COLUMNS, 3 * ROWS))
    figure.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    for number, axes in enumerate(figure.subplots(ROWS, COLUMNS).ravel()):
        rng = np.random.default_rng([seed, number])
        drawn = draw_patient(rng)
        areas = drawn["mask"].sum(axis=(1, 2))
        chosen = int(np.argmax(areas)) if areas.any() else int(rng.integers(len(areas)))
        axes.imshow(drawn["hu"][chosen], vmin=0, vmax=80, cmap="gray")
        axes.set_axis_off()
        if outlines and areas.any():
            axes.contour(drawn["mask"][chosen], [0.5], colors="red", linewidths=0.6)
    figure.savefig(path, dpi=50)
