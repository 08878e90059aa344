"""Send messages to hospitals through Flower and fetch their replies, one at a time, up to a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from shared.wire.foreign import shown
from shared.wire.records import UpdateError

FIRST_POLL_S, LONGEST_POLL_S = 0.1, 2.0
LAST_LOOK_S = 30.0  # at the deadline: what has arrived is still fetched, however large
LATE_LOOK_S = 1.0  # between two rounds; the look goes on meanwhile
LONGEST_REASON = 600  # characters of a hospital's error
# What Flower raises of the connection to its SuperLink, not of a reply.
_CONNECTION = (httpx.HTTPError, OSError, RuntimeError)


@dataclass(frozen=True)
class Unreadable:
    """In place of a reply whose bytes are no message of Flower's.

    Attributes:
      reason: what is wrong with it.
    """

    reason: str


class PendingReply:
    """Looks for one reply, each time in a thread of its own.

    If a node has sent part of a reply, Flower waits minutes for the rest, without a way to stop it; a round's
    deadline must not wait for that.
    """

    def __init__(self, grid: Grid, message_id: str):
        self._grid, self._message_id = grid, message_id
        self._found: queue.SimpleQueue[Message | Exception | None] | None = None

    def __call__(self, timeout_s: float) -> Message | Unreadable | None:
        """Return the reply if it arrives within the given time; a fetch that takes longer is continued by the next call.

        Raises:
          what Flower raised of the connection. What it raised of the reply's bytes is the reply's: a hospital must not be able
          to end a run by them.
        """
        if self._found is None:
            self._found = queue.SimpleQueue()
            threading.Thread(target=self._pull, args=(self._found,), daemon=True).start()
        try:
            found = self._found.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self._found = None
        if isinstance(found, _CONNECTION) and not isinstance(found, RecursionError):
            raise found
        if isinstance(found, Exception):
            return Unreadable(f"a reply that cannot be read ({type(found).__name__})")
        return found

    def _pull(self, found: queue.SimpleQueue) -> None:
        try:
            found.put(next(iter(self._grid.pull_messages([self._message_id])), None))
        except Exception as error:
            found.put(error)


@dataclass(frozen=True)
class Late:
    """An answer that did not come by its deadline.

    Attributes:
      look: the pending reply by which it can still be fetched.
      since, until: when the deadline was, and when it is given up; monotonic seconds.
    """

    look: PendingReply
    since: float
    until: float

    def fetch(self) -> tuple[Message | Unreadable | None, bool]:
        """The answer if it is there now, and whether no more is to be expected."""
        reply = self.look(LATE_LOOK_S)
        return reply, reply is not None or time.monotonic() >= self.until


def send_and_receive(
    grid: Grid,
    messages: Mapping[str, Message],
    timeout_s: float,
    missed: dict[str, PendingReply] | None = None,
    awaiting: Callable[[str], None] = lambda name: None,
) -> Iterator[tuple[str, Message | Unreadable | None]]:
    """Send messages, and yield the replies in order of the names, one at a time.

    A reply that came early waits in Flower's SuperLink until it is its turn. After the deadline, what has arrived is
    still taken.

    Args:
      grid: Flower's.
      messages: name -> message.
      timeout_s: until the deadline.
      missed: given the looks for replies that did not come in time.
      awaiting: called with the hospitals still awaited.

    Yields:
      Name and reply; None for a reply that did not come in time.
    """
    ids = {name: next(iter(grid.push_messages([messages[name]])), None) for name in sorted(messages)}
    end = time.monotonic() + timeout_s
    for name, message_id in ids.items():
        reply, pause_s = None, FIRST_POLL_S
        awaiting(name)
        look = None if message_id is None else PendingReply(grid, message_id)
        while look is not None:
            reply = look(max(end - time.monotonic(), LAST_LOOK_S))
            if reply is not None or time.monotonic() >= end:
                break
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, LONGEST_POLL_S)  # each look costs the SuperLink an encrypted call
        if reply is None and look is not None and missed is not None:
            missed[name] = look
        yield name, reply


def content_or_raise(reply: Message | Unreadable | None, timeout_s: float) -> RecordDict:
    """Return the content of a reply.

    Raises:
      UpdateError: it did not come, or it is an error; with its reason.
    """
    if reply is None:
        raise UpdateError(f"no reply within {timeout_s:g} s (federation.round_deadline_s)")
    if isinstance(reply, Unreadable):
        raise UpdateError(reply.reason)
    if reply.has_error():
        raise UpdateError(shown(reply.error.reason, LONGEST_REASON))
    if not reply.has_content():
        raise UpdateError("a reply without content")
    return reply.content
