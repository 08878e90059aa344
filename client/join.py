"""The hospital's daemon: checks that all is ready, then keeps Flower's SuperNode running.

One connection goes out, to the centre's one port. The SuperNode is Flower's own; what stands around it is what it lacks:
it is started again when it ends, whatever the reason, it is ended when it waits for a reply that will never come, and the
app processes that it starts run the hospital's own code (client/gate.py).
"""

from __future__ import annotations

import http.client
import os
import queue
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import psutil
from cryptography import x509

from client.enrol import Centre, read_known_centre, read_node_key
from client.gate import RUNNING
from shared.enrol import EnrolError
from shared.site import Site
from shared.slices import CacheError, read_cache

CLOCK_S = 120.0  # Flower takes a node's signature for five minutes
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0
STEADY_S = 120.0  # a node that lived that long did not fail at its start
WEDGED_S = 90.0  # a node answers for an app that died after 66 s; one that has not by then never will
_REFUSING = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
      what: data, key, certificate authority, connection, clock.
      good: whether it is as it should be.
      text: what was found; of a fault also the next step.
    """

    what: str
    good: bool
    text: str


def check_ready(site: Site, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[Finding]:
    """Look at everything that a hospital needs to take part, in seconds; all of it, whatever fails."""
    findings = [_data(site)]
    try:
        centre = read_known_centre(site)
    except EnrolError as error:
        return [*findings, Finding("centre", False, str(error))]
    return [*findings, _key(centre), _authority(centre), *_connection(centre, now)]


def _data(site: Site) -> Finding:
    """A fast form of `hemafed-client check`: what ingest left."""
    try:
        cache = read_cache(site.cache)
    except CacheError as error:
        return Finding("data", False, f"{error}")
    split = "train" if site.role == "train" else "test"
    rows = len(cache.rows(split)) if site.role == "train" else len(cache.label)
    if rows < 2:
        return Finding(
            "data", False, f"{rows} slices to {split} on; run 'hemafed-client check' and see what was left out"
        )
    return Finding("data", True, f"{rows} slices to {split} on")


def _key(centre: Centre) -> Finding:
    try:
        read_node_key(centre)
    except EnrolError as error:
        return Finding("key", False, str(error))
    return Finding("key", True, centre.fingerprint())


def _authority(centre: Centre) -> Finding:
    try:
        certificate = x509.load_pem_x509_certificate(centre.authority.read_bytes())
    except (OSError, ValueError) as error:
        text = (
            f"{centre.authority}: no certificate ({type(error).__name__}); restore it from the invitation or a backup"
        )
        return Finding("authority", False, text)
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if left < 0:
        text = f"the centre's authority expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the centre for a new invitation"
        return Finding("authority", False, text)
    return Finding("authority", True, f"of the centre, good for {left} days")


def _connection(centre: Centre, now: Callable[[], datetime]) -> list[Finding]:
    """Whether the centre answers, and what its clock says."""
    try:
        context = ssl.create_default_context(cafile=str(centre.authority))
        connection = http.client.HTTPSConnection(centre.host, centre.port, timeout=10, context=context)
        connection.request("GET", "/")
        answer = connection.getresponse()
        days = _days_left(connection)
        theirs = answer.headers["Date"]
        connection.close()
    except ssl.SSLCertVerificationError as error:
        return [Finding("connection", False, _certificate_text(centre, error))]
    except (OSError, http.client.HTTPException, ssl.SSLError) as error:
        return [Finding("connection", False, _unreachable_text(centre, error))]
    soon = f"; its certificate expires in {days:.0f} days, tell the centre" if days < 30 else ""
    findings = [Finding("connection", True, f"{centre.address} answers{soon}")]
    if theirs:
        ahead = (now() - parsedate_to_datetime(theirs)).total_seconds()
        good = abs(ahead) <= CLOCK_S
        told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the centre's"
        remedy = (
            "" if good else "; set it (timedatectl set-ntp true): the centre refuses signatures that are not of now"
        )
        findings.append(Finding("clock", good, told + remedy))
    return findings


def _days_left(connection: http.client.HTTPSConnection) -> float:
    """Days until the centre's certificate expires."""
    certificate = connection.sock.getpeercert()
    return (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400


def _certificate_text(centre: Centre, error: ssl.SSLCertVerificationError) -> str:
    """Why the centre's certificate is not taken."""
    if "expired" in error.verify_message:
        return f"the certificate of {centre.address} has expired; the centre must run 'hemafed-server renew'"
    if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
        return f"the certificate of {centre.address} is for another name ({error.verify_message}); check the address with the centre"
    return (
        f"the certificate of {centre.address} is not signed by the centre's authority ({error.verify_message}): it is another server, "
        "something in between reads the traffic, or the centre has a new authority; ask the centre, and do not go on without an answer"
    )


def _unreachable_text(centre: Centre, error: Exception) -> str:
    """Why there was no answer."""
    if isinstance(error, socket.gaierror):
        return f"there is no host {centre.host!r} ({error.strerror}); check the name and the DNS"
    if isinstance(error, ConnectionRefusedError):
        return f"{centre.address} refuses connections: the centre is down, or the port is another; ask the centre"
    if isinstance(error, TimeoutError):
        return (
            f"{centre.address} does not answer within 10 s: ask the hospital's firewall for outgoing TCP to that port"
        )
    if isinstance(error, ssl.SSLError):
        return f"{centre.address} does not speak TLS ({error.reason}): another service is there; check the port with the centre"
    return f"{centre.address} cannot be reached ({type(error).__name__}: {error}); check network and firewall"


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
        """Supervise until `stop`."""
        binaries = self._write_programs()
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            self._running.unlink(missing_ok=True)
            self._reason = ""
            started = time.monotonic()
            node = self._start(binaries)
            self._watch(node)
            if self._stopping.is_set():
                break
            pause_s = FIRST_PAUSE_S if time.monotonic() - started > STEADY_S else min(2 * pause_s, LONGEST_PAUSE_S)
            self._say(f"the node ended: {self._reason or f'exit status {node.returncode}'}; again in {pause_s:.0f} s")
            self._stopping.wait(pause_s)
        self._say("stopped")

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

    def _start(self, programs: Path) -> subprocess.Popen:
        """Start the SuperNode."""
        flower = Path(sys.executable).parent
        home = self._centre.folder / "flower"
        home.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": os.pathsep.join([str(programs), str(flower), os.environ.get("PATH", "")]),
            RUNNING: str(self._running),
        }
        environment.pop("PYTHONPATH", None)
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
            f'site="{self._site_yaml}"',
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
        answering, dead_since = False, None
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
                self._reason = _reason(line) or self._reason
            if self._stopping.is_set():
                break
            dead_since = (dead_since or time.monotonic()) if answering and self._app_is_dead() else None
            if dead_since is not None and time.monotonic() - dead_since > WEDGED_S:
                self._reason = "its app ended without an answer"
                break
        _end(node)

    def _app_is_dead(self) -> bool:
        """Whether the process that answers has ended; not before it began."""
        try:
            return not psutil.pid_exists(int(self._running.read_text()))
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


