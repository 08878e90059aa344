"""Objects of a reply: where each may occur, and its cost to the run's process that assembles them.

A reply is announced as a tree of object ids; the objects follow one by one. Flower 1.41 puts an object together from the
children that its own head names, whatever the tree said. So heads are compared with the tree here, or a tree that names a
piece once would hide an array that has it a hundred times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import Array
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content

LARGEST_PIECE = 8_192 * 1024  # bytes; the door lets no larger object in
LARGEST_RECORD = 256 * 1024  # bytes of any object that is no piece; an honest one of 300 tensors has 50 KB
GROWTH = 32  # memory of a record, a byte on the line; measured: 29 for a list of empty strings
MOST_OBJECTS = 20_000  # of one reply
MOST_REPEATED = 2_000  # places in its list at which an object stands again
PIECE = "ArrayChunk"
# Kind of an object -> how deep it stands below its message.
DEPTHS = {
    "Message": 0,
    "RecordDict": 1,
    "ArrayRecord": 2,
    "ConfigRecord": 2,
    "MetricRecord": 2,
    "Array": 3,
    PIECE: 4,
}
ARRAY = "sends an array whose list of pieces cannot be read"
KIND = "sends an object of a kind that has no place there in a reply"
CHILDREN = "sends an object with other parts than its reply announced"
RECORD = f"sends an object of more than {LARGEST_RECORD // 1024} KB that is no piece of an array"


class RefusedError(Exception):
    """A call that its node may not make; the text is one of a closed list of reasons."""


@dataclass(frozen=True)
class Place:
    """Position of an object in a reply.

    Attributes:
      depth: below the message.
      children: ids of its parts, in order.
      uses: how often it occurs; the run's process assembles it as often.
    """

    depth: int
    children: tuple[str, ...]
    uses: int = 1


def objects_of(tree: ObjectTree) -> Iterator[str]:
    """Yield the id of a message's object and of all objects below it."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        yield one.object_id
        waiting.extend(one.children)


def places_of(tree: ObjectTree) -> dict[str, Place] | None:
    """Return the position of each object of a reply; None for a tree that no reply has.

    That is one with too many objects, too deep, or with two places of one object that do not agree on its parts.
    """
    places: dict[str, Place] = {}
    waiting, seen = [(tree, 0)], 0
    while waiting:
        one, depth = waiting.pop()
        seen += 1
        children = tuple(child.object_id for child in one.children)
        known = places.get(one.object_id)
        if depth > DEPTHS[PIECE] or (known is not None and (known.depth, known.children) != (depth, children)):
            return None
        if seen > MOST_OBJECTS or seen - len(places) > MOST_REPEATED:
            return None
        places[one.object_id] = Place(depth, children, 1 if known is None else known.uses + 1)
        waiting.extend((child, depth + 1) for child in one.children)
    return places


def cost_of(content: bytes, place: Place) -> int:
    """Return the bytes that an object takes in the run's process, as often as it occurs in the reply.

    Raises:
      RefusedError: it is too large, of a kind that has no place there, or has other parts than announced.
    """
    end = content.find(HEAD_BODY_DIVIDER, 0, LARGEST_RECORD)
    try:
        kind, children, _ = get_object_head_values_from_object_content(content[: end + 1] if end >= 0 else b"")
    except ValueError as error:  # UnicodeDecodeError is one
        raise RefusedError(KIND) from error
    if DEPTHS.get(kind) != place.depth:
        raise RefusedError(KIND)
    if tuple(children) != place.children:
        raise RefusedError(CHILDREN)
    if kind == PIECE:
        return len(content) * place.uses
    if len(content) > LARGEST_RECORD:
        raise RefusedError(RECORD)
    # A piece of a few bytes that stands in an array a million times is a million pieces.
    return len(content) * GROWTH * place.uses + repeated_pieces(content) * LARGEST_PIECE


def repeated_pieces(content: bytes) -> int:
    """Return how many of an array's pieces are there already, as an earlier piece of the same array; 0 for other objects.

    Raises:
      RefusedError: the array's list of pieces is none.
    """
    if not content.startswith(b"Array "):
        return 0
    try:
        told = json.loads(get_object_body(content, Array))
        pieces = told["arraychunk_ids"]
        if not all(type(place) is int and place >= 0 for place in pieces):
            raise RefusedError(ARRAY)
        return len(pieces) - len(set(pieces))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RefusedError(ARRAY) from error
