"""What a hospital's node may send to the SuperLink: replies of its own to instructions that it was sent, and nothing else.

Flower 1.41 checks that a caller has a node's key. It does not compare the source of a message with the caller, so a
registered node could instruct another in the centre's name, and it stores objects that no instruction asked for. The
ledger here sees each node's calls after Flower has authenticated them: it remembers which instructions went to which node,
takes one reply to each from that node, and only the objects of that reply, up to a number of bytes.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flwr.app import Array
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_body

MOST_INSTRUCTIONS = 64  # that are remembered of one node; a run has one or two open at a time
MOST_OBJECTS = 20_000  # of one reply
MOST_REPEATED = 2_000  # places in its list at which an object stands again
LARGEST_PIECE = 8_192 * 1024  # bytes; the door lets no larger object in
LONGEST_TEXT = 256  # characters of each name in a reply's metadata
LONGEST_RUNTIME_S = 30 * 86400.0
SOURCE = "sends a message in another's name"
DESTINATION = "sends a message to a node; only the centre instructs"
SHAPE = "sends a message that is no single reply with its list of objects"
ARRAY = "sends an array whose list of pieces cannot be read"
UNASKED = "answers an instruction that it was not sent"
TWICE = "answers an instruction a second time, with another reply"
OBJECT = "sends an object that no reply of its own announced"
TOO_LARGE = "sends more bytes than a reply may have (largest_reply_mb in centre.toml)"
PULL = "asks for an object that it was not sent"


class RefusedError(Exception):
    """A call that its node may not make; the text is one of the reasons above."""


@dataclass
class Instruction:
    """One instruction that a node was sent, and its reply.

    Attributes:
      run: number of its run.
      objects: of the instruction, which the node may pull.
      reply: id of the reply; empty until it came.
      session: Flower's, in which the reply's objects are pushed.
      pending: the reply's objects that are still to come.
      uses: how often each object stands in the reply; the run's process puts it together as often.
      left: bytes that the reply may still have, once it is put together.
    """

    run: int
    objects: frozenset[str]
    left: int
    reply: str = ""
    session: str = ""
    pending: set[str] = field(default_factory=set)
    uses: Counter[str] = field(default_factory=Counter)


class Ledger:
    """Which instructions went to which node, and what it sent for them; safe for threads.

    Args:
      largest_reply: bytes that one reply may have.
    """

    def __init__(self, largest_reply: int):
        self._largest = largest_reply
        self._nodes: dict[int, OrderedDict[str, Instruction]] = {}
        self._lock = threading.Lock()

    def sent(self, node: int, response: PullMessagesResponse) -> None:
        """Remember the instructions that a node has just been given."""
        with self._lock:
            known = self._nodes.setdefault(node, OrderedDict())
            for message, tree in zip(response.messages_list, response.message_object_trees, strict=False):
                objects = frozenset(objects_of(tree))
                known[tree.object_id] = Instruction(message.metadata.run_id, objects, self._largest)
            while len(known) > MOST_INSTRUCTIONS:
                known.popitem(last=False)

    def check_reply(self, request: PushMessagesRequest) -> None:
        """Refuse a message that is not the one reply to an instruction of its node.

        Raises:
          RefusedError: with its reason.
        """
        if (fault := _fault(request)) is not None:
            raise RefusedError(fault)
        metadata = request.messages_list[0].metadata
        with self._lock:
            instruction = self._nodes.get(request.node.node_id, {}).get(metadata.reply_to_message_id)
            if instruction is None or instruction.run != metadata.run_id:
                raise RefusedError(UNASKED)
            if instruction.reply not in ("", metadata.message_id):
                raise RefusedError(TWICE)
            if request.ByteSize() > instruction.left:
                raise RefusedError(TOO_LARGE)

    def replied(self, request: PushMessagesRequest, response: PushMessagesResponse) -> None:
        """Remember a reply that Flower has taken, and the objects that it still wants of it."""
        metadata = request.messages_list[0].metadata
        with self._lock:
            instruction = self._nodes[request.node.node_id].get(metadata.reply_to_message_id)
            if instruction is not None:
                instruction.reply = metadata.message_id
                instruction.left -= request.ByteSize()
                instruction.session = response.session_id
                instruction.pending = set(response.objects_to_push)
                instruction.uses = Counter(objects_of(request.message_object_trees[0]))

    def repeated(self, request: PushMessagesRequest) -> PushMessagesResponse | None:
        """Return the answer to a reply that is announced again, since its node did not get the first; None for a new one.

        Flower would answer that it wants no objects, and the reply would never be complete.
        """
        metadata = request.messages_list[0].metadata
        with self._lock:
            instruction = self._nodes[request.node.node_id].get(metadata.reply_to_message_id)
            if instruction is None or not instruction.reply:
                return None
            return PushMessagesResponse(
                results={instruction.reply: 0},
                objects_to_push=sorted(instruction.pending),
                session_id=instruction.session,
            )

    def expects(self, node: int) -> bool:
        """Return whether a node has objects of a reply still to send; asked before an object's body is read."""
        with self._lock:
            return any(one.pending for one in self._nodes.get(node, {}).values())

    def check_object(self, request: PushObjectRequest) -> None:
        """Refuse an object that its node's replies did not announce, or that makes a reply too large.

        Raises:
          RefusedError: with its reason.
        """
        again = repeated_pieces(request.object_content)
        with self._lock:
            for one in self._nodes.get(request.node.node_id, {}).values():
                if (request.session_id, request.run_id) == (one.session, one.run) and request.object_id in one.pending:
                    break
            else:
                raise RefusedError(OBJECT)
            # A piece of a few bytes that stands in an array a million times is a million pieces.
            size = len(request.object_content) * one.uses[request.object_id] + again * LARGEST_PIECE
            if size > one.left:
                raise RefusedError(TOO_LARGE)
            one.left -= size

    def stored(self, request: PushObjectRequest) -> None:
        """Remember that Flower has stored an object."""
        with self._lock:
            for one in self._nodes.get(request.node.node_id, {}).values():
                one.pending.discard(request.object_id)

    def check_pull(self, request: PullObjectRequest) -> None:
        """Refuse to give a node an object of no instruction to it."""
        with self._lock:
            known = self._nodes.get(request.node.node_id, {}).values()
            if not any(request.object_id in one.objects for one in known):
                raise RefusedError(PULL)

    def check_confirmation(self, request: ConfirmMessageReceivedRequest) -> None:
        """Refuse to forget a message that is no instruction to the node that asks."""
        with self._lock:
            if request.message_object_id not in self._nodes.get(request.node.node_id, {}):
                raise RefusedError(PULL)


