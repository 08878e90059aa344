"""Memory and time of averaging a round's updates: folding them in one by one against Flower's own FedAvg.

    python -m simulations.benchmarks.aggregate [UPDATES] [MEGABYTES]

Both see the same real Flower messages, made one at a time; FedAvg is given them as a list, as Flower's own loop does. Each
method runs in a process of its own, and its peak memory is the process's. Prints a table for simulations/README.md.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from server.federation.aggregate import WeightedSum, fold, mean
from shared.wire.records import from_record


def messages(updates: int, megabytes: float) -> Iterator[Message]:
    """Replies with one tensor each, made when they are asked for."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    rng = np.random.default_rng(0)
    for _ in range(updates):
        value = rng.standard_normal(int(megabytes * 250_000), dtype=np.float32)
        content = RecordDict({"arrays": ArrayRecord({"w": Array(value)}), "metrics": MetricRecord({"weight": 1.0})})
        yield Message(content, dst_node_id=0, message_type="train")


def folded(updates: int, megabytes: float) -> np.ndarray:
    """This project: checked and folded in one by one."""
    total = WeightedSum({})
    for message in messages(updates, megabytes):
        total = fold(total, from_record(message.content["arrays"], {"w": (int(megabytes * 250_000),)}), 1.0)
    return mean(total)["w"]


def flowers(updates: int, megabytes: float) -> np.ndarray:
    """Flower's FedAvg on the list of all replies."""
    arrays, _ = FedAvg(weighted_by_key="weight").aggregate_train(1, list(messages(updates, megabytes)))
    return arrays["w"].numpy()


def measure(method: str, updates: int, megabytes: float, out: Connection) -> None:
    """Peak memory (MB) and seconds of one method, in this process."""
    started = time.perf_counter()
    result = {"folded": folded, "flowers": flowers}[method](updates, megabytes)
    seconds = time.perf_counter() - started
    out.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds, result[:1000]))


def main() -> None:
    """Run both and print the table."""
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    megabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 82.0
    print(f"{updates} updates of {megabytes:g} MB\n\n| | peak memory | time |\n|---|---|---|")
    results = []
    for method, label in (("folded", "folded one by one"), ("flowers", "Flower's FedAvg")):
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(method, updates, megabytes, send))
        process.start()
        memory, seconds, head = receive.recv()
        process.join()
        results.append(head)
        print(f"| {label} | {memory:.0f} MB | {seconds:.1f} s |")
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main()
