"""The server's step: from a round's mean to the next global tensors. Pure functions on arrays, as Flower's strategies compute.

FedAvg and FedProx take the mean as it is; FedProx differs in what hospitals add to their loss (client/training/round.py). FedAvgM and
FedAdam keep moments from round to round, which a checkpoint holds.
"""

from __future__ import annotations

import numpy as np

from server.storage.checkpoint import Moments
from shared.config import FederationSettings
from shared.wire.records import LARGEST_VALUE, Tensors

ADAM_BETA_2, ADAM_TAU = 0.99, 1e-3  # Flower's defaults


def server_step(
    settings: FederationSettings, moments: Moments, round_number: int, arrays: Tensors, average: Tensors
) -> tuple[dict, Moments]:
    """Take one step of federation.strategy.

    Args:
      settings: the run config's federation section.
      moments: of the round before.
      round_number: from 1.
      arrays: the global tensors that the round began with.
      average: mean of the sites' tensors, or what another rule made of them; same names and shapes.
    Returns:
      The new global tensors, float32, and the moments for the next round.
    Source: FedAvgM: Hsu et al. 2019 (arXiv:1909.06335); FedAdam: Reddi et al. 2021, Algorithm 2 (arXiv:2003.00295), with the
      bias-corrected rate of Flower's FedAdam.
    """
    if settings.strategy == "fedavgm":
        stepped, moments = _momentum_step(settings, moments, arrays, average)
    elif settings.strategy == "fedadam":
        stepped, moments = _adam_step(settings, moments, round_number, arrays, average)
    else:
        stepped = average
    # Running statistics are averaged, never stepped: a server optimiser could make a variance negative. Momentum adds up over
    # rounds: a value beyond what hospitals take would end the run for all of them.
    new = {name: average[name] if ".running_" in name else value for name, value in stepped.items()}
    bound = LARGEST_VALUE
    return {name: np.clip(value, -bound, bound).astype(np.float32) for name, value in new.items()}, moments


def _momentum_step(
    settings: FederationSettings, moments: Moments, arrays: Tensors, average: Tensors
) -> tuple[dict, Moments]:
    gradient = {name: old - average[name] for name, old in arrays.items()}
    if settings.server_momentum and moments.first:
        gradient = {name: settings.server_momentum * moments.first[name] + g for name, g in gradient.items()}
    stepped = {name: old - settings.server_learning_rate * gradient[name] for name, old in arrays.items()}
    return stepped, Moments(gradient if settings.server_momentum else {})


def _adam_step(
    settings: FederationSettings, moments: Moments, round_number: int, arrays: Tensors, average: Tensors
) -> tuple[dict, Moments]:
    beta_1 = settings.server_momentum
    difference = {name: average[name] - old for name, old in arrays.items()}
    first = {name: beta_1 * moments.first.get(name, 0) + (1 - beta_1) * d for name, d in difference.items()}
    second = {
        name: ADAM_BETA_2 * moments.second.get(name, 0) + (1 - ADAM_BETA_2) * d**2 for name, d in difference.items()
    }
    # As Flower counts, whose rounds begin with 1: the power of the first round is 2.
    correction = np.sqrt(1 - ADAM_BETA_2 ** (round_number + 1.0)) / (1 - beta_1 ** (round_number + 1.0))
    rate = settings.server_learning_rate * correction
    stepped = {name: old + rate * first[name] / (np.sqrt(second[name]) + ADAM_TAU) for name, old in arrays.items()}
    return stepped, Moments(first, second)
