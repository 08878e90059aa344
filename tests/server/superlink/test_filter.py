"""Which calls of a node the SuperLink takes, and what it remembers of them. With real processes: federation/test_attacks.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree

from server.superlink.filter import (
    DESTINATION,
    HASH,
    MOST_INSTRUCTIONS,
    OBJECT,
    PULL,
    SHAPE,
    SOURCE,
    TOO_LARGE,
    TWICE,
    UNASKED,
    Ledger,
    Refusals,
)
from server.superlink.objects import (
    ARRAY,
    CHILDREN,
    GROWTH,
    KIND,
    LARGEST_RECORD,
    MOST_OBJECTS,
    MOST_REPEATED,
    RECORD,
    RefusedError,
    objects_of,
    repeated_pieces,
)
from tests.support.fleet_node import reply_of

RUN, NODE, OTHER = 5, 11, 12
LARGEST = 1_000_000
CONTENT = RecordDict({"update": ArrayRecord({"a": Array(np.ones(100_000, np.float32))})})
ORDER = Metadata(run_id=RUN, message_id="order", src_node_id=1, dst_node_id=NODE, message_type="train", ttl=10.0)
WHOLE = reply_of(NODE, message_from_proto(MessageProto(metadata=ORDER, content=RecordDictProto())), CONTENT)
OBJECTS = {number: one.deflate() for number, one in get_all_nested_objects(WHOLE).items()}
PART, LIST, RECORDS, DICT, REPLY = OBJECTS  # an array's piece, the array, its record, the dict, the message


def instruction(number: str) -> PullMessagesResponse:
    """An instruction with two objects, as the SuperLink gives it to a node."""
    tree = ObjectTree(object_id=number, children=[ObjectTree(object_id=number + "-part")])
    message = MessageProto(metadata=Metadata(run_id=RUN, message_id=number, dst_node_id=NODE))
    return PullMessagesResponse(messages_list=[message], message_object_trees=[tree])


def reply(
    to: str = "order", node: int = NODE, tree: ObjectTree | None = None, **changes: object
) -> PushMessagesRequest:
    """A node's reply; `changes` of its metadata."""
    told = {
        "run_id": RUN,
        "message_id": REPLY if tree is None else tree.object_id,
        "src_node_id": node,
        "dst_node_id": SUPERLINK_NODE_ID,
        "reply_to_message_id": to,
        "ttl": 10.0,
    } | changes
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[MessageProto(metadata=Metadata(**told))],
        message_object_trees=[get_object_tree(WHOLE) if tree is None else tree],
    )


def piece(
    content: bytes | None = None, node: int = NODE, session: str = "session", number: str = PART, run: int = RUN
) -> PushObjectRequest:
    """An object of the reply, or what is said to be one."""
    given = OBJECTS.get(number, b"x") if content is None else content
    return PushObjectRequest(
        node=Node(node_id=node), run_id=run, session_id=session, object_id=number, object_content=given
    )


