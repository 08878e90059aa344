from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import ModelSettings, RunConfig
from shared.metrics import Scores
from shared.model.batches import read_batch
from shared.model.scoring import build_model, dice_score, score_slices
from shared.model.swin import MultiTaskSwin
from shared.slices import SliceCache
from tests.conftest import SmallHospitals

SETTINGS = ModelSettings(variant="demo")


def heads_of(model: MultiTaskSwin) -> dict[str, Tensor]:
    """A set of heads whose marker and hematoma are neither always called nor never."""
    heads = {n: v.clone() for n, v in model.state_dict().items() if not n.startswith("encoder.")}
    return heads | {"cls.weight": heads["cls.weight"] * 4, "seg.output.weight": heads["seg.output.weight"] * 5}


@pytest.fixture(scope="module")
def model() -> MultiTaskSwin:
    return build_model(SETTINGS, seed=0)


@pytest.fixture(scope="module")
def heads() -> list[dict[str, Tensor]]:
    return [heads_of(build_model(SETTINGS, seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def cache(hospitals: SmallHospitals) -> SliceCache:
    return hospitals.cache("hospital-01")


def score(
    model: MultiTaskSwin, sets: list[dict[str, Tensor]], cache: SliceCache, rows: np.ndarray | None = None
) -> Scores:
    return score_slices(model, sets, cache, np.arange(6) if rows is None else rows, SETTINGS, "fp32")


def marker(scores: Scores) -> np.ndarray:
    return 1 / (1 + np.exp(-scores.logit))


def test_one_seed_one_model() -> None:
    first, again, other = (build_model(SETTINGS, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.patch_embed.proj.weight"], other["encoder.patch_embed.proj.weight"])


def test_building_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    build_model(SETTINGS, seed=3)
    assert torch.equal(torch.rand(4), expected)


def test_the_random_numbers_before_do_not_change_the_model() -> None:
    torch.manual_seed(0)
    first = build_model(SETTINGS, seed=3).state_dict()
    torch.manual_seed(1)
    assert all(torch.equal(first[name], value) for name, value in build_model(SETTINGS, seed=3).state_dict().items())


def test_a_window_is_a_channel() -> None:
    built = build_model(replace(SETTINGS, windows_hu="0:80,-20:180"), seed=0)
    assert built.encoder.patch_embed.proj.in_channels == 2


def test_scores_are_the_models_own(model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache) -> None:
    rows = np.array([4, 1, 7])
    scores = score(model, heads[:1], cache, rows)
    own = build_model(SETTINGS, seed=0).eval()
    own.load_state_dict(heads[0], strict=False)
    batch = read_batch(cache, rows, SETTINGS.windows(), 128)
    with torch.no_grad():
        prediction = own(batch.image)
    np.testing.assert_allclose(scores.logit, prediction.hypodensity.numpy(), atol=1e-4)
    predicted = prediction.hematoma.numpy() > 0
    mask = batch.mask.numpy()
    for row in range(3):
        overlap, total = (predicted[row] * mask[row]).sum(), predicted[row].sum() + mask[row].sum()
        assert scores.dice[row] == pytest.approx((2 * overlap + 1) / (total + 1), abs=2e-3)
    assert scores.patient.tolist() == [cache.patient[row] for row in rows]
    np.testing.assert_array_equal(scores.label, cache.label[rows])


def test_no_heads_keeps_the_models_own(model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache) -> None:
    whole = build_model(SETTINGS, seed=0)
    whole.load_state_dict(heads[1], strict=False)
    np.testing.assert_array_equal(score(whole, [], cache).logit, score(model, heads[1:], cache).logit)


def test_scores_do_not_depend_on_how_slices_are_batched(
    model: MultiTaskSwin, cache: SliceCache, config: RunConfig
) -> None:
    rows = np.resize(cache.rows(), 35)  # more than one batch
    together = score_slices(model, [], cache, rows, config.model, config.train.precision)
    alone = score_slices(model, [], cache, rows[-1:], config.model, config.train.precision)
    assert len(together.logit) == len(together.dice) == len(together.label) == len(together.patient) == 35
    assert together.logit[-1] == pytest.approx(alone.logit[0], abs=1e-4)
    assert together.dice[-1] == pytest.approx(alone.dice[0], abs=1e-3)


def test_an_ensemble_of_twins_is_one(model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache) -> None:
    single, twins = score(model, heads[:1], cache), score(model, [heads[0], heads[0]], cache)
    np.testing.assert_allclose(twins.logit, single.logit, atol=1e-5)
    np.testing.assert_allclose(twins.dice, single.dice, atol=1e-5)


def test_an_ensemble_is_the_mean_probability(
    model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache
) -> None:
    one, two, both = (score(model, sets, cache) for sets in (heads[:1], heads[1:], heads))
    assert np.abs(marker(one) - marker(two)).min() > 1e-3
    np.testing.assert_allclose(marker(both), (marker(one) + marker(two)) / 2, atol=1e-6)


@torch.no_grad()
def test_an_ensemble_draws_where_the_mean_says_so(
    model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache
) -> None:
    rows = np.arange(6)
    batch = read_batch(cache, rows, SETTINGS.windows(), 128)
    pixels = []
    for state in heads:
        member = build_model(SETTINGS, seed=0).eval()
        member.load_state_dict(state, strict=False)
        pixels.append(member(batch.image).hematoma.double().sigmoid().numpy())
    predicted, mask = (pixels[0] + pixels[1]) / 2 > 0.5, batch.mask.numpy()
    assert 0 < predicted.mean() < 1
    expected = (2 * (predicted * mask).sum((1, 2)) + 1) / (predicted.sum((1, 2)) + mask.sum((1, 2)) + 1)
    np.testing.assert_allclose(score(model, heads, cache).dice, expected, atol=2e-3)


def test_dice_needs_a_mask(model: MultiTaskSwin, cache: SliceCache) -> None:
    has_mask = np.arange(len(cache.has_mask)) % 2 == 0
    dice = score(model, [], replace(cache, has_mask=has_mask)).dice
    assert np.isnan(dice).tolist() == [False, True, False, True, False, True]
    assert ((dice[::2] >= 0) & (dice[::2] <= 1)).all()


def test_a_probe_has_no_dice(model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache) -> None:
    probe = {name: value for name, value in heads[0].items() if name.startswith("cls.")}
    scores = score(model, [probe], cache)
    assert np.isnan(scores.dice).all()
    np.testing.assert_array_equal(scores.logit, score(model, heads[:1], cache).logit)


def test_unknown_labels_stay_unknown(model: MultiTaskSwin, cache: SliceCache) -> None:
    unknown = replace(cache, label=np.full(len(cache.label), np.nan, np.float32))
    scores = score(model, [], unknown)
    assert np.isnan(scores.label).all()
    assert np.isfinite(scores.logit).all()


def test_no_slices_no_scores(model: MultiTaskSwin, cache: SliceCache) -> None:
    scores = score(model, [], cache, np.zeros(0, np.int64))
    assert [len(v) for v in (scores.logit, scores.label, scores.dice, scores.patient)] == [0, 0, 0, 0]


def test_the_surest_scores_stay_finite(model: MultiTaskSwin, heads: list[dict[str, Tensor]], cache: SliceCache) -> None:
    sure = heads[0] | {"cls.bias": torch.tensor([200.0])}
    logit = score(model, [sure], cache).logit
    # The highest probability is 1 - 1e-6: logit 13.8.
    np.testing.assert_allclose(logit, 13.8, atol=0.1)


def test_dice_by_hand() -> None:
    predicted = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]], dtype=torch.bool)
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    # (2 x 1 + 1) / (4 + 1), 1 / 1, 1 / 2
    torch.testing.assert_close(dice_score(predicted, mask), torch.tensor([0.6, 1.0, 0.5]))
