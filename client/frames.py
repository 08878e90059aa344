"""Lists of byte strings over a socket: how the two processes of a hospital's node speak to each other.

The process that is connected to the centre holds the node's private key; the one that answers reads what the centre sent.
Between them go plain bytes with lengths, never pickled objects, so that neither can make the other run anything.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

MOST_BYTES = 1 << 30  # of one list: eleven sets of heads and an encoder of the largest model
MOST_FRAMES = 20_000
_COUNT, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")


class FrameError(ConnectionError):
    """The other side ended, or sent what is no list within the bounds."""


def send_frames(line: socket.socket, frames: Iterable[bytes]) -> None:
    """Send a list; returns when the other side, or the socket's buffer, has all of it."""
    parts = list(frames)
    line.sendall(_COUNT.pack(len(parts)))
    for part in parts:
        line.sendall(_LENGTH.pack(len(part)))
        line.sendall(part)


def receive_frames(line: socket.socket) -> list[bytes]:
    """Receive a list.

    Raises:
      FrameError: the other side ended before its end, or it is larger than the bounds.
    """
    (count,) = _COUNT.unpack(_exactly(line, _COUNT.size))
    if count > MOST_FRAMES:
        raise FrameError(f"a list of {count} parts, expected at most {MOST_FRAMES}")
    frames, left = [], MOST_BYTES
    for _ in range(count):
        (length,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
        left -= length
        if left < 0:
            raise FrameError(f"a list of more than {MOST_BYTES} bytes")
        frames.append(_exactly(line, length))
    return frames


def _exactly(line: socket.socket, size: int) -> bytes:
    """So many bytes."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        got = line.recv_into(view)
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
