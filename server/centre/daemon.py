"""The running centre: Flower's SuperLink and SuperExec, the proxy in front, the hospitals' keys and the requested run.

The SuperLink keeps its state in memory: its SQLite loses replies under load, and what a run must not lose is in our
own checkpoint. A SuperLink that ended is restarted, the hospitals' keys are registered again and the run resumes from
its last checkpoint. Commands of the centre's operator change files in the centre's folder; this process acts on them.
"""

from __future__ import annotations

import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from server.centre.config import CONNECTION, Centre, CentreError, expiry_warnings
from server.centre.flower_commands import centre_environment, flwr, write_credentials
from server.centre.proxy import (
    check_port_is_free,
    find_nginx,
    is_listening,
    stop_proxy,
    write_certificates,
    write_proxy_config,
)
from server.centre.registry import RegisteredSite, read_sites, write_nodes
from server.centre.run_request import lock_path, write_trouble
from server.centre.run_supervisor import after_restart, supervise
from shared.host.files import bound_log
from shared.host.processes import HeldError, answers, end_owned, hold

START_TIMEOUT_S = 60.0
LOOK_S = 1.0
RESTART_PAUSE_S, LONGEST_RESTART_S, RETRY_S = 2.0, 60.0, 10.0
STEADY_S = 120.0  # a centre that served that long did not fail at its start
NGINX_START_S = 5.0
LARGEST_LOG = 50_000_000  # bytes; as much again is kept of the lines before


