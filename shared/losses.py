"""The three losses and their weighted sum.

Each loss is computed per slice and averaged over the batch's size, never over the number of labelled or
masked slices: so the loss of one patient's slices does not depend on who else is in the batch, which patient-
level privacy needs. A slice without a label adds nothing to cls, one without a mask nothing to seg.

Shape suffixes: B batch, C channel, Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shared.batches import Batch
from shared.config import LossSettings
from shared.model import Prediction

DICE_SMOOTHING_PX = 1.0  # added above and below, so that an empty mask met by an empty prediction scores 1


@dataclass(frozen=True)
class Losses:
    """Per-slice losses, float32 (B,) each; zero where a slice has no label or no mask."""

    cls: Tensor
    seg: Tensor
    rec: Tensor

    def total(self, weights: LossSettings) -> Tensor:
        """Weighted sum of the three batch means; scalar. Source: arXiv:2505.06185, equation 1."""
        return weights.cls * self.cls.mean() + weights.seg * self.seg.mean() + weights.rec * self.rec.mean()


def slice_losses(prediction: Prediction, batch: Batch) -> Losses:
    """Losses of every slice of a batch.

    Args:
      prediction: the model's outputs; any floating dtype, computed here in float32.
      batch: the inputs with labels and masks; an unknown label is NaN.
    Returns:
      cls: binary cross-entropy (nat). seg: soft Dice loss plus the pixels' mean binary cross-entropy.
      rec: mean squared error over pixels and channels, in squared windowed units.
    """
    known = ~torch.isnan(batch.label)
    cls = functional.binary_cross_entropy_with_logits(
        torch.where(known, prediction.hypodensity.float(), 0.0), torch.where(known, batch.label, 0.0), reduction="none"
    )
    masked = batch.has_mask[:, None, None]
    logit_BYX = torch.where(masked, prediction.hematoma.float(), 0.0)
    mask_BYX = torch.where(masked, batch.mask.float(), 0.0)
    cross_entropy = functional.binary_cross_entropy_with_logits(logit_BYX, mask_BYX, reduction="none").mean((1, 2))
    seg = cross_entropy + dice_loss(logit_BYX.sigmoid(), mask_BYX)
    rec = (prediction.reconstruction.float() - batch.image).square().mean((1, 2, 3))
    # torch.where before and after, not a product: a slice that does not count must not pass a NaN on, nor its gradient.
    return Losses(cls=torch.where(known, cls, 0.0), seg=torch.where(batch.has_mask, seg, 0.0), rec=rec)


def dice_loss(probability_BYX: Tensor, mask_BYX: Tensor) -> Tensor:
    """1 - soft Dice per slice, in [0, 1]; (B,). Source: Milletari et al. 2016 (arXiv:1606.04797), with linear terms."""
    return 1 - dice_score(probability_BYX, mask_BYX)


def dice_score(predicted_BYX: Tensor, mask_BYX: Tensor) -> Tensor:
    """Dice per slice of a thresholded or soft prediction in [0, 1]; (B,). Source: Dice 1945."""
    overlap = (predicted_BYX * mask_BYX).sum((1, 2))
    total = predicted_BYX.sum((1, 2)) + mask_BYX.sum((1, 2))
    return (2 * overlap + DICE_SMOOTHING_PX) / (total + DICE_SMOOTHING_PX)
