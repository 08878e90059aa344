"""The hospital's record of a run's global model, and the test whether a model it is sent can belong to that run.

A centre chooses the tensors that it sends. Were it free in those that it has tested, every pixel of a slice could be read
through the counts of a test. So a test takes a model only if the hospital can tie it to the run: the initial model follows
from run.seed, and the final one lies where the hospital's last round and the rounds since can have led.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.config import RunConfig
from shared.groups import group
from shared.refusals import Refusal, Refused
from shared.wire.records import Tensors

REACH = 4.0  # a round's step, in lengths of this hospital's own update: others have more slices and longer updates
ADAM_REACH = 3.0  # FedAdam's step of a value, in server learning rates
MOST_MISSED = 10  # rounds since the hospital's last one, beyond which its update says little of where the run is
LARGEST_PROBE = 100.0  # of a probe's weights and biases, which are fitted elsewhere
# The seed gives the same numbers on every machine but for the last digits, where processors round differently.
SAME = {"rtol": 1e-5, "atol": 1e-6}


class ModelNotOfRunError(Refused):
    """A model that the hospital cannot tie to the run."""

    code = Refusal.NOT_OF_RUN


@dataclass(frozen=True)
class Footing:
    """Record of the last round that the hospital trained; stays on its disk.

    Attributes:
      round_number: of that round.
      received: the global tensors that it began with.
      steps: part of the model -> length of the hospital's longest update of it so far.
    """

    round_number: int
    received: Mapping[str, Tensor]
    steps: Mapping[str, float]


def part(name: str) -> str:
    """The part of the model whose tensors are measured together; running statistics apart, whose scale is another."""
    return group(name) + (".running" if ".running_" in name else "")


def lengths(one: Tensors, other: Tensors) -> dict[str, float]:
    """Distance of two sets of tensors, for each part of the model.

    Args:
      one, other: name -> float array; those of `one` are measured.
    """
    squares: dict[str, float] = {}
    for name, value in one.items():
        difference = np.asarray(value, dtype=np.float64) - np.asarray(other[name], dtype=np.float64)
        squares[part(name)] = squares.get(part(name), 0.0) + float(np.square(difference).sum())
    return {key: math.sqrt(value) for key, value in squares.items()}


def after_round(before: Footing | None, number: int, received: Tensors, trained: Tensors) -> Footing:
    """The footing after a round.

    Args:
      before: after the round before; None at the first.
      number: of the round.
      received, trained: the shared tensors at its beginning and end.
    """
    steps = lengths(trained, received)
    longest = {key: max(length, before.steps.get(key, 0.0) if before else 0.0) for key, length in steps.items()}
    return Footing(number, {name: torch.from_numpy(value) for name, value in received.items()}, longest)


def check_initial(given: Tensors, built: Tensors) -> None:
    """Check tensors against those that the run's seed gives.

    Raises:
      ModelNotOfRunError: one differs.
    """
    wrong = [
        name
        for name, value in given.items()
        if not np.allclose(value, built[name], rtol=SAME["rtol"], atol=SAME["atol"])
    ]
    if wrong:
        raise ModelNotOfRunError(f"{len(wrong)} tensors are not those of run.seed, such as {wrong[0]}")


def check_final(
    config: RunConfig, footing: Footing, encoder: Tensors, sets: list[Tensors], own: Tensors, built: Tensors
) -> None:
    """Check a final model against where the run can have led.

    Args:
      config: of the run.
      footing: of this hospital.
      encoder: the model's encoder.
      sets: its sets of heads.
      own: the hospital's own heads, after its last round.
      built: the model that run.seed gives.
    Raises:
      ModelNotOfRunError: the model lies further away, or its heads are none of federation.heads.
    """
    received, shared = _reaches(config, footing, config.federation.rounds)
    _near(encoder, received, shared)
    for heads in sets:
        if config.federation.share == "all":
            _near(heads, received, shared)
        elif config.federation.heads == "probe":
            _check_probe(heads)
        else:
            moved = lengths(own, built)
            _near(heads, own, {key: REACH * length for key, length in moved.items()})


def check_round(config: RunConfig, footing: Footing | None, number: int, received: Tensors) -> None:
    """Check the global tensors that a round after the first begins with against where the run can have led.

    Args:
      config: of the run.
      footing: of this hospital; None if it trained no round of the run.
      number: of the round.
      received: the tensors.
    Raises:
      ModelNotOfRunError: the hospital trained no round before, or too long ago, or the tensors lie further away.
    """
    if footing is None or footing.round_number >= number or footing.received.keys() != received.keys():
        raise ModelNotOfRunError("the hospital trained no round of this run before this one")
    _near(received, *_reaches(config, footing, number - 1))


def _reaches(config: RunConfig, footing: Footing, last: int) -> tuple[Tensors, dict[str, float]]:
    """Return the tensors that the hospital's last round began with, and how far from them round `last` can have ended."""
    missed = last - footing.round_number
    if missed > MOST_MISSED:
        raise ModelNotOfRunError(f"the hospital missed the last {missed} rounds, more than {MOST_MISSED}")
    received = {name: value.numpy() for name, value in footing.received.items()}
    return received, {key: _reach(config, step, missed, _size(received, key)) for key, step in footing.steps.items()}


def _reach(config: RunConfig, step: float, missed: int, size: int) -> float:
    """Return how far the global tensors of a part can have moved since the hospital's last round began."""
    settings = config.federation
    if settings.strategy == "fedadam":
        once = max(REACH * step, ADAM_REACH * settings.server_learning_rate * math.sqrt(size))
    elif settings.strategy == "fedavgm":
        once = REACH * step * max(1.0, settings.server_learning_rate) / (1 - settings.server_momentum)
    else:
        once = REACH * step
    return once * (missed + 1)


def _size(tensors: Tensors, key: str) -> int:
    return sum(value.size for name, value in tensors.items() if part(name) == key)


def _near(given: Tensors, centre: Tensors, reach: Mapping[str, float]) -> None:
    """Check that no part of the tensors is further from a centre than its reach."""
    far = [key for key, length in lengths(given, centre).items() if not length <= reach.get(key, 0.0) + 1e-4]
    if far:
        raise ModelNotOfRunError(f"{', '.join(sorted(far))}: further from this run's than its rounds can have led")


def _check_probe(heads: Tensors) -> None:
    """Check a head for classification that was fitted on a development site."""
    if {group(name) for name in heads} != {"cls"}:
        raise ModelNotOfRunError("a probe holds tensors of cls alone")
    if any(np.abs(value).max() > LARGEST_PROBE for name, value in heads.items() if not name.startswith("cls.norm")):
        raise ModelNotOfRunError(f"a probe holds weights above {LARGEST_PROBE:g}")
