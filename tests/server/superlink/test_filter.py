"""Which calls of a node the SuperLink takes, and what it remembers of them. With real processes: federation/test_attacks.py."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node

from server.superlink.filter import (
    ARRAY,
    DESTINATION,
    MOST_INSTRUCTIONS,
    MOST_OBJECTS,
    MOST_REPEATED,
    OBJECT,
    PULL,
    SHAPE,
    SOURCE,
    TOO_LARGE,
    TWICE,
    UNASKED,
    Ledger,
    Refusals,
    RefusedError,
    objects_of,
    repeated_pieces,
)

RUN, NODE, OTHER = 5, 11, 12
LARGEST = 10_000


def instruction(number: str) -> PullMessagesResponse:
    """An instruction with two objects, as the SuperLink gives it to a node."""
    tree = ObjectTree(object_id=number, children=[ObjectTree(object_id=number + "-part")])
    message = Message(metadata=Metadata(run_id=RUN, message_id=number, dst_node_id=NODE))
    return PullMessagesResponse(messages_list=[message], message_object_trees=[tree])


def reply(to: str = "order", node: int = NODE, **changes: object) -> PushMessagesRequest:
    """A node's reply with two objects; `changes` of its metadata."""
    told = {
        "run_id": RUN,
        "message_id": "reply",
        "src_node_id": node,
        "dst_node_id": SUPERLINK_NODE_ID,
        "reply_to_message_id": to,
        "ttl": 10.0,
    } | changes
    tree = ObjectTree(object_id=told["message_id"], children=[ObjectTree(object_id="part")])
    return PushMessagesRequest(
        node=Node(node_id=node), messages_list=[Message(metadata=Metadata(**told))], message_object_trees=[tree]
    )


def piece(content: bytes = b"x", node: int = NODE, session: str = "session", number: str = "part", run: int = RUN):
    return PushObjectRequest(
        node=Node(node_id=node), run_id=run, session_id=session, object_id=number, object_content=content
    )


@pytest.fixture
def ledger() -> Ledger:
    """One that has seen an instruction to NODE."""
    made = Ledger(LARGEST)
    made.sent(NODE, instruction("order"))
    return made


def announce(ledger: Ledger) -> None:
    ledger.check_reply(reply())
    assert ledger.repeated(reply()) is None
    ledger.replied(reply(), PushMessagesResponse(objects_to_push=["reply", "part"], session_id="session"))


def refused(check: object, request: object) -> str:
    with pytest.raises(RefusedError) as error:
        check(request)
    return str(error.value)


def test_a_reply_to_an_instruction_and_its_objects_are_taken_once(ledger: Ledger) -> None:
    assert not ledger.expects(NODE)
    assert refused(ledger.check_object, piece()) == OBJECT
    announce(ledger)
    assert ledger.expects(NODE)
    assert not ledger.expects(OTHER)
    for number in ("reply", "part"):
        ledger.check_object(piece(number=number))
        ledger.stored(piece(number=number))
        assert refused(ledger.check_object, piece(number=number)) == OBJECT
    assert not ledger.expects(NODE)


def test_a_reply_whose_answer_was_lost_is_announced_again_and_another_is_not(ledger: Ledger) -> None:
    announce(ledger)
    ledger.stored(piece(number="reply"))
    ledger.check_reply(reply())
    again = ledger.repeated(reply())
    assert (again.session_id, list(again.objects_to_push)) == ("session", ["part"])
    assert refused(ledger.check_reply, reply(message_id="another")) == TWICE


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (reply(src_node_id=SUPERLINK_NODE_ID), SOURCE),
        (reply(src_node_id=OTHER), SOURCE),
        (reply(dst_node_id=OTHER), DESTINATION),
        (reply(to=""), DESTINATION),
        (reply(to="another"), UNASKED),
        (reply(run_id=RUN + 1), UNASKED),
        (reply(node=OTHER), UNASKED),
        (reply(ttl=math.nan), SHAPE),
        (reply(ttl=-1.0), SHAPE),
        (reply(created_at=math.inf), SHAPE),
        (reply(group_id="g" * 300), SHAPE),
        (reply(message_type="t" * 300), SHAPE),
        (reply(message_id="m" * 300), SHAPE),
        (PushMessagesRequest(node=Node(node_id=NODE)), SHAPE),
        (PushMessagesRequest(node=Node(node_id=NODE), messages_list=reply().messages_list), SHAPE),
        (PushMessagesRequest(node=Node(node_id=NODE), messages_list=[*reply().messages_list] * 2), SHAPE),
    ],
)
def test_what_is_no_reply_of_the_callers_own_is_refused(
    ledger: Ledger, request_: PushMessagesRequest, reason: str
) -> None:
    assert refused(ledger.check_reply, request_) == reason


@pytest.mark.parametrize("seconds", [[math.nan], [math.inf], [-1.0], [1e9], [1.0, 1.0]])
def test_a_runtime_that_is_none_is_refused(ledger: Ledger, seconds: list[float]) -> None:
    """The centre's list of runs adds them up."""
    request = reply()
    request.clientapp_runtime_list.extend(seconds)
    assert refused(ledger.check_reply, request) == SHAPE


