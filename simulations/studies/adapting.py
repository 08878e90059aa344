"""Adapting a trained model to an unseen hospital without its labels; its own slices are all that is used.

Nothing here leaves the hospital: it is what a hospital that receives a model could do on its own.

Shape suffixes: N slice, B batch, C channel, Y row, X column.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from shared.config import RunConfig
from shared.model.batches import make_batch, make_inputs
from shared.model.losses import slice_losses
from shared.model.swin import MultiTaskSwin
from shared.slices import SliceCache

BRAIN_HU = (10.0, 60.0)  # what counts as brain when its level is measured
STEPS, RATE = 40, 1e-4
_BATCH = 16


def brain_level_hu(cache: SliceCache, most: int = 60) -> float:
    """A hospital's brain: median HU of what its skulls enclose, hematoma and all, over some of its slices.

    The one normalisation statistic that differs between calibrations; the model has layer norms alone, which keep no
    statistics of the training data that could be adapted.
    """
    rows = np.unique(np.linspace(0, len(cache.label) - 1, most).astype(int))
    values = []
    for row in rows:
        hu_YX = ndimage.uniform_filter(cache.hu[row].astype(np.float32), 3)
        inside_YX = ndimage.binary_fill_holes(hu_YX > 150) & (hu_YX < 150)
        inside_YX = ndimage.binary_erosion(inside_YX, iterations=12)  # away from cupping and the skull's blur
        values.append(hu_YX[inside_YX & (hu_YX > BRAIN_HU[0]) & (hu_YX < BRAIN_HU[1])])
    return float(np.median(np.concatenate(values)))


def calibrated(cache: SliceCache, level_hu: float) -> SliceCache:
    """A hospital's slices, shifted so that its brain has the level of the training hospitals'.

    Args:
      cache: the unseen hospital's.
      level_hu: brain_level_hu of the training hospitals, one number that they would release.
    """
    shift = round(level_hu - brain_level_hu(cache))
    hu: NDArray[np.int16] = np.asarray(cache.hu)
    return replace(cache, hu=np.where(hu > -500, hu + np.int16(shift), hu).astype(np.int16))


def retrained(model: MultiTaskSwin, cache: SliceCache, config: RunConfig) -> MultiTaskSwin:
    """Test-time training on the reconstruction of the hospital's own slices, the heads left as they are.

    Source: Sun et al. 2020 (arXiv:1909.13231), with the reconstruction as the auxiliary task (Gandelsman et al. 2022,
    arXiv:2209.07522). Only the first two stages of the encoder move, so that what the heads read stays near.

    Args:
      model: changed in place.
      cache: the unseen hospital's slices; labels and masks are not looked at.
    """
    inputs = make_inputs(cache, cache.rows(), config.model.windows(), model.shape.image_size)
    moved = [p for n, p in model.encoder.named_parameters() if n.startswith(("patch_embed.", "layers.0.", "layers.1."))]
    optimiser = torch.optim.Adam(moved, lr=RATE)
    generator = torch.Generator().manual_seed(config.run.seed)
    for _ in range(STEPS):
        chosen = torch.randperm(len(inputs), generator=generator)[:_BATCH].numpy()
        batch = make_batch(inputs, chosen, "pose", generator)
        loss = slice_losses(model(batch.image, segment=False), batch).rec.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()
