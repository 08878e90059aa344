from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.config import LossSettings
from shared.model.batches import Batch
from shared.model.losses import GRADNORM_ALPHA, Losses, TaskBalance, dice_loss, slice_losses
from shared.model.swin import Prediction

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


def balanced(losses: Losses, settings: LossSettings | None = None) -> Tensor:
    return TaskBalance(settings or LossSettings()).total(losses)


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
    total = balanced(slice_losses(prediction, batch))
    assert total.item() == pytest.approx(0.4226015, abs=1e-6)
    assert balanced(slice_losses(prediction, batch), LossSettings(1.0, 0.0, 0.0)).item() == pytest.approx(
        0.3465736, abs=1e-6
    )


def test_a_batch_without_masks_learns_nothing_about_them() -> None:
    prediction, leaves = with_gradients(made_batch(3, seed=0)[0])
    batch = made_batch(3, seed=0)[1]
    batch = Batch(batch.image, batch.label, batch.mask, torch.zeros(3, dtype=torch.bool))
    losses = slice_losses(prediction, batch)
    assert losses.seg.tolist() == [0.0, 0.0, 0.0]
    balanced(losses).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[1].grad.any()
    assert leaves[0].grad.any()
    assert leaves[2].grad.any()


def test_a_batch_without_labels_learns_nothing_about_them() -> None:
    prediction, batch = made_batch(3, seed=0)
    prediction, leaves = with_gradients(prediction)
    losses = slice_losses(prediction, Batch(batch.image, torch.full((3,), NAN), batch.mask, batch.has_mask))
    assert losses.cls.tolist() == [0.0, 0.0, 0.0]
    balanced(losses).backward()
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
    balanced(losses).backward()
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
    single = [balanced(slice_losses(*take(prediction, batch, [row]))).item() for row in range(5)]
    assert balanced(slice_losses(prediction, batch)).item() == pytest.approx(sum(single) / 5, rel=1e-6)


