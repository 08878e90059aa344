from __future__ import annotations

import math

import numpy as np
import pytest

from server.federation.aggregate import WeightedSum, fold, mean
from server.federation.robust import update_norm
from server.federation.round_line import describe_round
from server.federation.strategy import RoundResult, SiteRound
from server.storage.checkpoint import Moments

START = {"encoder.w": np.zeros(4, np.float32)}


def agreement(*updates: list[float]) -> float | None:
    """Of hospitals with these updates."""
    total, sites = WeightedSum({}), {}
    for number, values in enumerate(updates):
        update = {"encoder.w": np.array(values, np.float32)}
        total = fold(total, update, 1.0)
        sites[f"hospital-{number}"] = SiteRound(1.0, 0, update_norm(update, START), {}, None)
    moved = update_norm(mean(total), START)
    return describe_round(1, RoundResult({}, Moments(), sites, {}, {}, 0, 1.0, moved)).agreement


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([[1, 0, 0, 0], [1, 0, 0, 0]], 1.0),
        ([[1, 0, 0, 0], [0, 1, 0, 0]], math.sqrt(0.5)),
        ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 0.5),
        ([[1, 0, 0, 0], [-1, 0, 0, 0]], 0.0),
    ],
)
def test_agreement_is_one_for_one_direction_and_a_root_for_none_in_common(
    updates: list[list[float]], expected: float
) -> None:
    assert agreement(*updates) == pytest.approx(expected, abs=1e-4)


def test_a_round_in_which_nothing_moved_has_no_agreement() -> None:
    assert agreement([0, 0, 0, 0], [0, 0, 0, 0]) is None
