"""A round's tensors at the hospital, with a codec or without: the global model in, this hospital's update out.

With federation.codec both are differences: of the global model to the one of an earlier round, which the hospital keeps, and of
the update to the global model. What coding took from the last update is added to the next (shared/wire/codecs.py).
"""

from __future__ import annotations

from flwr.app import ArrayRecord

from client.boundary.orders import TrainOrder
from client.training.evaluate import initial_model
from client.training.local_state import Exchange, LocalState
from shared.config import RunConfig
from shared.groups import group, groups_shared
from shared.refusals import Refusal, Refused
from shared.wire.codecs import PLAIN, encode_update
from shared.wire.records import Shapes, Tensors, coded_record, from_coded_record, from_record, tested_hash, to_record


class NotHeldError(Refused):
    """The hospital does not hold what a difference is to; it is sent whole tensors when it is asked again."""

    code = Refusal.NOT_HELD


def read_global(order: TrainOrder, config: RunConfig, state: LocalState, expected: Shapes) -> Tensors:
    """The global tensors that a round begins with.

    Args:
      order: of the round.
      config: of the run.
      state: of this hospital, where earlier global tensors are kept.
      expected: name -> shape.
    Raises:
      NotHeldError: the difference is to tensors that are not here, or to others than the centre has.
      UpdateError: the tensors do not fit.
    """
    if order.held_round is None:
        return from_record(order.arrays, expected)
    received = from_coded_record(order.arrays, _held(order.held_round, config, state), config.federation.codec)
    if tested_hash(received, []) != order.model:
        raise NotHeldError(f"the global tensors of round {order.held_round} here are not those of the centre")
    return received


def _held(round_number: int, config: RunConfig, state: LocalState) -> Tensors:
    """The global tensors that a round began with, or the initial ones."""
    if round_number == 0 and not config.model.brought:
        groups = groups_shared(config.federation.share)
        return {name: value for name, value in initial_model(config).items() if group(name) in groups}
    kept = state.exchange(round_number)
    if kept is None:
        raise NotHeldError(f"the global tensors of round {round_number} are not here")
    return kept.received


def make_update(
    trained: Tensors, received: Tensors, config: RunConfig, state: LocalState, last: int
) -> tuple[ArrayRecord, Exchange | None]:
    """What leaves the hospital of a round, and what is kept for the next; nothing without a codec.

    Args:
      trained, received: the shared tensors at the round's end and beginning.
      config: of the run.
      state: of this hospital.
      last: the round that it trained before; 0 for none.
    """
    codec = config.federation.codec
    if codec == PLAIN:
        return to_record(trained), None
    before = state.exchange(last)
    coded, residual = encode_update(trained, received, before.residual if before else None, codec)
    return coded_record(coded), Exchange(received, residual)