def test_half_precision_predictions_are_computed_in_float32() -> None:
    prediction, batch = made_batch(3, seed=5)
    half = Prediction(*(t.bfloat16() for t in (prediction.hypodensity, prediction.hematoma, prediction.reconstruction)))
    same = Prediction(*(t.float() for t in (half.hypodensity, half.hematoma, half.reconstruction)))
    found, expected = slice_losses(half, batch), slice_losses(same, batch)
    for name in ("cls", "seg", "rec"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_task_that_was_left_out_costs_nothing() -> None:
    prediction, batch = made_batch(3, seed=6)
    losses = slice_losses(Prediction(prediction.hypodensity, None, None), batch)
    assert losses.seg.tolist() == losses.rec.tolist() == [0.0, 0.0, 0.0]
    assert losses.cls.any()


def single(cls: float, seg: float, rec: float) -> Losses:
    return Losses(*(torch.tensor([v], requires_grad=True) for v in (cls, seg, rec)))


def test_uncertainty_weighting_by_hand() -> None:
    balance = TaskBalance(LossSettings(0.5, 1.0, 0.0, "uncertainty"))
    # s = -ln of the weights: ln 2 and 0; 0.5 x 0.8 + ln 2 / 2, 1 x 0.6 + 0, and the third task is left out.
    total = balance.total(single(0.8, 0.6, 9.0))
    assert total.item() == pytest.approx(0.4 + LN2 / 2 + 0.6, abs=1e-6)
    total.backward()
    # d/ds of exp(-s) L + s / 2
    torch.testing.assert_close(balance.log_variance.grad, torch.tensor([-0.4 + 0.5, -0.6 + 0.5, 0.0]))
    assert balance.weights() == pytest.approx({"cls": 0.5, "seg": 1.0, "rec": 0.0})
    regression = TaskBalance(LossSettings(0.0, 0.0, 1.0, "uncertainty"))
    assert regression.total(single(9.0, 9.0, 0.4)).item() == pytest.approx(0.2)  # half the squared error


def test_gradnorm_by_hand() -> None:
    balance = TaskBalance(LossSettings(0.5, 0.25, 0.25, "gradnorm"))
    shared = nn.Parameter(torch.tensor([1.0]))

    def losses(cls: float, seg: float, rec: float) -> Losses:
        return Losses(*(shared * v for v in (cls, seg, rec)))

    balance.prepare(losses(2.0, 4.0, 8.0), shared)
    # Gradients 2, 4, 8 weigh 1, 1, 2; all tasks are where they began, so the target is their mean, 4 / 3.
    assert balance.weight.grad.tolist() == [-2.0, -4.0, 8.0]
    assert balance.first.tolist() == [2.0, 4.0, 8.0]
    balance.prepare(losses(2.0, 4.0, 2.0), shared)
    # Gradients weigh 1, 1, 0.5; the third trained four times as fast: rates 4/3, 4/3, 1/3 to the power of alpha.
    targets = [2.5 / 3 * rate**GRADNORM_ALPHA for rate in (4 / 3, 4 / 3, 1 / 3)]
    assert [g > t for g, t in zip((1, 1, 0.5), targets, strict=True)] == [False, False, True]
    assert balance.weight.grad.tolist() == [-2.0, -4.0, 2.0]
    assert balance.total(losses(2.0, 4.0, 2.0)).item() == pytest.approx(0.5 * 2 + 0.25 * 4 + 0.25 * 2)


def test_gradnorms_weights_stay_positive_and_keep_their_sum() -> None:
    balance = TaskBalance(LossSettings(0.5, 0.5, 0.0, "gradnorm"))
    with torch.no_grad():
        balance.weight.copy_(torch.tensor([-0.3, 2.0, 0.4]))
    balance.settle()
    assert balance.weight.sum().item() == pytest.approx(1.0)
    assert balance.weight[0] > 0
    assert balance.weight[2] == 0
    fixed = TaskBalance(LossSettings())
    fixed.prepare(single(1.0, 1.0, 1.0), torch.zeros(1))
    fixed.settle()
    assert fixed.weights() == pytest.approx({"cls": 0.3, "seg": 0.4, "rec": 0.4})
    assert not list(fixed.parameters())


def test_the_gradient_of_a_task_is_its_weight() -> None:
    balance, losses = TaskBalance(LossSettings(0.3, 0.4, 0.0)), single(2.0, 5.0, 7.0)
    total = balance.total(losses)
    assert total.item() == pytest.approx(0.3 * 2 + 0.4 * 5)
    total.backward()
    assert [v.grad.item() for v in (losses.cls, losses.seg, losses.rec)] == pytest.approx([0.3, 0.4, 0.0])


def test_uncertainty_weighting_with_given_variances() -> None:
    balance, losses = TaskBalance(LossSettings(1.0, 1.0, 1.0, "uncertainty")), single(2.0, 3.0, 5.0)
    with torch.no_grad():
        balance.log_variance.copy_(torch.tensor([4.0, 1.0, 0.5]).log())
    total = balance.total(losses)
    # 2 / 4 + ln 4 / 2, 3 / 1 + 0, and the reconstruction's 5 / (2 x 0.5) - ln 2 / 2
    assert total.item() == pytest.approx(0.5 + LN2 + 3 + 5 - LN2 / 2, abs=1e-5)
    total.backward()
    torch.testing.assert_close(balance.log_variance.grad, torch.tensor([-0.5, -3.0, -5.0]) + 0.5)
    assert [v.grad.item() for v in (losses.cls, losses.seg, losses.rec)] == pytest.approx([0.25, 1.0, 1.0])


class TwoLayers(nn.Module):
    """y = A W x; row 1 of A is the classification, row 2 the segmentation, each with the loss y^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(2, 2, bias=False)
        self.tasks = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.shared.weight.copy_(torch.eye(2))
            self.tasks.weight.copy_(torch.diag(torch.tensor([1.0, 2.0])))

    def forward(self, x_D: Tensor) -> Losses:
        cls, seg = self.tasks(self.shared(x_D)).square() / 2
        return Losses(cls[None], seg[None], torch.zeros(1))


def test_gradnorm_of_two_layers_by_hand() -> None:
    model, x_D = TwoLayers(), torch.tensor([3.0, 4.0])
    balance = TaskBalance(LossSettings(0.8, 0.2, 0.0, "gradnorm"))
    losses = model(x_D)
    balance.prepare(losses, model.shared.weight)
    # y = 3 and 8; the gradient in W is y a x^T, its norm |y| |a| |x| = 3 x 1 x 5 and 8 x 2 x 5. Weighed 12 and 16, target 14.
    torch.testing.assert_close(balance.weight.grad, torch.tensor([-15.0, 80.0, 0.0]))
    balance.total(losses).backward()  # the graph is still there, and the model's gradient that of 0.8 L1 + 0.2 L2
    torch.testing.assert_close(model.shared.weight.grad, torch.tensor([[0.8 * 9.0, 0.8 * 12.0], [0.2 * 48, 0.2 * 64]]))
    torch.testing.assert_close(balance.weight.grad, torch.tensor([-15.0, 80.0, 0.0]))

    with torch.no_grad():
        model.shared.weight[1, 1] = 0.5
    balance.prepare(model(x_D), model.shared.weight)
    # y = 3 and 4: norms 15 and 40, weighed 12 and 8, mean 10. The second loss fell to a quarter, so it trains too fast:
    # rates 1.6 and 0.4 times their mean, targets 10 x 1.6^1.5 = 20.2 and 10 x 0.4^1.5 = 2.5.
    torch.testing.assert_close(balance.weight.grad, torch.tensor([-15.0, 40.0, 0.0]))
    assert balance.first.tolist()[:2] == [4.5, 32.0]


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "gradnorm"])
def test_weights_while_a_model_learns(weighting: str) -> None:
    torch.manual_seed(0)
    model, balance = TwoLayers(), TaskBalance(LossSettings(0.3, 0.4, 0.0, weighting))
    optimiser = torch.optim.AdamW([*model.parameters(), *balance.parameters()], lr=0.1, weight_decay=0.0)
    for _ in range(30):
        losses = model(torch.randn(2))
        optimiser.zero_grad()
        balance.prepare(losses, model.shared.weight)
        balance.total(losses).backward()
        optimiser.step()
        balance.settle()
        weights = balance.weights()
        assert min(weights["cls"], weights["seg"]) > 0
        assert weights["rec"] == 0
        if weighting != "uncertainty":
            assert sum(weights.values()) == pytest.approx(0.7)
    assert (weights == pytest.approx({"cls": 0.3, "seg": 0.4, "rec": 0.0})) == (weighting == "fixed")


def test_gradnorm_begins_with_the_first_loss_that_counts() -> None:
    balance = TaskBalance(LossSettings(0.5, 0.5, 0.0, "gradnorm"))
    shared = nn.Parameter(torch.tensor([1.0]))
    nothing = torch.zeros(1)
    # No slice of the first batch has a mask: its segmentation loss of 0 says nothing of where that task began.
    balance.prepare(Losses(shared * 2.0, shared * 0.0, nothing), shared)
    balance.prepare(Losses(shared * 2.0, shared * 4.0, nothing), shared)
    assert balance.first.tolist()[:2] == [2.0, 4.0]
    assert balance.weight.grad.tolist() == [-2.0, 4.0, 0.0]  # both are where they began; weighed 1 and 2, target 1.5