def object_of(kind: str, children: Sequence[str], body: bytes) -> tuple[str, bytes]:
    """An object that no class of Flower's makes: its id and its bytes."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return get_object_id(content), content


@pytest.fixture
def ledger() -> Ledger:
    """One that has seen an instruction to NODE."""
    made = Ledger(LARGEST)
    made.sent(NODE, instruction("order"))
    return made


def announce(ledger: Ledger, request: PushMessagesRequest | None = None, session: str = "session") -> None:
    """Let a reply be taken by a centre that has none of its objects."""
    request = reply() if request is None else request
    ledger.check_reply(request)
    assert ledger.repeated(request) is None
    wanted = list(objects_of(request.message_object_trees[0]))
    ledger.replied(request, PushMessagesResponse(objects_to_push=wanted, session_id=session))


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
    for number in OBJECTS:
        ledger.check_object(piece(number=number))
        ledger.stored(piece(number=number))
        assert refused(ledger.check_object, piece(number=number)) == OBJECT
    assert not ledger.expects(NODE)


def test_a_reply_whose_answer_was_lost_is_announced_again_and_another_is_not(ledger: Ledger) -> None:
    announce(ledger)
    for number in (REPLY, DICT, RECORDS, LIST):
        ledger.stored(piece(number=number))
    ledger.check_reply(reply())
    again = ledger.repeated(reply())
    assert (again.session_id, list(again.objects_to_push)) == ("session", [PART])
    assert refused(ledger.check_reply, reply(tree=ObjectTree(object_id="another"))) == TWICE


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
    ledger.check_object(piece())
    ledger.check_object(piece())
    assert refused(ledger.check_object, piece()) == TOO_LARGE, "the list of objects has counted, too"
    ledger.check_object(piece(number=REPLY))
    large = reply()
    large.messages_list[0].content.items.add().key = "k" * LARGEST
    other = Ledger(LARGEST)
    other.sent(NODE, instruction("order"))
    assert refused(other.check_reply, large) == TOO_LARGE


def test_the_bytes_are_those_of_the_object_that_was_announced(ledger: Ledger) -> None:
    announce(ledger)
    assert refused(ledger.check_object, piece(OBJECTS[PART][:-1] + b"x")) == HASH
    ledger.check_object(piece())


def array_of(places: object, pieces: int = 1) -> bytes:
    """An array's object, with the places of its pieces."""
    told = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": places}
    body = json.dumps(told).encode()
    return f"Array {','.join('c' * pieces)} {len(body)}".encode() + b"\0" + body


def announce_array(ledger: Ledger, content: bytes, pieces: Sequence[str] = ("c",)) -> str:
    """Announce a reply with one array that has these bytes; its id."""
    number = get_object_id(content)
    tree = get_object_tree(WHOLE)
    leaf = tree.children[0].children[0].children[0]
    leaf.CopyFrom(ObjectTree(object_id=number, children=[ObjectTree(object_id=one) for one in pieces]))
    announce(ledger, reply(tree=tree))
    return number


def test_a_piece_counts_as_often_as_it_stands_in_an_array(ledger: Ledger) -> None:
    """Put together, a megabyte that lists one piece of 5 MB half a million times would be 2.5 TB in the run's process."""
    assert repeated_pieces(array_of([0, 1, 2])) == 0
    assert repeated_pieces(array_of([0, 0, 1, 0])) == 2
    assert repeated_pieces(Array(np.zeros(4_000_000, np.float32)).deflate()) == 1, "zeros are honest, too"
    assert repeated_pieces(ArrayRecord({"a": Array(np.ones(3))}).deflate()) == 0
    number = announce_array(ledger, array_of([0] * 1000))
    assert refused(ledger.check_object, piece(array_of([0] * 1000), number=number)) == TOO_LARGE


def test_an_array_has_the_pieces_that_its_reply_announced(ledger: Ledger) -> None:
    """Before: 300 arrays of a tree that names two pieces once took 8 MB of the quota, and 1.8 GB once put together."""
    number = announce_array(ledger, array_of([0, 1], pieces=2), pieces=())
    assert refused(ledger.check_object, piece(array_of([0, 1], pieces=2), number=number)) == CHILDREN


def test_an_object_has_the_same_parts_wherever_its_reply_names_it(ledger: Ledger) -> None:
    tree = get_object_tree(WHOLE)
    arrays = tree.children[0].children[0].children
    arrays.add().object_id = LIST  # the second time without pieces
    assert refused(ledger.check_reply, reply(tree=tree)) == SHAPE


