"""The server's step computes what Flower's own strategies compute."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx
from flwr.supercore.task_identity import TaskIdentity

from server.federation.server_step import server_step
from server.storage.checkpoint import Moments
from shared.config import FederationSettings
from shared.wire.records import LARGEST_VALUE

ROUNDS = 5
FLOWERS = {
    "fedavg": lambda rate, momentum: FedAvg(weighted_by_key="weight"),
    "fedprox": lambda rate, momentum: FedProx(weighted_by_key="weight"),
    "fedavgm": lambda rate, momentum: FedAvgM(
        weighted_by_key="weight", server_learning_rate=rate, server_momentum=momentum
    ),
    "fedadam": lambda rate, momentum: FedAdam(weighted_by_key="weight", eta=rate, beta_1=momentum),
}


def means(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Where a run begins, and the mean of each of its rounds."""
    rng = np.random.default_rng(seed)
    return [
        {"cls.b": rng.normal(size=5).astype(np.float32), "encoder.a": rng.normal(size=(3, 4)).astype(np.float32)}
        for _ in range(ROUNDS + 1)
    ]


def flowers_step(strategy: FedAvg, number: int, arrays: dict, average: dict) -> dict[str, np.ndarray]:
    """Flower's strategy given the mean as its only reply."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    strategy.current_arrays = dict(arrays) if isinstance(strategy, FedAdam) else record
    reply = RecordDict(
        {"arrays": ArrayRecord({n: Array(v) for n, v in average.items()}), "m": MetricRecord({"weight": 1})}
    )
    new, _ = strategy.aggregate_train(number, [Message(reply, dst_node_id=0, message_type="train")])
    return {name: array.numpy().astype(np.float32) for name, array in new.items()}


@pytest.mark.parametrize(("rate", "momentum"), [(0.5, 0.9), (0.01, 0.0), (0.02, 0.5)])
@pytest.mark.parametrize("name", FLOWERS)
def test_every_round_is_flowers(name: str, rate: float, momentum: float) -> None:
    settings = FederationSettings(strategy=name, server_learning_rate=rate, server_momentum=momentum)
    strategy, moments = FLOWERS[name](rate, momentum), Moments()
    ours, *averages = means()
    theirs = ours
    for number, average in enumerate(averages, 1):
        ours, moments = server_step(settings, moments, number, ours, average)
        theirs = flowers_step(strategy, number, theirs, average)
        for key, value in theirs.items():
            assert ours[key].dtype == np.float32
            np.testing.assert_array_equal(ours[key], value, err_msg=f"round {number}, {key}")


def test_hand_computed_momentum() -> None:
    settings = FederationSettings(strategy="fedavgm", server_learning_rate=0.5, server_momentum=0.5)
    start, mean = {"encoder.a": np.array([1.0, 1.0], np.float32)}, {"encoder.a": np.array([3.0, -1.0], np.float32)}
    new, moments = server_step(settings, Moments(), 1, start, mean)
    np.testing.assert_array_equal(new["encoder.a"], [2.0, 0.0])  # 1 - .5 (1 - 3) and 1 - .5 (1 + 1)
    new, _ = server_step(settings, moments, 2, new, mean)
    np.testing.assert_array_equal(new["encoder.a"], [3.0, -1.0])  # 2 - .5 (.5 (-2) - 1) and 0 - .5 (.5 (2) + 1)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_running_statistics_are_averaged_and_never_stepped(name: str) -> None:
    settings = FederationSettings(strategy=name, server_learning_rate=0.9, server_momentum=0.9)
    start = {"cls.norm.running_var": np.array([1.0], np.float32), "cls.weight": np.array([1.0], np.float32)}
    mean = {"cls.norm.running_var": np.array([0.01], np.float32), "cls.weight": np.array([0.5], np.float32)}
    new, moments = server_step(settings, Moments(), 1, start, mean)
    assert new["cls.norm.running_var"] == mean["cls.norm.running_var"]
    assert new["cls.weight"] != mean["cls.weight"]
    assert moments.first
    assert start["cls.weight"] == 1, "what was given is not changed"


def test_momentum_beyond_what_hospitals_take_is_cut_off() -> None:
    """Whatever adds up in it over a thousand rounds, the run goes on."""
    settings = FederationSettings(strategy="fedavgm", server_learning_rate=2.0, server_momentum=0.99)
    arrays, moments = {"encoder.x": np.zeros(3, np.float32)}, Moments()
    for number in range(1, 50):
        average = {"encoder.x": arrays["encoder.x"] / 2 + np.float32(5e7)}
        arrays, moments = server_step(settings, moments, number, arrays, average)
    assert 0 < np.abs(arrays["encoder.x"]).max() <= LARGEST_VALUE
