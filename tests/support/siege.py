"""A centre under attack: real nginx, TLS, SuperLink and executor, with a run that asks an honest hospital all the time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import tomli_w
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from server.centre.config import CONNECTION, Centre, init_centre
from server.centre.daemon import Daemon
from server.centre.flower_commands import flwr
from server.centre.proxy import is_listening
from server.centre.registry import read_nodes
from shared.host.processes import owned
from simulations.rehearsal.federation import free_ports
from tests.support.centres import enrol, need_nginx, wait_for
from tests.support.fleet_node import FleetNode

MOST_MB = 300  # more than idle, whatever is sent
REPLY_MB = 20  # largest_reply_mb of this centre
SITES = ("honest", "mallory", "victim", "leaver")
_APP = {
    "project": {"name": "rounds", "version": "0.1.0", "license": "Apache-2.0", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "tests",
                "fab-include": ["*.py"],
                "components": {"serverapp": "rounds:app", "clientapp": "rounds:client"},
                "config": {"node": "", "out": ""},
            }
        }
    },
}
_ROUNDS = """\
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

app = ServerApp()
client = ClientApp()


@app.main()
def main(grid, context):
    out, node = Path(context.run_config["out"]), int(context.run_config["node"])
    number = 0
    while True:
        content = RecordDict({"ask": ConfigRecord({"number": number})})
        (asked,) = grid.push_messages([Message(content, dst_node_id=node, message_type="query.ping")])
        replies = []
        while not replies:
            time.sleep(0.1)
            replies = list(grid.pull_messages([asked]))
        for reply in replies:
            number += 1
            with open(out, "a") as file:
                file.write(json.dumps({"from": str(reply.metadata.src_node_id), "error": reply.has_error()}) + "\\n")
"""


@dataclass
class Rounds:
    """A run that asks one node again and again.

    Attributes:
      out: a line for each of its answers.
      run: Flower's number of it.
    """

    out: Path
    run: int

    def done(self) -> list[dict]:
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.is_file() else []


@dataclass
class Besieged:
    """A running centre and its hospitals.

    Attributes:
      centre: the centre.
      sites: name -> site.yaml.
      nodes: name -> node, active.
      honest: the run that goes on all the time.
      idle_mb: memory of the SuperLink before any attack.
    """

    centre: Centre
    folder: Path
    sites: dict[str, Path]
    nodes: dict[str, FleetNode] = field(default_factory=dict)
    honest: Rounds | None = None
    idle_mb: float = 0.0

    def superlink(self) -> psutil.Process:
        return next(one for one in owned(self.centre.folder) if "server.superlink.program" in one.cmdline())

    def memory_mb(self) -> float:
        return self.superlink().memory_info().rss / 1e6

    def ask(self, name: str) -> Rounds:
        """Begin a run that asks one hospital."""
        app, out = self.folder / "app", self.folder / f"{name}.jsonl"
        app.mkdir(exist_ok=True)
        (app / "rounds.py").write_text(_ROUNDS)
        (app / "pyproject.toml").write_text(tomli_w.dumps(_APP))
        keys = self.folder / f"{name}.toml"
        keys.write_text(tomli_w.dumps({"node": str(self.nodes[name].number), "out": str(out)}))
        told = flwr(self.centre, "run", str(app), CONNECTION, "--run-config", str(keys))
        return Rounds(out, int(told["run-id"]))

    def log(self) -> str:
        return (self.centre.state / "logs" / "superlink.log").read_text(errors="replace")


@contextmanager
def siege(folder: Path) -> Iterator[Besieged]:
    """A centre that serves four hospitals, until the block ends."""
    need_nginx()
    port, loopback_port = free_ports(2)
    centre = Centre(folder / "centre", "localhost", port, "127.0.0.1", loopback_port, largest_reply_mb=REPLY_MB)
    init_centre(centre)
    made = Besieged(centre, folder, {name: enrol(centre, folder / name, name) for name in SITES})
    stop = threading.Event()
    daemon = Daemon(centre, lambda line: None)
    threads = [threading.Thread(target=daemon.run)]
    threads[0].start()
    try:
        wait_for(lambda: is_listening(centre) and read_nodes(centre).keys() == set(SITES), 120)
        for name in SITES:
            made.nodes[name] = FleetNode(made.sites[name], patient=name == "honest")
            made.nodes[name].activate()
        made.honest = made.ask("honest")
        threads.append(threading.Thread(target=made.nodes["honest"].serve, args=(stop, update)))
        threads[1].start()
        wait_for(lambda: len(made.honest.done()) > 2 or not threads[1].is_alive(), 120)
        assert threads[1].is_alive()
        made.idle_mb = made.memory_mb()
        yield made
    finally:
        stop.set()
        for thread in threads[1:]:
            thread.join(60)
        daemon.stop()
        threads[0].join(60)
    assert owned(centre.folder) == []


def update() -> RecordDict:
    """An honest answer of a megabyte, another each time."""
    value = np.random.default_rng().random(250_000, dtype=np.float32)
    return RecordDict({"update": ArrayRecord({"encoder": Array(value)}), "facts": ConfigRecord({"site": "honest"})})


@contextmanager
def held(besieged: Besieged) -> Iterator[None]:
    """That the SuperLink's memory stays low during the block, and honest rounds go on during and after it."""
    before, most, stop = len(besieged.honest.done()), [0.0], threading.Event()
    superlink = besieged.superlink()

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], superlink.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
        during = len(besieged.honest.done())
        wait_for(lambda: len(besieged.honest.done()) > during + 2, 120)
    finally:
        stop.set()
        thread.join()
    assert len(besieged.honest.done()) > before
    assert most[0] < besieged.idle_mb + MOST_MB
    assert superlink.is_running(), "else another one was measured"
    assert not any(line["error"] for line in besieged.honest.done())
    print(f"SuperLink: {besieged.idle_mb:.0f} MB idle, at most {most[0]:.0f} MB")
