"""A model's scores on slices: one way for the hospital that tests its own and the server that tests held-out sites.

In: encoder with one set of heads, or several (an ensemble). Out: Scores, which stay where the slices are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.config import SYNTHETIC, ModelSettings
from shared.metrics import Scores
from shared.model.batches import read_batch
from shared.model.losses import dice_score
from shared.model.starting import load_starting, starting_file
from shared.model.swin import VARIANTS, MultiTaskSwin, autocast
from shared.slices import PIXEL_MM, SIDE_PX, SliceCache

BATCH = 32
_LEAST_PROBABILITY = 1e-6

State = Mapping[str, Tensor]


def build_model(settings: ModelSettings, seed: int) -> MultiTaskSwin:
    """The run's model with its initial weights; the same settings and seed give the same weights at every site.

    Raises:
      StartingModelError: model.pretrained is "synthetic" and no starting model fits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultiTaskSwin(VARIANTS[settings.variant], in_channels=len(settings.windows()))
    if settings.pretrained == SYNTHETIC:
        load_starting(model, starting_file(settings.variant), settings)
    model.cls.norm.frozen = settings.head_norm == "frozen"
    return model


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def score_slices(
    model: MultiTaskSwin,
    heads: Sequence[State],
    cache: SliceCache,
    rows: NDArray[np.int64],
    settings: ModelSettings,
    precision: str,
) -> Scores:
    """Run a model over slices.

    Args:
      model: holds the encoder; its heads are replaced by each of `heads` in turn.
      heads: one set of head tensors for a single model, several for an ensemble; empty keeps the model's own.
      cache, rows: the slices.
      settings: windows.
      precision: as in the run config.
    Returns:
      Scores; with several heads the probabilities are averaged, of the marker and of each pixel of the hematoma. Heads
      without a segmentation decoder (a probe) give no Dice.
    """
    device = next(model.parameters()).device
    model.eval()
    pixel_mm2 = (SIDE_PX * PIXEL_MM / model.shape.image_size) ** 2
    sets = list(heads) or [{}]
    segments = not heads or all(any(name.startswith("seg.") for name in state) for state in heads)
    logits, dices, areas, bloods = [], [], [], []
    for start in range(0, len(rows), BATCH):
        batch = read_batch(cache, rows[start : start + BATCH], settings.windows(), model.shape.image_size).to(device)
        with autocast(precision, device):
            stages = model.encode(batch.image)
        probability = torch.zeros(len(batch.label), device=device)
        hematoma_BYX = torch.zeros_like(batch.mask)
        for state in sets:
            if start == 0 or len(sets) > 1:  # a single set stays loaded
                model.load_state_dict(state, strict=False)
            with autocast(precision, device):
                marker, region_BYX = model.classify(stages), model.seg(stages)[:, 0]
            probability += marker.float().sigmoid() / len(sets)
            hematoma_BYX += region_BYX.float().sigmoid() / len(sets)
        logits.append(probability.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY).logit())
        marked_BYX = (hematoma_BYX > 0.5).float()
        blood = batch.mask.flatten(1).any(1)
        dice = dice_score(marked_BYX, batch.mask)
        dices.append(torch.where(batch.has_mask & blood & segments, dice, torch.nan))
        areas.append(torch.where(batch.has_mask & segments, marked_BYX.sum((1, 2)) * pixel_mm2, torch.nan))
        bloods.append(blood)
    return Scores(
        logit=torch.cat(logits).double().cpu().numpy() if logits else np.zeros(0),
        label=cache.label[rows].astype(np.float64),
        dice=torch.cat(dices).double().cpu().numpy() if dices else np.zeros(0),
        patient=cache.patient[rows],
        marked_mm2=torch.cat(areas).double().cpu().numpy() if areas else np.zeros(0),
        blood=torch.cat(bloods).cpu().numpy() if bloods else np.zeros(0, np.bool_),
    )