class Daemon:
    """One running centre, until it is stopped."""

    def __init__(self, centre: Centre, say: Callable[[str], None]):
        self._centre, self._say = centre, say
        self._stopping = threading.Event()
        self._processes: dict[str, subprocess.Popen] = {}
        self._registered: dict[str, tuple[str, str]] = {}  # site -> public key, node id
        self._asked = 0.0
        self._warned = ""

    def stop(self, *_: object) -> None:
        """End everything; a signal handler too."""
        self._stopping.set()

    def run(self) -> None:
        """Serve until `stop`.

        Raises:
          CentreError: nginx is missing, or another daemon of this centre runs.
        """
        find_nginx()
        try:
            with hold(lock_path(self._centre)):
                self._end_all()  # what a daemon that was killed left running: its ports and its run are ours now
                self._serve_until_stopped()
        except HeldError as error:
            raise CentreError(
                f"the centre in {self._centre.folder} is running already; 'hemafed-server status' shows it"
            ) from error
        self._say("stopped")

    def _serve_until_stopped(self) -> None:
        """Start all processes, again whenever one of Flower's has ended."""
        pause_s = RESTART_PAUSE_S
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._serve()
            except (CentreError, OSError) as error:  # OSError: a full disk, say
                self._say(str(error))
                write_trouble(self._centre, str(error))
            finally:
                self._end_all()
            if not self._stopping.is_set():
                steady = time.monotonic() - started > STEADY_S
                pause_s = RESTART_PAUSE_S if steady else min(2 * pause_s, LONGEST_RESTART_S)
                self._say(f"starting again in {pause_s:g} s")
                self._stopping.wait(pause_s)
        write_trouble(self._centre, "")

    def _serve(self) -> None:
        """Start all processes; return when one of Flower's has ended, or on `stop`."""
        self._start_flower()
        after_restart(self._centre)
        self._registered = {}
        self._sync_sites()
        self._start_proxy()  # last: a hospital that came before its key was registered would be turned away
        write_trouble(self._centre, "")
        self._say(f"serving hospitals at {self._centre.host}:{self._centre.port}")
        while not self._stopping.wait(LOOK_S):
            self._look_after_processes()
            try:
                self._warn_of_expiry()
                self._sync_sites()
                self._asked = supervise(self._centre, self._asked, self._say)
                self._bound_logs()
            except (CentreError, OSError) as error:  # a busy SuperLink, a full disk: no reason to end what runs
                self._say(f"{error}; again in {RETRY_S:g} s")
                self._stopping.wait(RETRY_S)

    def _look_after_processes(self) -> None:
        """Start nginx again if it ended.

        Raises:
          CentreError: one of Flower's processes ended and its state is lost, or nginx does not start. Everything is restarted.
        """
        for name in ("superlink", "superexec"):
            if self._processes[name].poll() is not None:
                raise CentreError(f"{name} ended ({self._processes[name].returncode}); its log is {self._log(name)}")
        if self._processes["nginx"].poll() is not None:
            self._say(f"nginx ended: {self._last_line('nginx')}; starting it again")
            stop_proxy(self._centre)
            self._start_proxy()

    def _start_flower(self) -> None:
        """SuperLink and SuperExec, on loopback."""
        centre = self._centre
        check_port_is_free("127.0.0.1", centre.loopback_port, "loopback_port")
        tls = ["--ssl-ca-certfile", str(centre.authority.certificate)]
        tls += ["--ssl-certfile", str(centre.loopback.certificate), "--ssl-keyfile", str(centre.loopback.key)]
        own = ["--isolation", "process", "--superexec-auth-secret-file", str(centre.secret)]
        place = ["--host", "127.0.0.1", "--port", str(centre.loopback_port)]
        write_credentials(centre)
        self._start(
            "superlink",
            [
                sys.executable,
                "-P",  # the working directory is Flower's, and no place for modules
                "-m",
                "server.superlink.program",
                str(centre.folder),
                *tls,
                *place,
                *own,
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
            ],
        )
        self._wait_until_up()
        where = [f"127.0.0.1:{centre.loopback_port}", str(centre.authority.certificate), str(centre.secret)]
        self._start("superexec", [sys.executable, "-P", "-m", "server.centre.executor", *where])

    def _start_proxy(self) -> None:
        """nginx, which hospitals reach."""
        config = write_proxy_config(self._centre, read_sites(self._centre))
        test = [find_nginx(), "-t", "-q", "-c", str(config)]
        checked = subprocess.run(test, capture_output=True, text=True, check=False)
        if checked.returncode:
            raise CentreError(f"nginx cannot start: {checked.stderr.strip()[-500:]}")
        check_port_is_free(self._centre.listen, self._centre.port, "port")
        self._start("nginx", [find_nginx(), "-c", str(config)])
        end = time.monotonic() + NGINX_START_S
        while time.monotonic() < end and not is_listening(self._centre) and self._processes["nginx"].poll() is None:
            self._stopping.wait(0.1)
        if self._processes["nginx"].poll() is not None:
            raise CentreError(f"nginx ended: {self._last_line('nginx')}; its log is {self._log('nginx')}")

    def _start(self, name: str, command: list[str]) -> None:
        """One process, in a session of its own, its output in its log."""
        log = self._log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            self._processes[name] = subprocess.Popen(
                command,
                cwd=self._centre.flower,
                env=centre_environment(self._centre),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self._centre.state / "logs" / f"{name}.log"

    def _last_line(self, name: str) -> str:
        """Return the last lines of a process's log, without colours."""
        lines = self._log(name).read_text(errors="replace").strip().splitlines() or ["its log is empty"]
        return re.sub(r"\x1b\[\d*m", "", lines[-1]).strip()

    def _wait_until_up(self) -> None:
        """Return when the SuperLink answers."""
        context = ssl.create_default_context(cafile=str(self._centre.authority.certificate))
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and self._processes["superlink"].poll() is None and not self._stopping.is_set():
            if answers(f"https://127.0.0.1:{self._centre.loopback_port}/health", context):
                return
            time.sleep(0.2)
        if not self._stopping.is_set():
            last = self._last_line("superlink")
            raise CentreError(f"the SuperLink did not come up: {last}; its log is {self._log('superlink')}")

    def _sync_sites(self) -> None:
        """Make the door and Flower know exactly the registered sites.

        The door turns a revoked site away first, whatever becomes of the calls to Flower, and lets a new one in last.

        Raises:
          CentreError: Flower did not do what it was asked for some sites; what could be done for the others is done.
        """
        sites, faults = read_sites(self._centre), []
        keys = {name: site.public_key for name, site in sites.items() if site.status == "registered"}
        self._sync_door(sites, keys)
        for change in (self._forget, self._admit):
            for name in sorted(self._registered.keys() | keys.keys()):
                try:
                    change(name, sites.get(name), keys.get(name))
                except (CentreError, OSError) as error:
                    faults.append(f"site {name}: {error}")
        self._sync_door(sites, keys)
        if faults:
            raise CentreError("; ".join(faults))

    def _sync_door(self, sites: dict[str, RegisteredSite], keys: dict[str, str]) -> None:
        """Let the sites in whose keys Flower knows, and no others."""
        known = {name for name, (key, _) in self._registered.items() if keys.get(name) == key}
        sites = {name: site for name, site in sites.items() if site.status == "revoked" or name in known}
        if write_certificates(self._centre, sites) and "nginx" in self._processes:
            # nginx ends idle connections at once: a revoked hospital keeps none.
            self._processes["nginx"].send_signal(signal.SIGHUP)

    def _forget(self, name: str, site: RegisteredSite | None, key: str | None) -> None:
        """Make Flower forget a site that has another key now, or none."""
        if name in self._registered and self._registered[name][0] != key:
            flwr(self._centre, "supernode", "unregister", self._registered[name][1], CONNECTION)
            del self._registered[name]
            self._tell_nodes()
            self._say(f"site {name} is no longer admitted")

    def _admit(self, name: str, site: RegisteredSite | None, key: str | None) -> None:
        """Make Flower know a site's key."""
        if site is None or key is None or name in self._registered:
            return
        path = self._centre.state / "key.pub"
        path.write_text(key + "\n")
        told = flwr(self._centre, "supernode", "register", str(path), CONNECTION, "--name", name)
        self._registered[name] = (key, str(told["node-id"]))
        self._tell_nodes()
        self._say(f"site {name} is admitted as node {told['node-id']}")
        if not site.certificate:
            self._say(f"site {name} has no certificate, and the door turns it away: revoke it and invite it again")

    def _tell_nodes(self) -> None:
        """Say in state/nodes.json which node is which site."""
        write_nodes(self._centre, {name: node for name, (_, node) in self._registered.items()})

    def _bound_logs(self) -> None:
        """Keep the newest lines of Flower's programs and of the door."""
        for path in (*(self._centre.state / "logs").glob("*.log"), *self._centre.state.glob("*.log")):
            bound_log(path, LARGEST_LOG)

    def _warn_of_expiry(self) -> None:
        """Say once a day that a certificate is about to expire."""
        today = time.strftime("%Y-%m-%d")
        if self._warned != today:
            self._warned = today
            for warning in expiry_warnings(self._centre):
                self._say(warning)

    def _end_all(self) -> None:
        """End all processes of this centre, the proxy first, whichever daemon started them."""
        stop_proxy(self._centre)
        end_owned(self._centre.folder, self._processes.values())
        self._processes = {}
