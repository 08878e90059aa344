"""Keeps the process that answers (client/node/program.py) warm, and gives it one message at a time.

It is restarted when it ended and when the installed code changed. Where it reports that it cannot fork safely, each
message gets a process of its own, which costs some seconds a message. Started by root, it runs as the owner of the
hospital's site.yaml, who cannot read the node's private key.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from client.boundary.code import ROOT, code_hash
from client.node.frames import FrameError, receive_frames, send_frames
from client.node.private import answering_owner
from client.node.program import CANNOT_FORK, READY
from client.node.task import Task
from shared.host.processes import end_owned, flower_environment

START_S = 600.0  # importing torch on a busy machine has taken a minute
LOOK_S = 30.0  # between two looks whether a run still goes on
# One thread from the start, so that it may fork; training has torch's own threads.
QUIET = {"OPENBLAS_NUM_THREADS": "1"}


class AnswerError(Exception):
    """A message got no answer: its process ended, or could not be started."""


class StoppedError(Exception):
    """The daemon was stopped, or the message's run ended, before the answer came."""


class Answering:
    """The warm process.

    Args:
      owner: folder that marks the processes as this daemon's (shared/host/processes.py).
      site_yaml: whose owner answers.
      say: for the daemon's log.
    """

    def __init__(self, owner: Path, site_yaml: Path, say: Callable[[str], None]):
        self._owner, self._say = owner, say
        self._user = answering_user(site_yaml)  # once: a link put there later must not make it root
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._code, self._cold = "", False

    def warm_up(self) -> None:
        """Start the process if it is not there or has older code than the disk.

        Raises:
          AnswerError: it does not start.
        """
        now = code_hash()
        alive = self._process is not None and self._process.poll() is None
        if now == self._code and (alive or self._cold):
            return
        if self._code:
            self._say("the process that answers " + ("has old code" if now != self._code else "ended"))
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._start(theirs)
        self._process, self._control, self._code, self._cold = process, ours, now, False
        ours.settimeout(START_S)
        try:
            word = ours.recv(64)
        except OSError as error:
            raise AnswerError(f"the process that answers does not start ({error})") from error
        ours.settimeout(None)
        if word == CANNOT_FORK:
            self._say("this machine's libraries have threads from the start: each message gets a process of its own")
            self._cold = True
            self.close()
        elif word != READY:
            raise AnswerError("the process that answers ended at its start; its lines above say why")

    def _start(self, line: socket.socket, *more: str) -> subprocess.Popen:
        """A process of client/node/program.py that has one socket."""
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from client.node.program import main; main()"
        home = self._owner / "flower"
        return subprocess.Popen(
            [sys.executable, "-I", "-c", code, *more, str(line.fileno())],
            cwd="/",
            env=flower_environment(self._owner, home, **QUIET),
            pass_fds=[line.fileno()],
            start_new_session=True,
            **self._user,
        )

    def ask(self, task: Task, go_on: Callable[[], bool]) -> list[bytes]:
        """Have one message answered.

        Args:
          task: the message.
          go_on: asked every half second; False ends the process that answers.
        Returns:
          The reply's frames.
        Raises:
          AnswerError: the process ended without an answer.
          StoppedError: `go_on` said no.
        """

        def idle() -> None:
            if not go_on():
                raise StoppedError

        self.warm_up()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                if self._cold:
                    self._process = self._start(theirs, "--once")
                else:
                    _hand_over(self._control, theirs)
            try:
                send_frames(ours, task.frames(), idle)
                return receive_frames(ours, idle)
            except (OSError, FrameError) as error:
                raise AnswerError(f"the process that answers ended ({error})") from error
            except StoppedError:
                self.close()
                raise

    def close(self) -> None:
        """End the process, and whatever it still does."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            end_owned(self._owner, [self._process])
            self._process = None


def _hand_over(control: socket.socket, line: socket.socket) -> None:
    """Give a process one end of a socket."""
    try:
        socket.send_fds(control, [b"."], [line.fileno()])
    except OSError as error:
        raise AnswerError(f"the process that answers ended ({error})") from error


def answering_user(site_yaml: Path) -> dict[str, object]:
    """Return arguments of subprocess.Popen that make root's child run as the owner of site.yaml; none for other users."""
    if os.geteuid() != 0:
        return {}
    user, group = answering_owner(site_yaml)
    return {"user": user, "group": group, "extra_groups": []} if user else {}


def watcher(stopping: Callable[[], bool], is_running: Callable[[], bool]) -> Callable[[], bool]:
    """Whether an answer is still wanted: looks at `stopping` each time and at the run every LOOK_S."""
    looked = time.monotonic()

    def go_on() -> bool:
        nonlocal looked
        if stopping():
            return False
        if time.monotonic() - looked < LOOK_S:
            return True
        looked = time.monotonic()
        with suppress(Exception):  # of the network's; the answer is worth more than the look
            return is_running()
        return True

    return go_on