def test_a_tree_of_another_message_or_of_too_many_objects_is_refused(ledger: Ledger) -> None:
    request = reply()
    request.message_object_trees[0].object_id = "another"
    assert refused(ledger.check_reply, request) == SHAPE
    request = reply()
    request.message_object_trees[0].children.extend(ObjectTree(object_id=str(n)) for n in range(MOST_OBJECTS))
    assert sum(1 for _ in objects_of(request.message_object_trees[0])) > MOST_OBJECTS
    assert refused(ledger.check_reply, request) == SHAPE


@pytest.mark.parametrize(
    "request_", [piece(node=OTHER), piece(session=""), piece(session="s"), piece(number="p"), piece(run=RUN + 1)]
)
def test_an_object_that_was_not_announced_there_is_refused(ledger: Ledger, request_: PushObjectRequest) -> None:
    announce(ledger)
    assert refused(ledger.check_object, request_) == OBJECT


def test_a_reply_has_a_number_of_bytes_and_attempts_count(ledger: Ledger) -> None:
    announce(ledger)
    half = bytes(LARGEST // 2)
    ledger.check_object(piece(half))
    assert refused(ledger.check_object, piece(half)) == TOO_LARGE, "the list of objects has counted, too"
    ledger.check_object(piece(b"x"))
    large = reply()
    large.messages_list[0].content.items.add().key = "k" * LARGEST
    assert refused(ledger.check_reply, large) == TOO_LARGE


def array_of(places: object, pieces: int = 1) -> bytes:
    """An array's object, with the places of its pieces."""
    told = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": places}
    body = json.dumps(told).encode()
    return f"Array {','.join('c' * pieces)} {len(body)}".encode() + b"\0" + body


def test_a_piece_counts_as_often_as_it_stands_in_an_array(ledger: Ledger) -> None:
    """Put together, a megabyte that lists one piece of 5 MB half a million times would be 2.5 TB in the run's process."""
    assert repeated_pieces(array_of([0, 1, 2])) == 0
    assert repeated_pieces(array_of([0, 0, 1, 0])) == 2
    assert repeated_pieces(Array(np.zeros(4_000_000, np.float32)).deflate()) == 1, "zeros are honest, too"
    assert repeated_pieces(ArrayRecord({"a": Array(np.ones(3))}).deflate()) == 0
    announce(ledger)
    assert refused(ledger.check_object, piece(array_of([0] * 1000))) == TOO_LARGE
    ledger.check_object(piece(array_of([0])))


@pytest.mark.parametrize(
    "content",
    [
        array_of(7),
        array_of("ab"),
        array_of([0.5]),
        array_of([-1]),
        array_of([True]),
        array_of(None),
        array_of([[0]]),
        b"Array ",
        b"Array c 2\x00{}",
        b"Array c 9\x00[[[[[[[[",
        b"Array c x\x00{}",
        b"Array c 100000\x00" + b"[" * 100000,
        b"Array c 1\x00\xff",
        b"Array \xff 1\x00{}",
    ],
)
def test_an_array_whose_pieces_cannot_be_read_is_refused(ledger: Ledger, content: bytes) -> None:
    announce(ledger)
    assert refused(ledger.check_object, piece(content)) == ARRAY


def test_an_object_that_stands_twice_in_a_reply_counts_twice(ledger: Ledger) -> None:
    request = reply()
    request.message_object_trees[0].children.extend([ObjectTree(object_id="part")] * 9)
    ledger.check_reply(request)
    ledger.replied(request, PushMessagesResponse(objects_to_push=["part"], session_id="session"))
    assert refused(ledger.check_object, piece(bytes(LARGEST // 10))) == TOO_LARGE
    request.message_object_trees[0].children.extend([ObjectTree(object_id="part")] * MOST_REPEATED)
    assert refused(ledger.check_reply, request) == SHAPE


def test_a_node_pulls_and_forgets_its_own_instructions_alone(ledger: Ledger) -> None:
    for node, number, right in (
        (NODE, "order", True),
        (NODE, "order-part", True),
        (NODE, "reply", False),
        (OTHER, "order", False),
    ):
        request = PullObjectRequest(node=Node(node_id=node), run_id=RUN, object_id=number)
        if right:
            ledger.check_pull(request)
        else:
            assert refused(ledger.check_pull, request) == PULL
    ledger.check_confirmation(ConfirmMessageReceivedRequest(node=Node(node_id=NODE), message_object_id="order"))
    for node, number in ((NODE, "order-part"), (OTHER, "order")):
        request = ConfirmMessageReceivedRequest(node=Node(node_id=node), message_object_id=number)
        assert refused(ledger.check_confirmation, request) == PULL


def test_what_is_remembered_of_a_node_is_bounded(ledger: Ledger) -> None:
    for number in range(MOST_INSTRUCTIONS):
        ledger.sent(NODE, instruction(f"order-{number}"))
    assert refused(ledger.check_reply, reply()) == UNASKED
    ledger.check_reply(reply("order-0"))


def test_refusals_are_told_by_site_and_seldom() -> None:
    told: list[str] = []
    refusals = Refusals(told.append, {NODE: "hospital-01"}.get)
    for _ in range(1000):
        refusals.count(NODE, SOURCE)
    refusals.count(NODE, OBJECT)
    assert told[:2] == [f"refused: hospital-01 {SOURCE}", f"refused: hospital-01 {SOURCE} (2 times)"]
    assert told[-2:] == [f"refused: hospital-01 {SOURCE} (512 times)", f"refused: hospital-01 {OBJECT}"]
    assert len(told) == 11
