"""The three losses and how they are weighed against each other.

Each loss is computed per slice and averaged over the batch's size, never over the number of labelled or
masked slices: so the loss of one patient's slices does not depend on who else is in the batch, which patient-
level privacy needs. A slice without a label adds nothing to cls, one without a mask nothing to seg.

Shape suffixes: B batch, C channel, Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import LossSettings
from shared.model.batches import Batch
from shared.model.swin import Prediction

TASKS = ("cls", "seg", "rec")
GRADNORM_ALPHA = 1.5  # how strongly GradNorm pulls tasks to one rate; the paper's value for tasks of different kinds
DICE_SMOOTHING_PX = 1.0  # added above and below, so that an empty mask met by an empty prediction scores 1


@dataclass(frozen=True)
class Losses:
    """Per-slice losses, float32 (B,) each; zero where a slice has no label or no mask, and for a task left out."""

    cls: Tensor
    seg: Tensor
    rec: Tensor

    def means(self) -> Tensor:
        """The three batch means, (3,) in the order of TASKS."""
        return torch.stack([self.cls.mean(), self.seg.mean(), self.rec.mean()])


class TaskBalance(nn.Module):
    """Weighs the tasks; what it learns stays in the hospital, like the heads.

    Args:
      settings: the weights and whether they are learned.

    weighting "fixed": arXiv:2505.06185, equation 1.
    weighting "uncertainty": Kendall, Gal and Cipolla 2018 (arXiv:1705.07115), equation 7 for a regression and 10 for a
      classification: exp(-s) L + s / 2 with s the logarithm of a learned variance (half of the first term for the
      reconstruction), begun where exp(-s) is the settings' weight.
    weighting "gradnorm": Chen et al. 2018 (arXiv:1711.02257), algorithm 1: weights follow the gradient norms at a shared
      layer until every task trains at the same relative rate; their sum stays what the settings say.
    """

    def __init__(self, settings: LossSettings):
        super().__init__()
        self.active: Tensor
        self.fixed: Tensor
        self.first: Tensor
        self.settings = settings
        weights = torch.tensor([settings.cls, settings.seg, settings.rec])
        self.register_buffer("active", weights > 0)
        self.register_buffer("fixed", weights)
        if settings.weighting == "uncertainty":
            self.log_variance = nn.Parameter(-weights.clamp_min(1e-6).log())
        if settings.weighting == "gradnorm":
            self.weight = nn.Parameter(weights.clone())
            self.register_buffer("first", torch.zeros(3))  # the tasks' losses when they first counted

    def total(self, losses: Losses) -> Tensor:
        """The scalar to minimise; carries gradients to the model and to what is learned here."""
        means = losses.means()
        if self.settings.weighting == "uncertainty":
            regression = means.new_tensor([1.0, 1.0, 0.5])
            terms = regression * torch.exp(-self.log_variance) * means + 0.5 * self.log_variance
            return torch.where(self.active, terms, 0.0).sum()
        if self.settings.weighting == "gradnorm":
            return (self.weight.detach() * means).sum()
        return (self.fixed * means).sum()

    def prepare(self, losses: Losses, shared: Tensor) -> None:
        """Set the gradient of GradNorm's weights; to be called before the loss's own backward, which frees the graph.

        Args:
          losses: of this step.
          shared: parameter of the last layer that all tasks share.
        """
        if self.settings.weighting != "gradnorm":
            return
        means = losses.means()
        now = means.detach()
        active = self.active & (now > 0)  # a batch without labels or masks says nothing of that task
        self.first.copy_(torch.where(active & (self.first == 0), now, self.first))
        norms = torch.zeros_like(means)
        for task in torch.nonzero(active).flatten().tolist():
            (gradient,) = torch.autograd.grad(means[task], shared, retain_graph=True)
            norms[task] = gradient.float().norm()
        ratio = (now / self.first)[active]
        weighted = (self.weight.detach() * norms)[active]
        target = weighted.mean() * (ratio / ratio.mean()) ** GRADNORM_ALPHA
        slope = torch.zeros_like(means)
        slope[active] = torch.sign(weighted - target) * norms[active]
        self.weight.grad = slope

    @torch.no_grad()
    def settle(self) -> None:
        """After the optimiser's step: GradNorm's weights stay positive, and their sum what it was."""
        if self.settings.weighting == "gradnorm":
            kept = torch.where(self.active, self.weight.clamp_min(1e-3), 0.0)
            self.weight.copy_(kept * self.fixed.sum() / kept.sum())

    def weights(self) -> dict[str, float]:
        """Return the present weight of each task."""
        if self.settings.weighting == "uncertainty":
            now = torch.where(self.active, torch.exp(-self.log_variance.detach()), 0.0)
        else:
            now = self.weight.detach() if self.settings.weighting == "gradnorm" else self.fixed
        return dict(zip(TASKS, now.tolist(), strict=True))


def slice_losses(prediction: Prediction, batch: Batch) -> Losses:
    """Losses of every slice of a batch.

    Args:
      prediction: the model's outputs; any floating dtype, computed here in float32. A task that was left out gives 0.
      batch: the inputs with labels and masks; an unknown label is NaN.
    Returns:
      cls: binary cross-entropy (nat). seg: soft Dice loss plus the pixels' mean binary cross-entropy.
      rec: mean squared error over pixels and channels, in squared windowed units.
    """
    known = ~torch.isnan(batch.label)
    cls = functional.binary_cross_entropy_with_logits(
        torch.where(known, prediction.hypodensity.float(), 0.0), torch.where(known, batch.label, 0.0), reduction="none"
    )
    nothing = torch.zeros_like(cls)
    return Losses(
        cls=torch.where(known, cls, 0.0),
        seg=nothing if prediction.hematoma is None else _segmentation(prediction.hematoma, batch),
        rec=nothing
        if prediction.reconstruction is None
        else (prediction.reconstruction.float() - batch.image).square().mean((1, 2, 3)),
    )


def _segmentation(hematoma_BYX: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy and Dice of every slice with a mask, 0 for one without; (B,)."""
    masked = batch.has_mask[:, None, None]
    logit_BYX = torch.where(masked, hematoma_BYX.float(), 0.0)
    mask_BYX = torch.where(masked, batch.mask.float(), 0.0)
    cross_entropy = functional.binary_cross_entropy_with_logits(logit_BYX, mask_BYX, reduction="none").mean((1, 2))
    seg = cross_entropy + dice_loss(logit_BYX.sigmoid(), mask_BYX)
    # torch.where before and after, not a product: a slice that does not count must not pass a NaN on, nor its gradient.
    return torch.where(batch.has_mask, seg, 0.0)


def dice_loss(probability_BYX: Tensor, mask_BYX: Tensor) -> Tensor:
    """1 - soft Dice per slice, in [0, 1]; (B,). Source: Milletari et al. 2016 (arXiv:1606.04797), with linear terms."""
    return 1 - dice_score(probability_BYX, mask_BYX)


def dice_score(predicted_BYX: Tensor, mask_BYX: Tensor) -> Tensor:
    """Dice per slice of a thresholded or soft prediction in [0, 1]; (B,). Source: Dice 1945."""
    overlap = (predicted_BYX * mask_BYX).sum((1, 2))
    total = predicted_BYX.sum((1, 2)) + mask_BYX.sum((1, 2))
    return (2 * overlap + DICE_SMOOTHING_PX) / (total + DICE_SMOOTHING_PX)
