"""Pictures of what the global model does on held-out hospitals' slices.

They show patients of hospitals whose data lie at the server; no training hospital's slice is ever here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.config import RunConfig
from shared.model.batches import read_batch
from shared.model.gradcam import grad_cam
from shared.model.swin import MultiTaskSwin, autocast
from shared.slices import SliceCache

COLUMNS = ("slice and mask", "prediction", "reconstruction", "Grad-CAM")
BRAIN_WINDOW_HU = (0.0, 80.0)


def choose(cache: SliceCache, positive: bool) -> int | None:
    """The slice of a site with the largest hematoma, with or without the marker; None if there is none."""
    fits = np.nonzero((cache.label == float(positive)) & cache.has_mask)[0]
    return int(max(fits, key=lambda row: int(cache.masks[row].sum()))) if len(fits) else None


def draw_examples(
    path: Path,
    model: MultiTaskSwin,
    heads: Sequence[Mapping[str, torch.Tensor]],
    caches: Mapping[str, SliceCache],
    config: RunConfig,
    most: int = 4,
) -> None:
    """Write a picture: one row per slice, the columns of COLUMNS.

    Args:
      path: PNG file.
      model, heads: the global model; of an ensemble the first set of heads is shown.
      caches: held-out site -> its slices; sites take turns, with and without the marker.
      config: the run's.
      most: number of rows.
    """
    chosen = []
    for number, (site, cache) in enumerate(caches.items()):
        row = choose(cache, positive=number % 2 == 0)
        if row is not None and len(chosen) < most:
            chosen.append((site, cache, row))
    if not chosen:
        return
    model.to("cpu")
    if heads:
        model.load_state_dict(heads[0], strict=False)
    model.eval()
    figure = Figure(figsize=(10, 2.6 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), len(COLUMNS), squeeze=False)
    for line, (site, cache, row) in zip(grid, chosen, strict=True):
        _draw_row(line, model, site, cache, row, config)
    figure.savefig(path, dpi=110)


def _draw_row(
    line: Sequence[Axes], model: MultiTaskSwin, site: str, cache: SliceCache, row: int, config: RunConfig
) -> None:
    """One slice: its mask, the prediction, the reconstruction, where the classifier looks."""
    batch = read_batch(cache, np.array([row]), config.model.windows(), model.shape.image_size)
    with torch.no_grad(), autocast(config.train.precision, torch.device("cpu")):
        prediction = model(batch.image)
    hematoma_YX = prediction.hematoma[0].float().sigmoid().numpy()
    probability = float(prediction.hypodensity.float().sigmoid())
    low, high = BRAIN_WINDOW_HU
    hu_YX = np.clip((cache.hu[row].astype(np.float32) - low) / (high - low), 0, 1)
    side = hu_YX.shape[0]
    extent = (0, side, side, 0)
    truth = "marker" if cache.label[row] == 1 else "no marker"
    titles = (f"{site}: {truth}", f"p(marker) = {probability:.2f}", COLUMNS[2], COLUMNS[3])
    for axes, title in zip(line, titles, strict=True):
        axes.set_title(title, fontsize=9, loc="left")
        axes.axis("off")
    for axes in (line[0], line[1], line[3]):
        axes.imshow(hu_YX, cmap="gray", vmin=0, vmax=1, extent=extent)
    line[0].contour(cache.masks[row], levels=[0.5], colors="#e4572e", linewidths=1, extent=extent, origin="upper")
    if (hematoma_YX > 0.5).any():
        line[1].contour(hematoma_YX, levels=[0.5], colors="#f2c14e", linewidths=1, extent=extent, origin="upper")
    line[2].imshow(prediction.reconstruction[0, 0].float().numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    cam_YX = grad_cam(model, batch.image)[0].numpy()
    line[3].imshow(cam_YX, cmap="inferno", alpha=0.5, vmin=0, vmax=1, extent=extent)
