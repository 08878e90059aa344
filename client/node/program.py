"""The process that answers the centre's messages, from code that was imported before any message came.

`hemafed-client join` starts it and hands it one socket a message (client/node/connection.py holds the connection and the node's private
key; nothing of either is here). It imports all that an answer needs once, closes the import system to everything that is
not installed (client/boundary/code.py), and forks for each message. The child checks that the centre signed the instruction and that
the run's bundle holds this hospital's code, answers, and ends; its death costs one message.

    python -m client.node.program CONTROL           CONTROL: number of the socket over which sockets come
    python -m client.node.program --once LINE       LINE: number of one message's socket, for a machine where forking is unsafe
"""

from __future__ import annotations

import array
import gc
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from importlib import import_module

from client.boundary.code import CodeError, InstalledOnly, code_hash, installed_places
from client.node.frames import receive_frames, send_frames
from client.node.task import Task

READY = b"ready"
CANNOT_FORK = b"cannot fork"
# All that an answer needs. torch.optim imports torch._dynamo at its first step, which takes seconds.
_NEEDED = ("client.node.answer", "torch._dynamo", "torch.utils.serialization", "encodings.cp437")
log = logging.getLogger("hemafed.client")


def main() -> None:
    """Serve until the socket of the daemon closes."""
    show_progress()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the daemon, which ends this
    line = socket.socket(fileno=int(sys.argv[-1]))
    own = prepare()
    if sys.argv[1] == "--once":
        answer_on(line, own)
        return
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        line.sendall(CANNOT_FORK)  # a lock that another thread holds would stay locked in the child
        return
    gc.freeze()  # what is imported stays shared with the children
    line.sendall(READY)
    while (given := _next_line(line)) is not None:
        if os.fork() == 0:
            line.close()
            _answer_and_end(given, own)
        given.close()
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)  # one message at a time; the daemon sees the child's end by its socket


def prepare() -> str:
    """Import all that an answer needs, then close the import system; the hash of the code that was imported.

    Raises:
      CodeError: the code on the disk changed meanwhile, so that nobody knows which was imported.
    """
    before = code_hash()
    for name in _NEEDED:
        import_module(name)
    if code_hash() != before:
        raise CodeError("the installed code changed while it was being imported")
    sys.meta_path.insert(0, InstalledOnly(installed_places()))
    return before


def _next_line(control: socket.socket) -> socket.socket | None:
    """The next message's socket; None when the daemon has gone."""
    try:
        _, ancillary, _, _ = control.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    except OSError:
        return None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return socket.socket(fileno=array.array("i", data)[0])
    return None


def _answer_and_end(line: socket.socket, own: str) -> None:
    """The child's whole life; nothing of the parent's end is run."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        answer_on(line, own)
        status = 0
    except BaseException:  # whatever it is, this process must not go on as a second parent
        log.exception("failed")
    finally:
        with suppress(OSError):
            line.close()
        logging.shutdown()
        os._exit(status)


def answer_on(line: socket.socket, own: str) -> None:
    """Read one task from a socket, answer it there."""
    from client.node.answer import answer

    send_frames(line, answer(Task.of(receive_frames(line)), own))


def show_progress() -> None:
    """Epochs and refusals as lines of the hospital's own log."""
    logger = logging.getLogger("hemafed")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    main()