def test_what_is_no_piece_is_small_and_counts_as_what_it_becomes(ledger: Ledger) -> None:
    """Before: a config record of 6 MB was 180 MB once put together."""
    for size, reason in ((LARGEST // GROWTH, TOO_LARGE), (LARGEST_RECORD, RECORD), (6_000_000, RECORD)):
        number, content = object_of("ConfigRecord", (), bytes(size))
        tree = get_object_tree(WHOLE)
        tree.children[0].children[0].CopyFrom(ObjectTree(object_id=number))
        fresh = Ledger(LARGEST)
        fresh.sent(NODE, instruction("order"))
        announce(fresh, reply(tree=tree))
        assert refused(fresh.check_object, piece(content, number=number)) == reason


@pytest.mark.parametrize(
    "content",
    [
        object_of("Message", (), b"")[1],
        object_of("Array", (), b"")[1],
        object_of("CustomDataClass", (), b"")[1],
        object_of("ArrayChunk", (), b"")[1].replace(b" ", b""),
        object_of("ArrayChunk", (), b"")[1][:-1],
        b"ArrayChunk  \xff\0",
        b"ArrayChunk  " + b"1" * 5000 + b"\0",
        b"A" * (2 * LARGEST_RECORD) + b"\0",
        b"",
    ],
)
def test_an_object_of_another_kind_than_its_place_has_is_refused(ledger: Ledger, content: bytes) -> None:
    announce(ledger)
    assert refused(ledger.check_object, piece(content)) == KIND


def test_a_tree_deeper_than_a_message_is_refused(ledger: Ledger) -> None:
    tree = get_object_tree(WHOLE)
    tree.children[0].children[0].children[0].children[0].children.add().object_id = "deeper"
    assert refused(ledger.check_reply, reply(tree=tree)) == SHAPE


def test_what_the_centre_has_already_counts_too(ledger: Ledger) -> None:
    """Flower does not ask for it again, but the run's process puts it together as often as the reply names it."""
    tree = get_object_tree(WHOLE)
    arrays = tree.children[0].children[0].children
    for number in range(9):
        arrays.add(object_id=f"array-{number}").children.extend(arrays[0].children)
    stored = {PART: OBJECTS[PART]}
    assert refused(lambda request: ledger.check_reply(request, stored.get), reply(tree=tree)) == TOO_LARGE
    lying = get_object_tree(WHOLE)
    lying.children[0].children[0].children[0].ClearField("children")
    assert refused(lambda request: ledger.check_reply(request, OBJECTS.get), reply(tree=lying)) == CHILDREN
    ledger.check_reply(reply(), OBJECTS.get)


def test_what_another_reply_brings_counts_where_it_is_waited_for(ledger: Ledger) -> None:
    """Two of a node's replies, or two nodes: one brings a piece, and the other names it nine times."""
    ledger.sent(OTHER, instruction("second"))
    tree = get_object_tree(WHOLE)
    arrays = tree.children[0].children[0].children
    for number in range(9):
        arrays.add(object_id=f"array-{number}").children.extend(arrays[0].children)
    tree.object_id = "greedy"
    announce(ledger, reply("second", OTHER, tree), "other")
    ledger.sent(OTHER, instruction("third"))
    announce(ledger, reply("third", OTHER), "honest")
    announce(ledger)
    assert ledger.check_object(piece()) == ["greedy"], "and not the honest one"
    ledger.stored(piece())
    assert ledger.check_object(piece(node=OTHER, session="honest")) == [], "its own attempt costs nothing more"


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
def test_an_array_whose_pieces_cannot_be_read_is_refused(content: bytes) -> None:
    with pytest.raises(RefusedError, match=ARRAY):
        repeated_pieces(content)


def test_an_object_that_stands_twice_in_a_reply_counts_twice(ledger: Ledger) -> None:
    tree = get_object_tree(WHOLE)
    array = tree.children[0].children[0].children[0]
    array.children.extend([array.children[0]] * 2)
    announce(ledger, reply(tree=tree))
    assert refused(ledger.check_object, piece()) == TOO_LARGE
    array.children.extend([array.children[0]] * MOST_REPEATED)
    assert refused(ledger.check_reply, reply(tree=tree)) == SHAPE


def test_a_node_pulls_and_forgets_its_own_instructions_alone(ledger: Ledger) -> None:
    for node, number, right in (
        (NODE, "order", True),
        (NODE, "order-part", True),
        (NODE, REPLY, False),
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
