"""Does the centre's SuperLink bring home every update? In memory, beside SQLite as Flower offers it.

    python -m simulations.benchmarks.centre 10 82 2

Ten real SuperNodes on loopback each receive 82 MB (the encoder of the `default` variant) and send 82 MB of their own,
in two rounds, through a small Flower app without training, so that moving tensors is all that is measured. Printed: replies
that came, seconds of a round, largest memory of the SuperLink.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from server.centre.flower_commands import PROGRAMS
from shared.host.processes import end_all, flower_environment, owned
from simulations.rehearsal.federation import free_ports

TIMEOUT_S = 600.0
_PROJECT = """
[project]
name = "traffic"
version = "0.1.0"
description = "moves tensors"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "hemafed"
fab-include = ["traffic.py"]
[tool.flwr.app.components]
serverapp = "traffic:server"
clientapp = "traffic:client"
[tool.flwr.app.config]
nodes = 2
megabytes = 1
rounds = 1
out = ""
"""
_APP = """
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


def tensors(seed, megabytes):
    rng = np.random.default_rng(seed)
    return ArrayRecord({str(n): Array(rng.random(262144, np.float32)) for n in range(int(megabytes))})


@server.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.5)
    told = []
    for number in range(config["rounds"]):
        started = time.perf_counter()
        content = RecordDict({"arrays": tensors(number, config["megabytes"])})
        messages = [Message(content, dst_node_id=n, message_type="train") for n in grid.get_node_ids()]
        ids = set(grid.push_messages(messages))
        good = 0
        while ids and time.perf_counter() - started < 300:
            for message_id in list(ids):
                for reply in grid.pull_messages([message_id]):
                    ids.discard(message_id)
                    good += reply.has_content() and len(reply.content["arrays"]) == int(config["megabytes"])
            time.sleep(0.2)
        told.append({"replies": good, "seconds": time.perf_counter() - started})
        with open(config["out"], "w") as file:
            json.dump(told, file)


@client.training.round()
def train(message, context):
    arrays = tensors(int(context.node_config["seed"]), len(message.content["arrays"]))
    return Message(RecordDict({"arrays": arrays}), reply_to=message)
"""


@contextmanager
def superlink(folder: Path, database: list[str], nodes: int) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """A SuperLink with its SuperNodes on loopback; its process and the environment for `flwr`."""
    (port, *node_ports) = free_ports(1 + nodes)
    home = folder / "flower"
    home.mkdir(parents=True)
    environment = flower_environment(folder, home, PATH=f"{PROGRAMS}:/usr/bin:/bin")
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )

    def start(name: str, *arguments: str) -> subprocess.Popen:
        with open(folder / f"{name}.log", "w") as log:
            return subprocess.Popen(
                [str(PROGRAMS / arguments[0]), "--insecure", *arguments[1:]],
                env=environment,
                cwd=home,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    link = start("superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(port), *database)
    time.sleep(8)
    for number, own in enumerate(node_ports):
        place = ["--host", "127.0.0.1", "--port", str(own), "--node-config", f"seed={1000 + number}"]
        start(f"node-{number}", "flower-supernode", "--superlink", f"127.0.0.1:{port}", *place)
    try:
        yield psutil.Process(link.pid), environment
    finally:
        end_all(owned(folder))


def measure(folder: Path, database: list[str], nodes: int, megabytes: int, rounds: int) -> tuple[list[dict], float]:
    """Rounds with replies and seconds, and the SuperLink's largest memory in MB."""
    app, out = folder / "traffic", folder / "out.json"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PROJECT)
    (app / "traffic.py").write_text(_APP)
    largest = [0.0]
    with superlink(folder / "link", database, nodes) as (link, environment):
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.2):
                with suppress(psutil.Error):
                    largest[0] = max(largest[0], link.memory_info().rss / 1e6)

        threading.Thread(target=watch, daemon=True).start()
        keys = f'nodes={nodes} megabytes={megabytes} rounds={rounds} out="{out}"'
        command = [str(PROGRAMS / "flwr"), "run", str(app), "here", "--run-config", keys]
        asked = subprocess.run(command, env=environment, cwd=folder, check=False, capture_output=True, text=True)
        if asked.returncode:
            raise SystemExit(f"flwr run failed: {asked.stdout}{asked.stderr}")
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            done = json.loads(out.read_text() or "[]") if out.is_file() else []
            if len(done) == rounds:
                break
            time.sleep(1)
        ended.set()
    return done, largest[0]


def main(nodes: int = 10, megabytes: int = 82, rounds: int = 2) -> None:
    """Print the table."""
    table = Table("SuperLink's state", "replies of each round", "seconds a round", "largest memory, MB")
    for name, sqlite in (("in memory", False), ("SQLite", True)):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            database = ["--database", str(folder / "state.db")] if sqlite else []
            told, memory = measure(folder, database, nodes, megabytes, rounds)
        replies = ", ".join(f"{one['replies']} of {nodes}" for one in told) or "none"
        missing = f", then no end within {TIMEOUT_S:g} s" if len(told) < rounds else ""
        table.add_row(name, replies + missing, ", ".join(f"{one['seconds']:.0f}" for one in told), f"{memory:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
