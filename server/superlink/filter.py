"""Filter of a node's calls to the SuperLink: only replies of its own to instructions that it was sent.

Flower 1.41 checks that a caller has a node's key. It does not compare the source of a message with the caller, so a
registered node could instruct another in the centre's name, and it stores objects that no instruction asked for. The
ledger here sees each node's calls after Flower has authenticated them: it remembers which instructions went to which node,
takes one reply to each from that node, and only the objects of that reply, up to a number of bytes once it is put together.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id

from server.superlink.objects import Place, RefusedError, cost_of, objects_of, places_of

MOST_INSTRUCTIONS = 64  # that are remembered of one node; a run has one or two open at a time
LONGEST_TEXT = 256  # characters of each name in a reply's metadata
LONGEST_RUNTIME_S = 30 * 86400.0
SOURCE = "sends a message in another's name"
DESTINATION = "sends a message to a node; only the centre instructs"
SHAPE = "sends a message that is no single reply with its list of objects"
UNASKED = "answers an instruction that it was not sent"
TWICE = "answers an instruction a second time, with another reply"
OBJECT = "sends an object that no reply of its own announced"
HASH = "sends other bytes than the object that its reply announced"
TOO_LARGE = "sends more bytes than a reply may have (largest_reply_mb in centre.toml)"
PULL = "asks for an object that it was not sent"

Stored = Callable[[str], bytes | None]


@dataclass
class Instruction:
    """One instruction that a node was sent, and its reply.

    Attributes:
      run: number of its run.
      objects: of the instruction, which the node may pull.
      announced: places and bytes left of the reply that was checked last, until Flower has taken it.
      reply: id of the reply; empty until it came.
      session: Flower's, in which the reply's objects are pushed.
      pending: the reply's objects that are still to come.
      charged: those of them that another reply brought, and that have counted here.
      places: position of each of the reply's objects, as announced.
      left: bytes that the reply may still have, once it is put together.
    """

    run: int
    objects: frozenset[str]
    left: int
    announced: tuple[dict[str, Place], int] | None = None
    reply: str = ""
    session: str = ""
    pending: set[str] = field(default_factory=set)
    charged: set[str] = field(default_factory=set)
    places: dict[str, Place] = field(default_factory=dict)


class Ledger:
    """Record of instructions sent to each node, and of its replies; thread-safe.

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

    def check_reply(self, request: PushMessagesRequest, stored: Stored = lambda _: None) -> None:
        """Refuse a message that is not the one reply to an instruction of its node.

        Args:
          request: the call.
          stored: content of an object that Flower has already, from any message; empty or None if it has not. Flower asks
            nobody for those again, but the run's process puts them together like the others.

        Raises:
          RefusedError: with its reason.
        """
        if (fault := _fault(request)) is not None:
            raise RefusedError(fault)
        if (places := places_of(request.message_object_trees[0])) is None:
            raise RefusedError(SHAPE)
        metadata = request.messages_list[0].metadata
        with self._lock:
            instruction = self._nodes.get(request.node.node_id, {}).get(metadata.reply_to_message_id)
            if instruction is None or instruction.run != metadata.run_id:
                raise RefusedError(UNASKED)
            if instruction.reply not in ("", metadata.message_id):
                raise RefusedError(TWICE)
            if instruction.reply:  # announced again; what it costs has counted
                return
            left = instruction.left - request.ByteSize()
            for number, place in places.items():
                if left >= 0 and (content := stored(number)):
                    left -= cost_of(content, place)
            if left < 0:
                raise RefusedError(TOO_LARGE)
            instruction.announced = places, left

    def replied(self, request: PushMessagesRequest, response: PushMessagesResponse) -> None:
        """Remember a reply that Flower has taken, and the objects that it still wants of it."""
        metadata = request.messages_list[0].metadata
        with self._lock:
            instruction = self._nodes[request.node.node_id].get(metadata.reply_to_message_id)
            if instruction is not None and instruction.announced is not None:
                instruction.reply = metadata.message_id
                instruction.places, instruction.left = instruction.announced
                instruction.session = response.session_id
                instruction.pending = set(response.objects_to_push)

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

    def check_object(self, request: PushObjectRequest) -> list[str]:
        """Refuse an object that its node's replies did not announce, or that makes a reply too large.

        Returns:
          Other replies that wait for the same object and are too large with it: they must not become whole.

        Raises:
          RefusedError: with its reason.
        """
        number, content = request.object_id, request.object_content
        with self._lock:
            for one in self._nodes.get(request.node.node_id, {}).values():
                if (request.session_id, request.run_id) == (one.session, one.run) and number in one.pending:
                    break
            else:
                raise RefusedError(OBJECT)
            if number in one.charged:  # it came with another reply
                return []
            size = cost_of(content, one.places[number])
            if size > one.left:
                raise RefusedError(TOO_LARGE)
            if get_object_id(content) != number:
                raise RefusedError(HASH)
            one.left -= size
            return [other.reply for other in self._waiting_for(number) if other is not one and _exceeds(other, request)]

    def _waiting_for(self, number: str) -> list[Instruction]:
        """Instructions to any node whose reply waits for an object."""
        return [one for known in self._nodes.values() for one in known.values() if number in one.pending]

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
    if len(request.clientapp_runtime_list) > 1:
        return SHAPE
    times = (metadata.ttl, metadata.created_at, *request.clientapp_runtime_list)
    if not all(math.isfinite(time) and time >= 0 for time in times):
        return SHAPE
    if any(time > LONGEST_RUNTIME_S for time in request.clientapp_runtime_list):
        return SHAPE
    return None


def _exceeds(instruction: Instruction, request: PushObjectRequest) -> bool:
    """Count an object that another reply brought, where it has not counted; return whether the reply is too large with it."""
    number = request.object_id
    if number in instruction.charged:
        return False
    instruction.charged.add(number)
    try:
        instruction.left -= cost_of(request.object_content, instruction.places[number])
    except RefusedError:
        instruction.left = -1
    return instruction.left < 0


class Refusals:
    """Counts of refused calls by site and reason, logged at 1, 2, 4, 8 and so on: a log line for each would fill the disk.

    Args:
      tell: called with a line.
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
