from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shared.batches import Batch
from shared.config import LossSettings
from shared.losses import dice_loss, slice_losses
from shared.model import Prediction

LN2 = 0.6931472
NAN = math.nan


def made_batch(slices: int, seed: int, side: int = 8) -> tuple[Prediction, Batch]:
    """Random predictions and targets; slice 1 has no label, slice 2 no mask."""
    draw = torch.Generator().manual_seed(seed)
    prediction = Prediction(
        torch.randn(slices, generator=draw),
        torch.randn(slices, side, side, generator=draw),
        torch.rand(slices, 1, side, side, generator=draw),
    )
    label = (torch.rand(slices, generator=draw) < 0.5).float()
    has_mask = torch.ones(slices, dtype=torch.bool)
    label[1], has_mask[2] = NAN, False
    mask = (torch.rand(slices, side, side, generator=draw) < 0.3).float()
    return prediction, Batch(torch.rand(slices, 1, side, side, generator=draw), label, mask, has_mask)


def take(prediction: Prediction, batch: Batch, rows: list[int]) -> tuple[Prediction, Batch]:
    return (
        Prediction(prediction.hypodensity[rows], prediction.hematoma[rows], prediction.reconstruction[rows]),
        Batch(batch.image[rows], batch.label[rows], batch.mask[rows], batch.has_mask[rows]),
    )


def with_gradients(prediction: Prediction) -> tuple[Prediction, list[Tensor]]:
    leaves = [
        t.clone().requires_grad_(True) for t in (prediction.hypodensity, prediction.hematoma, prediction.reconstruction)
    ]
    return Prediction(*leaves), leaves


def test_classification_is_cross_entropy_and_an_unknown_label_adds_nothing() -> None:
    prediction = Prediction(torch.tensor([0.0, 2.0, -1.0, 5.0]), torch.zeros(4, 2, 2), torch.zeros(4, 1, 2, 2))
    batch = Batch(
        torch.zeros(4, 1, 2, 2),
        torch.tensor([1.0, 0.0, 1.0, NAN]),
        torch.zeros(4, 2, 2),
        torch.zeros(4, dtype=torch.bool),
    )
    # ln 2, ln(1 + e^2), ln(1 + e^1), nothing
    expected = torch.tensor([LN2, 2.1269280, 1.3132617, 0.0])
    torch.testing.assert_close(slice_losses(prediction, batch).cls, expected)


def test_segmentation_is_dice_plus_cross_entropy() -> None:
    prediction = Prediction(torch.zeros(1), torch.zeros(1, 2, 2), torch.zeros(1, 1, 2, 2))
    batch = Batch(
        torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.tensor([True])
    )
    # All probabilities 0.5: overlap 1, total 2 + 2; Dice loss 1 - (2 + 1) / (4 + 1) = 0.4; cross-entropy ln 2.
    torch.testing.assert_close(slice_losses(prediction, batch).seg, torch.tensor([0.4 + LN2]))


def test_dice_loss_by_hand() -> None:
    probability = torch.tensor([[[1.0, 0.5], [0.25, 0.25]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    # overlap 1.25, total 2 + 2: 1 - 3.5 / 5; empty meets empty: 1 - 1 / 1; nothing met: 1 - 1 / 5
    torch.testing.assert_close(dice_loss(probability, mask), torch.tensor([0.3, 0.0, 0.8]))


def test_reconstruction_is_the_mean_square_over_pixels_and_channels() -> None:
    reconstruction = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.25]]]])
    image = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.75]]]])
    prediction = Prediction(torch.zeros(1), torch.zeros(1, 1, 2), reconstruction)
    batch = Batch(image, torch.zeros(1), torch.zeros(1, 1, 2), torch.tensor([False]))
    # (1 + 0 + 0.25 + 0.25) / 4
    torch.testing.assert_close(slice_losses(prediction, batch).rec, torch.tensor([0.375]))


