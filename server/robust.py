"""Combining a round's updates so that one hospital gone wrong cannot move the result at will.

The plain mean folds updates in one by one (server/aggregate.py). The rules here compare updates with each other, so all of a
round's are in memory at once. Median, trimmed mean and Krum are Flower's own, given differences from where the round
began: of two nearly equal encoders, distances taken in float32 would be rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from server.aggregate import WeightedSum, fold, mean
from shared.config import FederationSettings
from shared.wire import Tensors, to_record

_LEAST_NORM = 1e-12


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
        combined = _by_flower(_strategy(settings, len(sites)), [differences[site] for site in sites])
    return Combined({n: (start[n] + combined[n]).astype(np.float32) for n in start}, shrunk)


def _strategy(settings: FederationSettings, sites: int) -> FedAvg:
    """Flower's strategy of a rule."""
    common = {"weighted_by_key": "weight", "train_metrics_aggr_fn": lambda _contents, _key: MetricRecord()}
    if settings.rule == "median":
        return FedMedian(**common)
    if settings.rule == "trimmed-mean":
        # Flower cuts int(beta * sites) at each end; the addend keeps rounding from making that one less.
        return FedTrimmedAvg(**common, beta=settings.faulty / sites + 1e-9)
    return Krum(**common, num_malicious_nodes=settings.faulty)


def _by_flower(strategy: FedAvg, differences: list[Tensors]) -> Tensors:
    """What one of Flower's strategies makes of the sites' differences."""
    replies = [
        Message(
            RecordDict({"arrays": to_record(one), "metrics": MetricRecord({"weight": 1.0})}),
            dst_node_id=0,
            message_type="train",
        )
        for one in differences
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    return {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
