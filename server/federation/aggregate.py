"""Updates to a mean: pure functions on arrays.

Updates are folded in one by one, so that one of them is in memory at a time. The caller folds in a fixed order
(by site name); with that the sum does not depend on who answered first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.wire.records import Tensors, UpdateError


@dataclass(frozen=True)
class WeightedSum:
    """A running sum of weighted updates, float64, and the sum of their weights."""

    arrays: dict[str, NDArray[np.float64]]
    weight: float = 0.0


def fold(total: WeightedSum, update: Tensors, weight: float) -> WeightedSum:
    """Add one update; the arrays of `total` are reused and must not be used again.

    Args:
      total: what was folded in so far; WeightedSum({}) at first.
      update: name -> float32 array; names and shapes as in the first update.
      weight: the site's public weight, finite and > 0, unitless.
    Raises:
      UpdateError: a weight that is not positive and finite, or other names or shapes than before.
    Source: McMahan et al. 2017, Algorithm 1 (arXiv:1602.05629).
    """
    if not (np.isfinite(weight) and weight > 0):
        raise UpdateError(f"weight {weight!r}, expected finite and more than 0")
    if not total.weight:
        return WeightedSum({name: value.astype(np.float64) * weight for name, value in update.items()}, weight)
    if {n: v.shape for n, v in update.items()} != {n: v.shape for n, v in total.arrays.items()}:
        raise UpdateError("names or shapes differ from those of the updates before")
    for name, value in update.items():
        total.arrays[name] += value.astype(np.float64) * weight
    return WeightedSum(total.arrays, total.weight + weight)


def mean(total: WeightedSum) -> dict[str, NDArray[np.float32]]:
    """The weighted mean, float32.

    Raises:
      UpdateError: nothing was folded in.
    """
    if not total.weight:
        raise UpdateError("no update to average; expected at least one")
    return {name: (value / total.weight).astype(np.float32) for name, value in total.arrays.items()}