def _reason(line: str) -> str:
    """What a line of the SuperNode says about its end, in words and with the next step; empty if nothing."""
    if "[code: 2004]" in line:
        return (
            "the centre does not take this node: it is not registered or revoked (ask the centre), or it still counts as online from "
            "before, for up to a minute"
        )
    if "CERTIFICATE_VERIFY_FAILED" in line:
        return "the centre's certificate cannot be trusted; 'hemafed-client join --check' says why"
    if "does not recognize this SuperNode" in line:
        return "the centre has forgotten this node, as it does when it starts anew"
    return ""


def _end(node: subprocess.Popen) -> None:
    """End the node and what it started; a signal lets it say good-bye, so that it can come back at once."""
    started = []
    if node.poll() is None:
        started = psutil.Process(node.pid).children(recursive=True)
        node.terminate()
        try:
            node.wait(15)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
    for child in started:
        try:
            child.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(started, 10)
    for child in alive:
        child.kill()


def unit_text(site_yaml: Path, user: bool) -> str:
    """A systemd unit for the daemon."""
    program = Path(sys.executable).parent / "hemafed-client"
    target = "default.target" if user else "multi-user.target"
    return f"""\
[Unit]
Description=hemafed: {site_yaml.parent.name} takes part in federated training
Wants=network-online.target
After=network-online.target

[Service]
ExecStart="{program}" join "{site_yaml}"
Restart=always
RestartSec=10
KillSignal=SIGTERM
TimeoutStopSec=60
NoNewPrivileges=true
ProtectSystem=full
PrivateTmp=true

[Install]
WantedBy={target}
"""


def install_unit(site: Site, site_yaml: Path) -> tuple[Path, list[str]]:
    """Write a systemd unit, of the system for root and of the user otherwise; its path and the commands that start it."""
    user = os.geteuid() != 0
    folder = Path.home() / ".config" / "systemd" / "user" if user else Path("/etc/systemd/system")
    path = folder / f"hemafed-{site.name}.service"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(unit_text(site_yaml.resolve(), user))
    who = "systemctl --user" if user else "systemctl"
    commands = [f"{who} daemon-reload", f"{who} enable --now {path.name}"]
    return path, commands + (["loginctl enable-linger  # so that it runs while nobody is logged in"] if user else [])


def join(site: Site, site_yaml: Path, say: Callable[[str], None]) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C."""
    daemon = Daemon(site, site_yaml, say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, daemon.stop)
    daemon.run()