def _fault(request: PushMessagesRequest) -> str | None:
    """Return what is wrong with a reply whatever the instruction was; None if nothing is."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return SHAPE
    metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
    if metadata.src_node_id != request.node.node_id:
        return SOURCE
    if metadata.dst_node_id != SUPERLINK_NODE_ID or not metadata.reply_to_message_id:
        return DESTINATION
    texts = (metadata.message_id, metadata.reply_to_message_id, metadata.group_id, metadata.message_type)
    if metadata.message_id != tree.object_id or max(map(len, texts)) > LONGEST_TEXT:
        return SHAPE
    objects = list(objects_of(tree))
    if len(objects) > MOST_OBJECTS or len(objects) - len(set(objects)) > MOST_REPEATED:
        return SHAPE
    if len(request.clientapp_runtime_list) > 1:
        return SHAPE
    times = (metadata.ttl, metadata.created_at, *request.clientapp_runtime_list)
    if not all(math.isfinite(time) and time >= 0 for time in times):
        return SHAPE
    if any(time > LONGEST_RUNTIME_S for time in request.clientapp_runtime_list):
        return SHAPE
    return None


def objects_of(tree: ObjectTree) -> Iterator[str]:
    """Yield the id of a message's object and of all objects below it."""
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        yield one.object_id
        waiting.extend(one.children)


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


class Refusals:
    """Counts of refused calls by site and reason, told at 1, 2, 4, 8 and so on: a log line for each would fill the disk.

    Args:
      tell: told a line.
      name_of: the site of a node.
    """

    def __init__(self, tell: Callable[[str], None], name_of: Callable[[int], str]):
        self._tell, self._name_of = tell, name_of
        self._counts: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def count(self, node: int, reason: str) -> None:
        """Count a refusal; nodes are registered ones and reasons from a closed list, so that this is bounded."""
        with self._lock:
            number = self._counts[node, reason] = self._counts.get((node, reason), 0) + 1
        if number & (number - 1) == 0:
            times = "" if number == 1 else f" ({number} times)"
            self._tell(f"refused: {self._name_of(node)} {reason}{times}")
