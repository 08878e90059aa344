"""Parts of a message that are few bytes, and what they would become."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id
from hypothesis import given, settings
from hypothesis import strategies as st

from client.node.answer import _inflate
from client.node.parts import MOST_INFLATED, PartsError, bounded_memory, check_parts
from client.node.task import Task
from tests.support.orders import Sender

MB = 1 << 20


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    root = tmp_path_factory.mktemp("sender")
    sender = Sender(root, root / "site.yaml", "hospital-01")
    arrays = ArrayRecord({name: Array(np.arange(4, dtype=np.float32)) for name in ("a", "b")})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    return sender.task(sender.message("train", content))


def whole(kind: str, below: list[str], body: bytes) -> bytes:
    return f"{kind} {','.join(below)} {len(body)}".encode() + b"\0" + body


class Parts(dict):
    """Objects by name."""

    def put(self, kind: str, below: list[str], body: bytes | dict = b"") -> str:
        content = whole(kind, below, body if isinstance(body, bytes) else json.dumps(body).encode())
        self[get_object_id(content)] = content
        return get_object_id(content)

    def array(self, pieces: list[str], places: object, number: int = 0) -> str:
        told = {"dtype": "float32", "shape": [number], "stype": "numpy.ndarray", "arraychunk_ids": places}
        return self.put("Array", pieces, told)

    def message(self, record: str) -> str:
        content = self.put("RecordDict", [record], {"update": record})
        return self.put("Message", [content])

    def of_arrays(self, arrays: dict[str, str]) -> str:
        return self.message(self.put("ArrayRecord", list(dict.fromkeys(arrays.values())), arrays))


def one_piece_many_times(parts: Parts) -> str:
    piece = parts.put("ArrayChunk", [], bytes(MB))
    return parts.of_arrays({"a": parts.array([piece], [0] * 800)})


def one_piece_in_many_arrays(parts: Parts) -> str:
    piece = parts.put("ArrayChunk", [], bytes(MB))
    return parts.of_arrays({f"k{n}": parts.array([piece], [0, 0], n) for n in range(300)})


def one_array_by_many_names(parts: Parts) -> str:
    array = parts.array([parts.put("ArrayChunk", [], bytes(MB))], [0])
    return parts.of_arrays({f"k{n}": array for n in range(600)})


def many_small_places(parts: Parts) -> str:
    return parts.of_arrays({"a": parts.array([parts.put("ArrayChunk", [], b"")], [0] * 1_000_000)})


def a_chain(parts: Parts) -> str:
    record = parts.put("ConfigRecord", [])
    for _ in range(5000):
        record = parts.put("RecordDict", [record], {"a": record})
    return parts.message(record)


def many_values(parts: Parts) -> str:
    return parts.message(parts.put("ConfigRecord", [], bytes(2 * MB)))


def many_names(parts: Parts) -> str:
    return parts.of_arrays({"a" * 9_000_000: parts.array([], [])})


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (one_piece_many_times, "that becomes 83"),
        (one_piece_in_many_arrays, "that becomes 62"),
        (one_array_by_many_names, "that becomes 62"),
        (many_small_places, "of 1000000 pieces"),
        (a_chain, "a RecordDict of the message has a 'RecordDict'"),
        (many_values, "2097... of them values"),
        (many_names, "bytes beside its arrays"),
    ],
)
def test_what_would_become_too_much_is_refused_before_it_does(
    task: Task, build: Callable[[Parts], str], told: str
) -> None:
    parts = Parts()
    tree = ObjectTree(object_id=build(parts)).SerializeToString()
    bomb = replace(task, tree=tree, objects=tuple(parts.values()))
    assert sum(map(len, bomb.objects)) < 16 * MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PartsError, match=told):
        _inflate(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "kilobytes"


@pytest.mark.parametrize("places", [[-1], [1], [True], ["0"], 3, None, {"0": 0}, [[0]]])
def test_a_list_of_pieces_that_is_none_is_refused(places: object) -> None:
    parts = Parts()
    piece = parts.put("ArrayChunk", [], b"1234")
    with pytest.raises(PartsError, match="cannot be read"):
        check_parts(parts.of_arrays({"a": parts.array([piece], places)}), parts)


def test_something_else_than_a_message_is_refused() -> None:
    parts = Parts()
    with pytest.raises(PartsError, match="something else than a message"):
        check_parts(parts.put("ConfigRecord", []), parts)
    with pytest.raises(PartsError, match="cannot be read"):
        check_parts("0" * 64, parts)
    with pytest.raises(PartsError, match="cannot be read"):
        check_parts(parts.put("Message", ["0" * 64]), parts)


def test_a_message_as_flower_makes_it_is_put_together(task: Task) -> None:
    message = _inflate(task)
    assert message.content["arrays"]["b"].numpy().tolist() == [0, 1, 2, 3]
    assert message.content["config"]["server-round"] == 1


def test_the_largest_message_that_may_come_is_put_together(tmp_path: Path) -> None:
    """In a process of its own, as in the hospital, so that its memory is not this one's."""
    if (child := os.fork()) == 0:
        try:
            sender = Sender(tmp_path, tmp_path / "site.yaml", "hospital-01")
            count = MOST_INFLATED // (20 * MB) - 1
            arrays = ArrayRecord({f"k{n}": Array(np.full(5 * MB, n, np.float32)) for n in range(count)})
            made = sender.task(sender.message("train", RecordDict({"arrays": arrays})))
            del arrays
            with bounded_memory():
                message = _inflate(made)
            os._exit(0 if len(message.content["arrays"]) == count else 2)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_memory_is_bounded_until_the_block_ends() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), bounded_memory(64 * MB):
        bytes(256 * MB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytes(256 * MB)) == 256 * MB


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_the_objects_they_are_counted_or_refused(data: st.DataObject) -> None:
    parts = Parts()
    kinds = st.sampled_from(["Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "ConfigRecord", "X", ""])
    names = ["0" * 64]
    for _ in range(data.draw(st.integers(1, 8))):
        below = data.draw(st.lists(st.sampled_from(names), max_size=3))
        names.append(parts.put(data.draw(kinds), below, data.draw(st.binary(max_size=30))))
    try:
        check_parts(parts.put("Message", [names[-1]]), parts)
    except PartsError:
        return
