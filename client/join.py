"""The hospital's daemon: checks that all is ready, then keeps Flower's SuperNode running.

One connection goes out, to the centre's one port. The SuperNode is Flower's own; what stands around it is what it lacks:
it is started again when it ends, whatever the reason, it is ended when it waits for a reply that will never come, and the
app processes that it starts run the hospital's own code (client/gate.py).
"""

from __future__ import annotations

import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from client.enrol import read_known_centre
from client.gate import RUNNING
from shared.enrol import EnrolError
from shared.processes import HeldError, end_owned, flower_environment, hold, is_alive
from shared.rights import user_name
from shared.site import Site
from shared.units import unit_text

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 30.0  # a node that was killed is refused for up to a minute
STEADY_S = 120.0  # a node that lived that long did not fail at its start
WEDGED_S = 90.0  # a node answers for an app that died after 66 s; one that has not by then never will
_REFUSING = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


class Daemon:
    """Keeps one hospital's SuperNode running until it is told to stop."""

    def __init__(self, site: Site, site_yaml: Path, say: Callable[[str], None]):
        self._site, self._site_yaml, self._say = site, site_yaml.resolve(), say
        self._centre = read_known_centre(site)
        self._stopping = threading.Event()
        self._running = self._centre.folder / "app.pid"
        self._reason = ""

    def stop(self, *_: object) -> None:
        """End the SuperNode and the daemon; a signal handler too."""
        self._stopping.set()

    def run(self) -> None:
        """Supervise until `stop`.

        Raises:
          EnrolError: another daemon of this site runs.
        """
        try:
            with hold(self._centre.folder / "lock"):
                end_owned(self._centre.folder)  # what a daemon that was killed left running
                self._supervise()
        except HeldError as error:
            raise EnrolError(
                f"site {self._site.name!r} takes part already, from another process on this machine; a site is joined once: "
                "end the other, or look whether its service runs (systemctl status)"
            ) from error
        self._say("stopped")

    def _supervise(self) -> None:
        """Start the node, again whenever it has ended."""
        programs = self._write_programs()
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            self._running.unlink(missing_ok=True)
            self._reason = ""
            started = time.monotonic()
            node = self._start(programs)
            try:
                self._watch(node)
            finally:
                # By a signal first: a node that says good-bye can come back at once.
                end_owned(self._centre.folder, [node])
            if self._stopping.is_set():
                break
            pause_s = FIRST_PAUSE_S if time.monotonic() - started > STEADY_S else min(2 * pause_s, LONGEST_PAUSE_S)
            self._say(f"the node ended: {self._reason or f'exit status {node.returncode}'}; again in {pause_s:.0f} s")
            self._stopping.wait(pause_s)

    def _write_programs(self) -> Path:
        """The folder that comes first on the node's PATH: our program for client apps, and a refusal of other apps."""
        folder = self._centre.folder / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        root = Path(__file__).resolve().parent.parent
        python = shlex.quote(sys.executable)
        ours = f'#!/bin/sh\ncd {shlex.quote(str(root))} && exec {python} -m client.gate "$@"\n'
        refusal = "#!/bin/sh\necho 'this site runs no app of the kind '$(basename \"$0\") >&2\nexit 1\n"
        for name, text in {"flwr-clientapp": ours, **dict.fromkeys(_REFUSING, refusal)}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    def _write_node_config(self) -> Path:
        """Write the node config as a file: a path of any characters can stand in it."""
        path = self._centre.folder / "node.toml"
        path.write_text(tomli_w.dumps({"site": str(self._site_yaml)}))
        return path

    def _start(self, programs: Path) -> subprocess.Popen:
        """Start the SuperNode."""
        flower = Path(sys.executable).parent
        home = self._centre.folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path = os.pathsep.join([str(programs), str(flower), os.environ.get("PATH", "")])
        environment = flower_environment(self._centre.folder, home, PATH=path, **{RUNNING: str(self._running)})
        command = [
            str(flower / "flower-supernode"),
            "--superlink",
            self._centre.address,
            "--root-certificates",
            str(self._centre.authority),
            "--auth-supernode-private-key",
            str(self._centre.key),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--node-config",
            str(self._write_node_config()),
        ]
        return subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _watch(self, node: subprocess.Popen) -> None:
        """Relay the node's lines until it ends, is told to, or is found to wait for nothing."""
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_relay, args=(node, lines), daemon=True).start()
        answering, dead_since, broken_since = False, None, None
        while True:
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                if node.poll() is not None:
                    break
                line = ""
            if line:
                self._say(line)
                answering = _answering(line, answering)
                broken_since = _broken_since(line, broken_since)
                self._reason = _reason(line) or self._reason
            if self._stopping.is_set():
                break
            dead_since = (dead_since or time.monotonic()) if answering and self._app_is_dead() else None
            if dead_since is not None and time.monotonic() - dead_since > WEDGED_S:
                self._reason = "its app ended without an answer"
                break
            works = answering and dead_since is None
            if not works and broken_since is not None and time.monotonic() - broken_since > WEDGED_S:
                self._reason = "its connection broke, and it did not come back by itself"
                break

    def _app_is_dead(self) -> bool:
        """Whether the process that answers has ended; not before it began."""
        try:
            return not is_alive(int(self._running.read_text()))
        except (OSError, ValueError):
            return False


