from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from server.checkpoint import FILE, CheckpointError, load_checkpoint, restore_optimiser, save_checkpoint
from server.strategy import build_strategy
from shared.config import FederationSettings
from tests.conftest import SmallHospitals, small_config
from tests.loopback import LoopbackGrid

ARRAYS = {"encoder.a": np.array([1.0, 2.0], np.float32), "encoder.b": np.array([[0.5]], np.float32)}


def steps(strategy, grid, arrays: dict, targets: list[float], first: int = 1) -> dict:
    """Server steps towards a mean that is everywhere `target`."""
    for number, target in enumerate(targets, start=first):
        record = ArrayRecord({n: Array(v) for n, v in arrays.items()})
        list(strategy.configure_train(number, record, ConfigRecord(), grid))
        mean = ArrayRecord({n: Array(np.full_like(v, target)) for n, v in arrays.items()})
        content = RecordDict({"arrays": mean, "metrics": MetricRecord({"weight": 1.0})})
        new, _ = strategy.aggregate_train(number, [Message(content, dst_node_id=0, message_type="train")])
        arrays = {n: a.numpy().astype(np.float32) for n, a in new.items()}
    return arrays


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam"])
def test_going_on_from_a_checkpoint_is_going_on(name: str, tmp_path: Path, hospitals: SmallHospitals) -> None:
    settings = FederationSettings(strategy=name, server_learning_rate=0.3, server_momentum=0.8)
    grid = LoopbackGrid([hospitals.files["hospital-01"]], small_config())
    undisturbed = steps(build_strategy(settings), grid, ARRAYS, [3.0, -1.0, 2.0, 0.0])

    before = build_strategy(settings)
    arrays = steps(before, grid, ARRAYS, [3.0, -1.0])
    save_checkpoint(tmp_path, 2, arrays, before)
    saved, after = load_checkpoint(tmp_path), build_strategy(settings)
    restore_optimiser(after, saved)
    assert saved.round_number == 2
    resumed = steps(after, grid, saved.arrays, [2.0, 0.0], first=3)
    for key, value in undisturbed.items():
        np.testing.assert_array_equal(resumed[key], value)


def test_the_new_checkpoint_takes_the_old_ones_place(tmp_path: Path) -> None:
    strategy = build_strategy(FederationSettings())
    save_checkpoint(tmp_path, 1, ARRAYS, strategy)
    save_checkpoint(tmp_path, 2, {n: v + 1 for n, v in ARRAYS.items()}, strategy)
    saved = load_checkpoint(tmp_path)
    assert saved.round_number == 2
    np.testing.assert_array_equal(saved.arrays["encoder.a"], [2.0, 3.0])
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_missing_or_cut_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 1, ARRAYS, build_strategy(FederationSettings()))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path)
