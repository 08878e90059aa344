"""Processes that a daemon starts and must never leave behind, whatever ends the daemon.

A daemon holds a lock file while it lives, and marks all that it starts by a variable of their environment, which whatever
they start inherits. A daemon that was killed leaves them running; the next one finds them by the mark and ends them.
"""

from __future__ import annotations

import fcntl
import os
import signal
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from shared.errors import HemafedError

OWNER = "HEMAFED_OWNER"  # environment of what a daemon starts: the daemon's folder
END_TIMEOUT_S = 15.0
LOOPBACK = ("127.0.0.1", "localhost")  # reached past any proxy
_LOCK_WAIT_S = 2.0  # a look at the lock (is_held) takes it for a moment


class HeldError(HemafedError, RuntimeError):
    """Another process holds the lock."""


@contextmanager
def hold(path: Path, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Hold a lock file; the lock goes with the process, however it ends.

    Raises:
      HeldError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait_s
    with open(path, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= end:
                    raise HeldError(str(path)) from error
                time.sleep(0.1)
        yield


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock. Does not create the file, since it would then belong to the caller."""
    with suppress(FileNotFoundError), open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not fetched by its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def owned(owner: Path) -> list[psutil.Process]:
    """Find processes that a daemon of this folder started, and their children, even if the daemon is gone."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if _is_owned(process, owner):
                found.append(process)
    return found


def _is_owned(process: psutil.Process, owner: Path) -> bool:
    """Whether a process has a daemon's mark; flower-superexec hides its environment from all but root, not its arguments."""
    try:
        return process.environ().get(OWNER) == str(owner)
    except psutil.AccessDenied:
        return any(Path(argument).is_relative_to(owner) for argument in process.cmdline())


def end_owned(owner: Path, children: Iterable[subprocess.Popen[Any]] = ()) -> None:
    """End the processes that a daemon of this folder started, even if the daemon is gone.

    Args:
      owner: the folder.
      children: this daemon's children, which may not carry the marker yet.
    """
    children = list(children)
    own = {psutil.Process(child.pid) for child in children if child.poll() is None}
    end_all([*own.union(owned(owner))])
    for child in children:
        child.wait(END_TIMEOUT_S)


def end_all(processes: list[psutil.Process], timeout_s: float = END_TIMEOUT_S) -> None:
    """Ask processes to end, and kill those that do not in time."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout_s)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout_s)


def flower_environment(owner: Path, home: Path, **more: str) -> dict[str, str]:
    """The environment of Flower's programs: its home, no telemetry, nothing installed at run time, the daemon's mark."""
    environment = os.environ | {
        OWNER: str(owner),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **more,
    }
    environment.pop("PYTHONPATH", None)
    # Ours speak to each other on this machine; programs read the one name or the other.
    spared = ",".join(filter(None, (environment.get("no_proxy"), environment.get("NO_PROXY"), *LOOPBACK)))
    return environment | {"no_proxy": spared, "NO_PROXY": spared}


def answers(url: str, trust: ssl.SSLContext | None = None) -> bool:
    """Whether a server on this machine answers a page, asked past any proxy.

    Args:
      url: the page.
      trust: for https.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    try:
        with opener.open(url, timeout=2):
            return True
    except OSError:  # urllib's errors are of this kind
        return False
