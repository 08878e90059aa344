"""One hospital trained, as a run has it."""

from __future__ import annotations

import torch
from torch import Tensor

from client.training.round import (
    Learner,
    RoundReport,
    build_learner,
    train_round,
    training_inputs,
)
from shared.config import RunConfig, parse_config
from shared.slices import SliceCache
from tests.conftest import small_config

SLICES = 12


def changed(**keys: object) -> RunConfig:
    return parse_config(small_config(**keys))


def fresh(config: RunConfig) -> Learner:
    return build_learner(config, torch.device("cpu"))


def train_one_round(
    learner: Learner, cache: SliceCache, config: RunConfig, site: str = "a", round_number: int = 1, **more: object
) -> RoundReport:
    inputs = training_inputs(cache, config, site)
    return train_round(learner, inputs, config, site=site, round_number=round_number, **more)


def trained(
    cache: SliceCache, config: RunConfig, *, rounds: tuple[int, ...] = (1,), site: str = "a", mu: float = 0.0
) -> tuple[dict[str, Tensor], list[RoundReport]]:
    learner = fresh(config)
    reports = [train_one_round(learner, cache, config, site, number, proximal_mu=mu) for number in rounds]
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}, reports


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)
