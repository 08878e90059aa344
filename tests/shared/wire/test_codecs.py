from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.wire.codecs import BITS, BLOCK, CodecError, coded_sizes, decode, encode, minus, plus
from shared.wire.records import UpdateError, coded_record, from_coded_record, shapes_of

SHAPES = {
    "encoder.a": (3, BLOCK - 1),
    "encoder.b": (7,),
    "encoder.c": (),
    "cls.norm.running_var": (5,),
    "cls.weight": (1, 6),
}


def tensors(seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: np.abs(value) if "running" in name else value
        for name, value in ((n, rng.normal(0, size, s).astype(np.float32)) for n, s in SHAPES.items())
    }


def lost(codec: str, difference: np.ndarray) -> float:
    """Share of a difference's length that coding takes."""
    start = {"encoder.a": np.zeros_like(difference)}
    received = encode({"encoder.a": difference}, start, codec).received["encoder.a"]
    return float(np.linalg.norm(received - difference) / np.linalg.norm(difference))


@pytest.mark.parametrize("codec", BITS)
def test_both_sides_hold_the_same_bits(codec: str) -> None:
    start, new = tensors(0), tensors(1)
    coded = encode(new, start, codec)
    received = decode(coded.data, start, codec)
    assert list(received) == sorted(SHAPES)
    for name, value in received.items():
        assert value.dtype == np.float32
        assert value.shape == SHAPES[name]
        np.testing.assert_array_equal(value, coded.received[name])


@pytest.mark.parametrize(("codec", "most"), [("fp16", 0.5), ("int8", 0.252), ("int4", 0.1265), ("int2", 0.0645)])
def test_a_message_is_as_small_as_its_bits(codec: str, most: float) -> None:
    shapes = {f"encoder.{number}": (48, 96) for number in range(20)}
    start = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    size = len(encode(start, start, codec).data["encoder"])
    assert size == coded_sizes(shapes, codec)["encoder"]
    assert size <= most * 4 * 20 * 48 * 96


# Max 1960, table II: the mean squared error of the best even levels is .1188 at 2 bits and .01154 at 4.
@pytest.mark.parametrize(("codec", "error"), [("int2", 0.1188**0.5), ("int4", 0.01154**0.5), ("int8", 0.0093)])
def test_normal_values_lose_what_the_best_even_levels_lose(codec: str, error: float) -> None:
    difference = np.random.default_rng(3).normal(0, 1e-5, 200 * BLOCK + 77).astype(np.float32)
    assert lost(codec, difference) == pytest.approx(error, rel=0.03)


def test_a_block_follows_its_own_size() -> None:
    """A tensor whose halves differ a million times loses no more of either than one of even size."""
    difference = np.random.default_rng(3).normal(0, 1, 2 * BLOCK).astype(np.float32)
    difference[BLOCK:] *= 1e-6
    start = {"encoder.a": np.zeros_like(difference)}
    received = encode({"encoder.a": difference}, start, "int4").received["encoder.a"]
    small = difference[BLOCK:]
    assert np.linalg.norm(received[BLOCK:] - small) < 0.13 * np.linalg.norm(small)


@pytest.mark.parametrize("codec", BITS)
def test_what_is_lost_comes_later(codec: str) -> None:
    """Error feedback: after many messages the sum that came is off by one message's loss, not by all of theirs."""
    rng = np.random.default_rng(0)
    start = {"encoder.a": np.zeros(4 * BLOCK, np.float32)}
    sent, came = dict(start), dict(start)
    residual, steps = dict(start), 60
    for _ in range(steps):
        step = {"encoder.a": rng.normal(0.1, 1, 4 * BLOCK).astype(np.float32)}
        sent = plus(sent, step)
        target = plus(plus(came, step), residual)
        coded = encode(target, came, codec)
        residual, came = minus(target, coded.received), coded.received
    off = np.linalg.norm(came["encoder.a"] - sent["encoder.a"]) / np.linalg.norm(sent["encoder.a"])
    assert off < {"fp16": 1e-3, "int8": 5e-3, "int4": 0.03, "int2": 0.15}[codec]


@pytest.mark.parametrize("codec", BITS)
def test_nothing_changed_is_nothing(codec: str) -> None:
    start = tensors(0)
    received = encode(start, start, codec).received
    assert all(np.array_equal(received[name], start[name]) for name in start)


def test_running_statistics_travel_whole() -> None:
    start, new = tensors(0, size=100.0), tensors(1, size=1e-3)
    assert np.array_equal(encode(new, start, "int2").received["cls.norm.running_var"], new["cls.norm.running_var"])


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, st.integers(0, 3 * BLOCK), elements=st.floats(-1e8, 1e8, width=32)),
    st.sampled_from(sorted(BITS)),
)
def test_any_finite_values_stay_finite(difference: np.ndarray, codec: str) -> None:
    start = {"encoder.a": np.zeros_like(difference)}
    received = encode({"encoder.a": difference}, start, codec).received["encoder.a"]
    assert np.isfinite(received).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_step_that_is_none_is_refused(bad: float) -> None:
    start = {"encoder.a": np.zeros(BLOCK, np.float32)}
    data = {key: value.copy() for key, value in encode(start, start, "int4").data.items()}
    data["encoder"][:4] = np.frombuffer(np.float32(bad).tobytes(), np.uint8)
    with pytest.raises(CodecError, match=r"tensor encoder\.a: a step"):
        decode(data, start, "int4")
    with pytest.raises(UpdateError, match="a step"):
        from_coded_record(ArrayRecord({"encoder": Array(data["encoder"])}), start, "int4")


def coded(change: str) -> ArrayRecord:
    start = tensors(0)
    record = coded_record(encode(tensors(1), start, "int4"))
    data = record["encoder"].numpy()
    match change:
        case "too long":
            record["encoder"] = Array(np.append(data, np.uint8(0)))
        case "too short":
            record["encoder"] = Array(data[:-1].copy())
        case "another dtype":
            record["encoder"] = Array(data.view(np.int8).copy())
        case "a group more":
            record["seg"] = Array(data.copy())
        case "a group less":
            del record["cls"]
        case "too large":
            data = data.copy()
            data[:4] = np.frombuffer(np.float32(1e30).tobytes(), np.uint8)
            record["encoder"] = Array(data)
        case "a negative variance":
            changed = tensors(1) | {"cls.norm.running_var": np.full(5, -1, np.float32)}
            record = coded_record(encode(changed, start, "int4"))
    return record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("too long", "expected uint8"),
        ("too short", "expected uint8"),
        ("another dtype", "expected uint8"),
        ("a group more", r"1 unexpected \(seg\)"),
        ("a group less", r"1 groups of tensors missing \(cls\)"),
        ("too large", "values beyond 1e\\+08"),
        ("a negative variance", "negative variance"),
    ],
)
def test_what_no_sender_of_ours_sends_is_refused(change: str, words: str) -> None:
    with pytest.raises(UpdateError, match=words):
        from_coded_record(coded(change), tensors(0), "int4")


def test_a_record_is_read_as_it_was_coded() -> None:
    start = tensors(0)
    one = encode(tensors(1), start, "int2")
    received = from_coded_record(coded_record(one), start, "int2")
    assert shapes_of(received) == SHAPES
    assert all(np.array_equal(received[name], one.received[name]) for name in SHAPES)
