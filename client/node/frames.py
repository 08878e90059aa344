"""Lists of byte strings over a socket: how the two processes of a hospital's node speak to each other.

The process that is connected to the centre holds the node's private key; the one that answers reads what the centre sent.
Between them go plain bytes with lengths, never pickled objects, so that neither can make the other run anything.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from shared.errors import HemafedError

MOST_BYTES = 1 << 30  # of one list: eleven sets of heads and an encoder of the largest model
MOST_FRAMES = 20_000
IDLE_S = 0.5
_PIECE = 1 << 20
_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")


class FrameError(HemafedError, ConnectionError):
    """The other side ended, or sent what is no list within the bounds."""


def send_frames(line: socket.socket, frames: Iterable[bytes], idle: Callable[[], None] | None = None) -> None:
    """Send a list; returns when the other side, or the socket's buffer, has all of it.

    Args:
      line: a stream socket.
      frames: the list.
      idle: called each time that nothing could be sent for IDLE_S; what it raises ends the sending.
    """
    line.settimeout(IDLE_S if idle else None)
    parts = list(frames)
    _send(line, _COUNT.pack(len(parts)), idle)
    for part in parts:
        _send(line, _LENGTH.pack(len(part)), idle)
        _send(line, part, idle)


def _send(line: socket.socket, part: bytes, idle: Callable[[], None] | None) -> None:
    view = memoryview(part)
    while view:
        try:
            view = view[line.send(view[:_PIECE]) :]
        except TimeoutError:
            idle()


def receive_frames(line: socket.socket, idle: Callable[[], None] | None = None) -> list[bytes]:
    """Receive a list.

    Args:
      line: a stream socket.
      idle: called each time that nothing came for IDLE_S; what it raises ends the receiving.
    Raises:
      FrameError: the other side ended before its end, or it is larger than the bounds.
    """
    line.settimeout(IDLE_S if idle else None)
    (count,) = _COUNT.unpack(_receive(line, _COUNT.size, idle))
    if count > MOST_FRAMES:
        raise FrameError(f"a list of {count} parts, expected at most {MOST_FRAMES}")
    frames, left = [], MOST_BYTES
    for _ in range(count):
        (length,) = _LENGTH.unpack(_receive(line, _LENGTH.size, idle))
        left -= length
        if left < 0:
            raise FrameError(f"a list of more than {MOST_BYTES} bytes")
        frames.append(_receive(line, length, idle))
    return frames


def _receive(line: socket.socket, size: int, idle: Callable[[], None] | None) -> bytes:
    """So many bytes."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        try:
            got = line.recv_into(view)
        except TimeoutError:
            idle()
            continue
        if not got:
            raise FrameError("the other side ended")
        view = view[got:]
    return bytes(buffer)


def reply_frames(reply: Message) -> list[bytes]:
    """A reply as Flower sends it: the message without its content, its object tree, its objects."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        bare = message_to_proto(remove_content_from_message(reply))
        tree = get_object_tree(reply)
        objects = [part.deflate() for part in get_all_nested_objects(reply).values()]
    return [bare.SerializeToString(), tree.SerializeToString(), *objects]
