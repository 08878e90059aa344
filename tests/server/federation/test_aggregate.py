from __future__ import annotations

import numpy as np
import pytest

from server.federation.aggregate import WeightedSum, fold, mean
from shared.wire.records import UpdateError


def updates(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
        for _ in range(count)
    ]


def folded(parts: list[dict], weights: list[float]) -> dict[str, np.ndarray]:
    total = WeightedSum({})
    for part, weight in zip(parts, weights, strict=True):
        total = fold(total, part, weight)
    return mean(total)


def test_hand_computed_mean() -> None:
    parts = [{"a": np.array([1.0, 2.0], np.float32)}, {"a": np.array([4.0, -2.0], np.float32)}]
    # (1 * 1 + 3 * 4) / 4 = 3.25 and (1 * 2 - 3 * 2) / 4 = -1
    np.testing.assert_array_equal(folded(parts, [1.0, 3.0])["a"], np.array([3.25, -1.0], np.float32))


def test_streamed_mean_is_numpys() -> None:
    parts, weights = updates(7), [1.0, 2.5, 0.3, 4.0, 1.0, 9.0, 0.01]
    for name, value in folded(parts, weights).items():
        expected = np.average([p[name].astype(np.float64) for p in parts], axis=0, weights=weights)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert value.dtype == np.float32


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.1, 1e6])
def test_the_mean_of_one_update_is_that_update(weight: float) -> None:
    (part,) = updates(1)
    for name, value in folded([part], [weight]).items():
        np.testing.assert_array_equal(value, part[name])


def test_two_equal_updates_are_one() -> None:
    (part,) = updates(1)
    for name, value in folded([part, part], [1.0, 2.0]).items():
        np.testing.assert_array_equal(value, part[name])


def test_folding_leaves_the_updates_alone() -> None:
    parts = updates(3)
    before = [{n: v.copy() for n, v in p.items()} for p in parts]
    folded(parts, [1.0, 1.0, 1.0])
    for part, copy in zip(parts, before, strict=True):
        for name in part:
            np.testing.assert_array_equal(part[name], copy[name])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_positive_and_finite(weight: float) -> None:
    with pytest.raises(UpdateError, match="weight"):
        fold(WeightedSum({}), updates(1)[0], weight)


def test_other_names_or_shapes_are_refused() -> None:
    first, second = updates(2)
    total = fold(WeightedSum({}), first, 1.0)
    with pytest.raises(UpdateError, match="names or shapes"):
        fold(total, {"a": second["a"]}, 1.0)
    with pytest.raises(UpdateError, match="names or shapes"):
        fold(total, second | {"b": second["b"][:1]}, 1.0)


def test_nothing_cannot_be_averaged() -> None:
    with pytest.raises(UpdateError, match="at least one"):
        mean(WeightedSum({}))