def test_the_total_weighs_with_the_papers_weights() -> None:
    reconstruction = torch.full((2, 1, 2, 2), 0.5)
    prediction = Prediction(torch.zeros(2), torch.zeros(2, 2, 2), reconstruction)
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]).expand(2, 2, 2)
    batch = Batch(torch.zeros(2, 1, 2, 2), torch.tensor([1.0, NAN]), mask, torch.tensor([False, True]))
    # cls (ln 2 + 0) / 2, seg (0 + 0.4 + ln 2) / 2, rec 0.25:
    # 0.3 x 0.3465736 + 0.4 x 0.5465736 + 0.4 x 0.25
    total = slice_losses(prediction, batch).total(LossSettings())
    assert total.item() == pytest.approx(0.4226015, abs=1e-6)
    assert slice_losses(prediction, batch).total(LossSettings(1.0, 0.0, 0.0)).item() == pytest.approx(
        0.3465736, abs=1e-6
    )


def test_a_batch_without_masks_learns_nothing_about_them() -> None:
    prediction, leaves = with_gradients(made_batch(3, seed=0)[0])
    batch = made_batch(3, seed=0)[1]
    batch = Batch(batch.image, batch.label, batch.mask, torch.zeros(3, dtype=torch.bool))
    losses = slice_losses(prediction, batch)
    assert losses.seg.tolist() == [0.0, 0.0, 0.0]
    losses.total(LossSettings()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[1].grad.any()
    assert leaves[0].grad.any()
    assert leaves[2].grad.any()


def test_a_batch_without_labels_learns_nothing_about_them() -> None:
    prediction, batch = made_batch(3, seed=0)
    prediction, leaves = with_gradients(prediction)
    losses = slice_losses(prediction, Batch(batch.image, torch.full((3,), NAN), batch.mask, batch.has_mask))
    assert losses.cls.tolist() == [0.0, 0.0, 0.0]
    losses.total(LossSettings()).backward()
    assert leaves[0].grad.tolist() == [0.0, 0.0, 0.0]
    assert leaves[1].grad.isfinite().all()


@pytest.mark.parametrize("where", ["mask", "hematoma", "hypodensity"])
def test_a_nan_that_does_not_count_does_not_spread(where: str) -> None:
    prediction, batch = made_batch(4, seed=1)  # slice 1 has no label, slice 2 no mask
    expected = slice_losses(prediction, batch)
    if where == "mask":
        batch.mask[2] = NAN
    elif where == "hematoma":
        prediction.hematoma[2] = NAN
    else:
        prediction.hypodensity[1] = NAN
    prediction, leaves = with_gradients(prediction)
    losses = slice_losses(prediction, batch)
    for found, unspoilt in zip(
        (losses.cls, losses.seg, losses.rec), (expected.cls, expected.seg, expected.rec), strict=True
    ):
        torch.testing.assert_close(found, unspoilt)
    losses.total(LossSettings()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_slices_losses_do_not_depend_on_its_neighbours() -> None:
    prediction, batch = made_batch(4, seed=2)
    others, other_batch = made_batch(4, seed=3)
    found = slice_losses(
        Prediction(
            torch.cat([prediction.hypodensity[:1], others.hypodensity]),
            torch.cat([prediction.hematoma[:1], others.hematoma]),
            torch.cat([prediction.reconstruction[:1], others.reconstruction]),
        ),
        Batch(
            torch.cat([batch.image[:1], other_batch.image]),
            torch.cat([batch.label[:1], other_batch.label]),
            torch.cat([batch.mask[:1], other_batch.mask]),
            torch.cat([batch.has_mask[:1], other_batch.has_mask]),
        ),
    )
    expected = slice_losses(prediction, batch)
    for name in ("cls", "seg", "rec"):
        torch.testing.assert_close(getattr(found, name)[0], getattr(expected, name)[0])
        assert getattr(expected, name)[0] > 0


def test_the_total_is_the_mean_of_the_slices_own_totals() -> None:
    prediction, batch = made_batch(5, seed=4)
    single = [slice_losses(*take(prediction, batch, [row])).total(LossSettings()).item() for row in range(5)]
    assert slice_losses(prediction, batch).total(LossSettings()).item() == pytest.approx(sum(single) / 5, rel=1e-6)


def test_half_precision_predictions_are_computed_in_float32() -> None:
    prediction, batch = made_batch(3, seed=5)
    half = Prediction(*(t.bfloat16() for t in (prediction.hypodensity, prediction.hematoma, prediction.reconstruction)))
    same = Prediction(*(t.float() for t in (half.hypodensity, half.hematoma, half.reconstruction)))
    found, expected = slice_losses(half, batch), slice_losses(same, batch)
    for name in ("cls", "seg", "rec"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(expected, name))