def _relay(node: subprocess.Popen, lines: queue.Queue[str]) -> None:
    """Lines of the node and of the processes that it started, which may outlive it."""
    for line in node.stdout:
        lines.put(line.rstrip())


def _answering(line: str, before: bool) -> bool:
    """Whether a message is being answered, by what Flower's SuperNode writes."""
    if "Receiving: " in line:
        return True
    if any(
        text in line
        for text in ("Sent successfully", "Failed to receive message", "Failed to send message", "Ignoring")
    ):
        return False
    return before


def _broken_since(line: str, before: float | None) -> float | None:
    """Since when the connection is broken, by what Flower's SuperNode writes; None where it is not.

    A SuperNode whose TLS handshake timed out, on a line that was cut, neither ends nor tries again.
    """
    if "Giving up reconnection" in line or "handshake error" in line:
        return before or time.monotonic()
    if any(text in line for text in ("Connection successful", "Receiving: ", "Sent successfully", "SuperNode ID")):
        return None
    return before


def _reason(line: str) -> str:
    """What a line of the SuperNode says about its end, in words and with the next step; empty if nothing."""
    if "[code: 2004]" in line or "401 Unauthorized" in line:
        return (
            "the centre does not take this node: it is not registered or revoked (ask the centre), or it still counts as online from "
            "before, for up to a minute"
        )
    if "CERTIFICATE_VERIFY_FAILED" in line:
        return "the centre's certificate cannot be trusted; 'hemafed-client join --check' says why"
    if "does not recognize this SuperNode" in line:
        return "the centre has forgotten this node, as it does when it starts anew"
    return ""


def site_unit(site_yaml: Path, user: bool) -> str:
    """A systemd unit for the daemon; of the system, it runs as whoever owns site.yaml."""
    owner = user_name(site_yaml.stat().st_uid)
    return unit_text(
        f"hemafed: {site_yaml.parent.name} takes part in federated training",
        ["hemafed-client", "join", str(site_yaml)],
        user="" if user or owner == "root" else owner,
        stop_s=60,
        target="default.target" if user else "multi-user.target",
    )


def install_unit(site: Site, site_yaml: Path) -> tuple[Path, list[str]]:
    """Write a systemd unit, of the system for root and of the user otherwise; its path and the commands that start it."""
    user = os.geteuid() != 0
    folder = Path.home() / ".config" / "systemd" / "user" if user else Path("/etc/systemd/system")
    path = folder / f"hemafed-{site.name}.service"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(site_unit(site_yaml.resolve(), user))
    who = "systemctl --user" if user else "systemctl"
    commands = [f"{who} daemon-reload", f"{who} enable --now {path.name}"]
    return path, commands + (["loginctl enable-linger  # so that it runs while nobody is logged in"] if user else [])


def join(site: Site, site_yaml: Path, say: Callable[[str], None]) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    daemon = Daemon(site, site_yaml, say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, daemon.stop)
    daemon.run()
