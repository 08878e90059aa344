"""A SuperLink of one's own for one simulation.

`flwr run` would start a SuperLink that stays, keeps the directory and environment of its first caller, runs client code
from that directory, and exits 0 when a run fails. This one lives in its own folder and session, ends with the
`with` block, and `run_app` tells whether the run really finished.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from shared.errors import HemafedError
from shared.host.processes import answers, end_all, flower_environment

CONNECTION = "simulation"
LOG = "superlink.log"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
LAST_LINES = 25


class SimulationError(HemafedError, RuntimeError):
    """A simulation did not start or did not finish; the text ends with the cause."""


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink.

    Attributes:
      home: its FLWR_HOME, with its log.
      port: on loopback.
      pid: its process, which leads a session of its own.
      environment: for `flwr` commands that talk to it.
    """

    home: Path
    port: int
    pid: int
    environment: dict[str, str]

    @property
    def flwr(self) -> str:
        """Flower's command of this environment."""
        return str(Path(sys.executable).parent / "flwr")

    @property
    def log(self) -> Path:
        """Everything that the SuperLink, the ServerApp and the clients wrote."""
        return self.home / LOG


@contextmanager
def start_superlink(home: Path) -> Iterator[SuperLink]:
    """Start a SuperLink for simulations on loopback, and end it and all its children with the block.

    Args:
      home: folder for its config, log and app bundles; made if missing.
    Raises:
      SimulationError: it did not come up.
    """
    neutral = home / "empty"  # Ray workers import client code from the SuperLink's directory first: there is none
    neutral.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    binaries = Path(sys.executable).parent
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = flower_environment(home, home, PATH=path, **ray)
    command = [
        str(binaries / "flower-superlink"),
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with open(home / LOG, "w") as log:
        process = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation"],
            cwd=neutral,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    link = SuperLink(home, port, process.pid, environment)
    outside = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, _exit_on_signal) for number in outside]
    try:
        _wait_until_up(process, link)
        yield link
    finally:
        _stop(process)
        for number, handler in zip(outside, before, strict=True):
            signal.signal(number, handler)


def _wait_until_up(process: subprocess.Popen, link: SuperLink) -> None:
    """Return when the SuperLink answers."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        if answers(f"http://127.0.0.1:{link.port}/health"):
            return
        time.sleep(0.2)
    raise SimulationError(
        f"flower-superlink did not come up (exit status {process.poll()}):\n{cause(link.log.read_text(errors='replace'))}"
    )


def _stop(process: subprocess.Popen) -> None:
    """End the SuperLink and all that it started: superexec, ServerApp, and Ray, whose processes lead sessions of their own."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_all(started, STOP_TIMEOUT_S)


def _exit_on_signal(number: int, _frame: object) -> None:
    """Let `finally` run when the command is ended from outside."""
    raise SystemExit(128 + number)


def run_app(link: SuperLink, project: Path, run_config: Path, supernodes: int, cpus: int = 1) -> int:
    """`flwr run` on a SuperLink, its log on our output, until it ends.

    Args:
      link: where.
      project: folder with pyproject.toml.
      run_config: TOML file with keys that differ from the defaults.
      supernodes: simulated hospitals.
      cpus: cores for each that trains at a time.
    Returns:
      Flower's run id.
    Raises:
      SimulationError: the run did not finish; the text ends with the log's last lines.
    """
    federation = f"num-supernodes={supernodes} client-resources-num-cpus={cpus}"
    command = [link.flwr, "run", str(project), CONNECTION, "--stream", "--run-config", str(run_config)]
    done = subprocess.run([*command, "--federation-config", federation], env=link.environment, check=False)
    # The exit status says nothing about the run (it is 0 for a failed one); the list of runs does.
    listed = subprocess.run(
        [link.flwr, "ls", CONNECTION, "--limit", "1", "--format", "json"],
        env=link.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        run = json.loads(listed.stdout)["runs"][0]
    except (json.JSONDecodeError, KeyError, IndexError) as error:
        raise SimulationError(
            f"'flwr run' started no run (exit status {done.returncode}):\n{cause(link.log.read_text(errors='replace'))}"
        ) from error
    if run["status"] != "finished:completed":
        shown = subprocess.run(
            [link.flwr, "log", str(run["run-id"]), CONNECTION, "--show"],
            env=link.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        raise SimulationError(
            f"Flower run {run['run-id']} is {run['status']}:\n{cause(shown.stdout or link.log.read_text())}"
        )
    return int(run["run-id"])


def cause(log: str) -> str:
    """The last exception in a log, its text without the traceback; the last lines if there is none."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not starts:
        return "\n".join(lines[-LAST_LINES:])
    after = lines[starts[-1] + 1 :]
    first = next((number for number, line in enumerate(after) if line and not line[0].isspace()), 0)
    text = [line for line in after[first:] if line.strip()]
    end = next((number for number, line in enumerate(text) if "Exit Code" in line), len(text))
    return "\n".join(text[:end][:LAST_LINES])
