"""A run, or its first round, of two hospitals on a loopback grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from server.federation.robust import longest_update
from server.federation.roster import RunContext, wait_for_quorum
from server.federation.strategy import run_round
from server.storage.checkpoint import Moments
from shared.config import parse_config
from shared.model.scoring import build_model
from shared.wire.records import expected_shapes, from_record, to_arrays
from tests.conftest import SmallHospitals, small_config
from tests.support.loopback import LoopbackGrid, run_server

NAMES = ["hospital-01", "hospital-02"]


def run(hospitals: SmallHospitals, folder: Path, **keys: object) -> tuple[Path, LoopbackGrid]:
    """A run of two hospitals; its folder and the grid."""
    flat = small_config(run__folder=str(folder), **keys)
    grid = LoopbackGrid([hospitals.files[n] for n in NAMES], flat)
    run_server(grid, flat)
    return folder / "latest", grid


def stopped_in_round(hospitals: SmallHospitals, flat: dict, number: int) -> None:
    """A run of two hospitals whose server dies when a hospital has trained a round, and is not told of it."""

    def stop(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and asked.content["config"]["server-round"] == number:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run_server(LoopbackGrid([hospitals.files[n] for n in NAMES], flat, change=stop), flat)


def beginning(grid: LoopbackGrid, flat: dict, hospitals: SmallHospitals) -> tuple[RunContext, Moments, dict]:
    """A run before its first round: session, moments and initial encoder."""
    config = parse_config(flat)
    arrays = to_arrays(build_model(config.model, config.run.seed).state_dict(), ("encoder",))
    session = RunContext(grid, config.federation, hospitals.root / "test", longest_update(arrays))
    session.run.mkdir(exist_ok=True)
    return session, Moments(), arrays


def first_round(hospitals: SmallHospitals, names: list[str], flat: dict, **grid_options: object):
    """One round through real client code; the grid, the members and the result."""
    grid = LoopbackGrid([hospitals.files[name] for name in names], flat, **grid_options)
    session, moments, arrays = beginning(grid, flat, hospitals)
    members = wait_for_quorum(session)
    result = run_round(session, moments, members, arrays, 1)
    return grid, members, arrays, result


def update_of(reply: Message) -> dict[str, np.ndarray]:
    """The encoder's tensors that a hospital of the demonstration's model sent in a round."""
    model = build_model(parse_config(small_config()).model, 0)
    return from_record(reply.content["update"], expected_shapes(model.state_dict(), ("encoder",)))
