"""Combining a round's updates so that one hospital gone wrong cannot move the result at will.

The plain mean folds updates in one by one (server/federation/aggregate.py). The rules here compare updates with each other, so all of a
round's are in memory at once. They see differences from where the round began: of two nearly equal encoders, distances
taken in float32 would be rounding. Shape suffixes: N sites, D values of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import trim_mean

from server.federation.aggregate import WeightedSum, fold, mean
from shared.config import FederationSettings
from shared.wire.records import Tensors

_LEAST_NORM = 1e-12
# An update may be this many times as long as the run's initial tensors, whatever the rule. Measured of honest rounds of 28
# steps: 0.10 at the default rates, 0.87 at the highest that hospitals accept; there weight decay ends the growth near 12.
LONGEST = 100.0


@dataclass(frozen=True)
class Combined:
    """A round's result before the server's step.

    Attributes:
      arrays: name -> float32 array, as an average of sites' tensors.
      shrunk: site -> what its update was multiplied by, of those that were longer than the bound.
    """

    arrays: Tensors
    shrunk: dict[str, float]


def is_plain(settings: FederationSettings) -> bool:
    """Whether a round is the plain mean, which needs one update in memory at a time."""
    return settings.rule == "mean" and not settings.norm_bound


def update_norm(update: Tensors, start: Tensors) -> float:
    """Length of an update: the root of the sum of squares of its difference from `start`, without running statistics."""
    squares = (
        np.square(value.astype(np.float64) - start[name]).sum()
        for name, value in update.items()
        if ".running_" not in name
    )
    return float(np.sqrt(sum(squares)))


def longest_update(initial: Tensors) -> float:
    """Length beyond which an update is refused: LONGEST times that of the tensors that the run began with.

    Relative to the start of the run and not of the round: else one hospital could double the tensors in each round, until
    they are beyond what any hospital takes.
    """
    return LONGEST * update_norm(initial, {name: np.zeros_like(value) for name, value in initial.items()})


def combine(
    updates: Mapping[str, Tensors], weights: Mapping[str, float], start: Tensors, settings: FederationSettings
) -> Combined:
    """Combine updates by federation.rule, after shortening those that federation.norm_bound excludes.

    Args:
      updates: site -> its tensors after the round, float32; names and shapes as in `start`.
      weights: site -> public weight; the median, the trimmed mean and Krum count each site once.
      start: the tensors that the round began with.
      settings: the run config's federation section; parse_config has checked that its quorum suffices for the rule.
    Source: norm bounding: Sun et al. 2019 (arXiv:1911.07963), section 5, with a bound relative to the round's median;
      median and trimmed mean: Yin et al. 2018 (arXiv:1803.01498); Krum: Blanchard et al. 2017 (arXiv:1703.02757).
    """
    sites = sorted(updates)
    norms = {site: update_norm(updates[site], start) for site in sites}
    bound = settings.norm_bound * float(np.median(list(norms.values()))) if settings.norm_bound else np.inf
    shrunk = {site: bound / norms[site] for site in sites if norms[site] > max(bound, _LEAST_NORM)}
    differences = {
        site: {n: (updates[site][n] - start[n]) * np.float32(shrunk.get(site, 1.0)) for n in start} for site in sites
    }
    if settings.rule == "mean":
        total = WeightedSum({})
        for site in sites:
            total = fold(total, differences[site], weights[site])
        combined = mean(total)
    else:
        combined = _by_rule(settings, [differences[site] for site in sites])
    return Combined({n: (start[n] + combined[n]).astype(np.float32) for n in start}, shrunk)


def _by_rule(settings: FederationSettings, differences: list[Tensors]) -> Tensors:
    """Combine the sites' differences by median, trimmed mean or Krum."""
    if settings.rule == "krum":
        return _krum(differences, settings.faulty)
    stacked = {name: np.stack([one[name] for one in differences]) for name in differences[0]}
    if settings.rule == "median":
        return {name: np.median(value, axis=0) for name, value in stacked.items()}
    # int(proportion * sites) are cut at each end; the addend keeps rounding from making that one less.
    proportion = settings.faulty / len(differences) + 1e-9
    return {name: trim_mean(value, proportion, axis=0) for name, value in stacked.items()}


def _krum(differences: list[Tensors], faulty: int) -> Tensors:
    """The one update that lies closest to its n - faulty - 2 nearest others; squared distances, float32."""
    flat_ND = np.stack([np.concatenate([one[name].ravel() for name in sorted(one)]) for one in differences])
    squares_N = np.square(flat_ND).sum(axis=1)
    distance_NN = squares_N[:, None] + squares_N[None, :] - 2 * flat_ND @ flat_ND.T
    nearest = max(1, len(differences) - faulty - 2)
    scores_N = np.sort(distance_NN, axis=1)[:, 1 : nearest + 1].sum(axis=1)  # the first is the update itself
    return differences[int(np.argsort(scores_N)[0])]  # a score that is not a number comes last
