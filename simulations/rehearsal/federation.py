"""A federation of real processes on this machine: a centre and hospitals with their own folders, keys and TLS.

Everything goes through the commands that a centre and a hospital use; what is added here is to call them, to wait, and to
kill processes as a power cut would. Tests of faults use it, and `hemafed-sim federation` tells the story with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from server.centre.config import Centre, read_centre
from server.centre.run_request import TERMINAL, read_request
from server.centre.status import online
from server.storage.run_folder import read_rounds, read_status
from shared.errors import HemafedError
from shared.host.processes import OWNER, end_all, owned
from shared.site import read_site

ROOT = Path(__file__).resolve().parents[2]
ONLINE_TIMEOUT_S, LINE_TIMEOUT_S = 180.0, 240.0


class FederationError(HemafedError, RuntimeError):
    """A federation on this machine did not come to where it should; the text ends with the cause."""


@dataclass
class Federation:
    """A centre and its hospitals.

    Attributes:
      folder: everything of it: centre/, one folder per hospital, logs/.
      centre: as its commands read it.
      sites: name -> site.yaml.
      running: who runs, by name; the centre is "centre".
    """

    folder: Path
    centre: Centre
    sites: dict[str, Path]
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start the centre or a hospital's daemon; its lines go to logs/NAME.log."""
        if name == "centre":
            command = ["hemafed-server", "start", str(self.centre.folder)]
        else:
            command = ["hemafed-client", "join", str(self.sites[name])]
        log = self.log(name)
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file:
            self.running[name] = subprocess.Popen(
                _program(command),
                cwd=self.folder,
                env=_plain() | {"OMP_NUM_THREADS": "1"},  # hospitals share this machine, and bits must not depend on it
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, name: str) -> None:
        """End the centre or a hospital's daemon as its service would."""
        process = self.running.pop(name)
        process.terminate()
        process.wait(60)

    def cut_power(self, name: str) -> None:
        """kill -9 of a daemon and of all that it started."""
        process = self.running.pop(name)
        everyone = [psutil.Process(process.pid), *self.started_by(name)]
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(everyone, 10)
        process.wait()

    def kill_daemon(self, name: str) -> None:
        """kill -9 of a daemon alone; what it started goes on without it."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def started_by(self, name: str) -> list[psutil.Process]:
        """Processes that the centre's or a hospital's daemon started, and their children."""
        if name != "centre":
            return owned(self.state(name) / "centre")
        found = owned(self.centre.folder)
        with suppress(OSError, ValueError, psutil.Error):
            nginx = psutil.Process(int((self.centre.state / "nginx.pid").read_text()))
            found += [nginx, *nginx.children()]
        return found

    def state(self, name: str) -> Path:
        """A hospital's state folder."""
        return read_site(self.sites[name]).state

    def log(self, name: str) -> Path:
        """Return a daemon's output."""
        return self.folder / "logs" / f"{name}.log"

    def command(self, *arguments: str) -> str:
        """Run one of the commands; what it wrote.

        Raises:
          FederationError: it ended with another status than 0.
        """
        done = subprocess.run(
            _program(list(arguments)), cwd=self.folder, capture_output=True, text=True, env=_plain(), check=False
        )
        if done.returncode:
            raise FederationError(
                f"{' '.join(arguments[:3])} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def begin_run(self, name: str, config: dict[str, object]) -> None:
        """Ask the centre for a run; dotted keys."""
        keys = [part for key, value in config.items() for part in ("--set", f"{key}={_toml(value)}")]
        self.command(
            "hemafed-server", "run", str(self.centre.folder), "--no-follow", "--set", f"run.id={_toml(name)}", *keys
        )

    def status(self) -> str:
        """Return the output of `hemafed-server status`."""
        return self.command("hemafed-server", "status", str(self.centre.folder))

    def run_folder(self, name: str) -> Path:
        """A run's folder at the centre."""
        return self.centre.runs / name

    def wait_serving(self) -> None:
        """Return when the centre takes connections; a hospital that came before would wait longer and longer between tries."""
        log = self.log("centre")
        begun = log.read_text().count("serving hospitals") if log.is_file() else 0
        self.wait_for(
            lambda: log.read_text().count("serving hospitals") > begun, ONLINE_TIMEOUT_S, "the centre serving"
        )

    def wait_line(self, name: str, text: str, after: int = 0) -> None:
        """Return when a daemon has written a line with this text, in its log from a place on."""
        log = self.log(name)
        self.wait_for(lambda: text in log.read_text()[after:], LINE_TIMEOUT_S, f"{text!r} in {log.name}", pause_s=0.05)

    def wait_online(self, names: list[str], timeout_s: float = ONLINE_TIMEOUT_S) -> None:
        """Return when these hospitals are connected."""

        def there() -> bool:
            nodes = online(self.centre)
            return all(nodes.get(name, {}).get("status") == "online" for name in names)

        self.wait_for(there, timeout_s, f"{', '.join(names)} online", pause_s=1.0)

    def wait_rounds(self, run: str, rounds: int, timeout_s: float) -> None:
        """Return when a run has finished so many rounds."""

        def reached() -> bool:
            wanted = read_request(self.centre)
            if wanted is not None and wanted.status in TERMINAL and wanted.status != "finished":
                raise FederationError(f"run {run} {wanted.status} before round {rounds}: {wanted.error}")
            return len(read_rounds(self.run_folder(run))) >= rounds

        self.wait_for(reached, timeout_s, f"round {rounds} of {run}")

    def wait_waiting(self, run: str, text: str, timeout_s: float) -> None:
        """Return when a run says that it waits, and for what."""

        def waits() -> bool:
            status = read_status(self.run_folder(run))
            return status.state == "waiting" and text in status.what

        self.wait_for(waits, timeout_s, f"{run} waiting for {text!r}")

    def wait_end(self, run: str, timeout_s: float) -> str:
        """Return the final status of a run at the centre."""

        def ended() -> bool:
            wanted = read_request(self.centre)
            return wanted is not None and wanted.name == run and wanted.status in TERMINAL

        self.wait_for(ended, timeout_s, f"the end of {run}")
        return read_request(self.centre).status

    def wait_for(self, what: Callable[[], bool], timeout_s: float, name: str, pause_s: float = 0.2) -> None:
        """Return when something is so.

        Raises:
          FederationError: it was not in time; with the last lines of every log.
        """
        end = time.monotonic() + timeout_s
        while not what():
            if time.monotonic() >= end:
                logs = [self.log(one) for one in ("centre", *self.sites)]
                logs += [self.centre.state / "logs" / f"{one}.log" for one in ("superlink", "superexec")]
                told = "\n".join(f"--- {log.name}\n{_tail(log)}" for log in logs)
                raise FederationError(f"{name}: not within {timeout_s:g} s\n{told}")
            time.sleep(pause_s)

    def end(self) -> None:
        """End everything that runs."""
        for name in list(self.running):
            process = self.running.pop(name)
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        left = [one for name in ("centre", *self.sites) for one in self.started_by(name)]
        end_all(left)


@contextmanager
def federate(folder: Path, hospitals: dict[str, Path], invited: list[str] | None = None) -> Iterator[Federation]:
    """Provision a centre and hospitals by their commands, and end all of their processes with the block.

    Args:
      folder: made; everything of the federation.
      hospitals: name -> site.yaml of an ingested hospital. Each becomes a hospital with a folder, a state and a key of its
        own, and the same data.
      invited: who is registered from the beginning; by default all.
    """
    folder.mkdir(parents=True)
    port, loopback_port = free_ports(2)
    centre = folder / "centre"
    sites = {name: own_site(folder / name, file) for name, file in hospitals.items()}
    place = ["--host", "localhost", "--listen", "127.0.0.1", "--port", str(port), "--loopback-port", str(loopback_port)]
    federation = Federation(folder, Centre(centre, "localhost", port, "127.0.0.1", loopback_port), sites)
    federation.command("hemafed-server", "init", str(centre), *place)
    federation.centre = read_centre(centre)
    for name in sites if invited is None else invited:
        enrol(federation, name)
    try:
        yield federation
    finally:
        federation.end()


def enrol(federation: Federation, name: str) -> None:
    """Invitation, request, registration."""
    centre, site = str(federation.centre.folder), federation.sites[name]
    invitation, request = federation.centre.folder / "invitations" / f"{name}.json", site.parent / "request.json"
    federation.command("hemafed-server", "invite", centre, name)
    federation.command("hemafed-client", "init", str(invitation), str(site), "--request", str(request))
    federation.command("hemafed-server", "register", centre, str(request))


def own_site(folder: Path, file: Path) -> Path:
    """A hospital's folder on this machine: site.yaml and state of its own, data and cache of the given one."""
    given, content = read_site(file), yaml.safe_load(file.read_text())
    (folder / "state").mkdir(parents=True)
    shutil.copy(given.state / "key", folder / "state" / "key")
    for key in ("images", "masks", "labels"):
        if content["data"].get(key):
            content["data"][key] = str(getattr(given, key))
    content |= {"site": folder.name, "cache": str(given.cache), "state": "state/"}
    (folder / "site.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "site.yaml"


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on."""
    with_sockets = [socket.socket() for _ in range(count)]
    for one in with_sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in with_sockets]
    for one in with_sockets:
        one.close()
    return ports


def _program(command: list[str]) -> list[str]:
    """A command of this environment and of this code."""
    module = {"hemafed-server": "server.cli", "hemafed-client": "client.cli"}[command[0]]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import main; main()"
    return [sys.executable, "-c", code, *command[1:]]


def _plain() -> dict[str, str]:
    """This environment without the mark of a daemon."""
    return {key: value for key, value in os.environ.items() if key != OWNER}


def _toml(value: object) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else repr(value)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else "nothing"
