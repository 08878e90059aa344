"""What strangers send is read or refused, and shown without harm, whatever the bytes are."""

from __future__ import annotations

import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from shared.wire.foreign import LONGEST_TEXT, ForeignError, read_array, shown, shown_names
from shared.wire.records import METRICS, UpdateError, from_record, read_metrics, tally_from_record, typed_record

SHAPE = (2, 3)
VALUE = np.arange(6, dtype=np.float32).reshape(SHAPE) / 7


def npy(value: np.ndarray = VALUE) -> bytes:
    file = BytesIO()
    np.save(file, value)
    return file.getvalue()


def headed(header: bytes, body: bytes = bytes(24), version: bytes = b"\x01\x00") -> bytes:
    """Bytes with a header of any text, of the length that it says."""
    width = 2 if version == b"\x01\x00" else 4
    text = header + b" " * (-(len(header) + 9 + width) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text + body


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)") -> bytes:
    return headed(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin-1"))


# numpy.load raised something else than was caught on half of these, and a run ended for all hospitals.
NO_ARRAYS = [
    b"",
    b"PK\x03\x04" + b"x" * 60,
    b"PK\x05\x06" + bytes(18),
    headed(b"{'descr': ("),
    headed(b"-" * 900 + b"1"),
    headed(b"(" * 400 + b")" * 400),
    headed(b"(" * 40_000),
    headed(b"{[]: 1}"),
    headed(b"{'descr'}"),
    headed(b"'''abc"),
    headed(b"f'{1'"),
    headed(b"{'descr': '\x00', "),
    headed(b"{'\xff\xfe': 1}", version=b"\x03\x00"),
    headed(b"1" * 900),
    described(shape="(-1,)"),
    described(shape="(99999999999999999999999,)"),
    described(shape="(1000000000000,)"),
    described(shape="(2, 3, )"),
    described(shape="[2, 3]"),
    described(shape="(" + "1" * 900 + ",)"),
    described(shape="(" + "1, " * 300 + "1)"),
    described(shape="(2L, 3L)"),
    described(shape="(6,)"),
    described(shape="(3, 2)"),
    described("'|O'"),
    described("'|V0'"),
    described("'f4,,'"),
    described("[('a',)]"),
    described("('<f4', 5, 6)"),
    described("()"),
    described("'>f4'"),
    described("'=f4'"),
    described("'<f8'"),
    described("'<i4'"),
    described("'<Z4'"),
    described(order="True"),
    described(order="1"),
    headed(b"", version=b"\x09\x00"),
    npy()[:-1],
    npy() + b"\x00",
    npy(VALUE.astype(">f4")),
    npy(np.asfortranarray(VALUE)),
    b"\x93NUMPY\x01\x00\xff\xff" + bytes(24),
    b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(24),
    b"\x93NUMPY\x01\x00",
]


def test_an_array_arrives_bit_by_bit_and_can_be_changed() -> None:
    for value, shape in ((VALUE, SHAPE), (np.array(3.5, np.float32), ()), (VALUE[:0], (0, 3)), (VALUE.ravel(), (6,))):
        read = read_array(Array(value), np.float32, shape)
        assert read.dtype == np.float32
        assert read.shape == shape
        assert read.tobytes() == value.tobytes()
        read[...] = 0
    counts = np.arange(4, dtype=np.int32)
    assert read_array(Array(counts), np.int32, (4,)).tolist() == [0, 1, 2, 3]


def sent(data: bytes) -> Array:
    return Array(dtype="float32", shape=SHAPE, stype="numpy.ndarray", data=data)


@pytest.mark.parametrize("data", NO_ARRAYS, ids=range(len(NO_ARRAYS)))
def test_bytes_that_are_no_array_are_refused_at_once(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(ForeignError) as error:
        read_array(sent(data), np.float32, SHAPE)
    assert time.process_time() - begin < 5, "a regular expression that tries every way takes for ever"
    assert len(str(error.value)) < 500
    with pytest.raises(UpdateError, match=r"^tensors of encoder: "):
        from_record(ArrayRecord({"encoder": sent(data)}), {"encoder.w": SHAPE})


def refusal(read: Callable[[], object]) -> str:
    """Why something is refused, in a text that can be shown; empty where it is read."""
    told = ""
    try:
        read()
    except (UpdateError, ForeignError) as error:
        told = str(error)
    assert told.isprintable()
    assert len(told) < 1000
    return told


@given(st.binary(max_size=300), st.integers(0, 200), st.integers(0, 60))
def test_a_changed_array_is_refused_or_read(patch: bytes, place: int, cut: int) -> None:
    data = npy()
    data = data[:place] + patch + data[place + cut :]
    refusal(lambda: read_array(sent(data), np.float32, SHAPE))


WORDS = st.text(max_size=40) | st.sampled_from(["float32", "numpy.ndarray", "encoder", "a" * 5000, "\x1b[2J", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=6,
)


@given(dtype=JSON, shape=st.lists(JSON, max_size=4).map(tuple), stype=JSON, name=WORDS, data=st.sampled_from(NO_ARRAYS))
@example(dtype="float32", shape=(6.0,), stype="numpy.ndarray", name="encoder", data=npy(VALUE.ravel()))
def test_whatever_an_array_says_of_itself_nothing_else_is_raised(
    dtype: object, shape: tuple, stype: object, name: str, data: bytes
) -> None:
    """The fields come from a stranger's JSON, and Flower does not look at their types."""
    record = ArrayRecord({name: sent(data)})
    record[name].dtype, record[name].shape, record[name].stype = dtype, shape, stype
    refusal(lambda: from_record(record, {"encoder.w": SHAPE}))
    assert refusal(lambda: tally_from_record(record, 3))


NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats()


@given(st.dictionaries(WORDS | st.sampled_from(METRICS), NUMBERS | st.lists(st.floats(), max_size=3), max_size=5))
def test_numbers_of_a_reply_are_known_ones_and_finite(values: dict) -> None:
    content = RecordDict({"metrics": MetricRecord(values)})
    if not refusal(lambda: read_metrics(content)):
        read = read_metrics(content)
        assert read.keys() <= set(METRICS)
        assert np.isfinite(list(read.values())).all()


@given(WORDS, st.sampled_from([ArrayRecord, ConfigRecord, MetricRecord]))
def test_a_part_of_another_kind_is_refused(name: str, kind: type) -> None:
    other = MetricRecord if kind is not MetricRecord else ConfigRecord
    for content in (RecordDict(), RecordDict({name: other()})):
        with pytest.raises(UpdateError, match=kind.__name__):
            typed_record(content, name, kind)


def test_a_million_names_are_counted_and_three_are_told() -> None:
    record = ArrayRecord()
    array = Array(VALUE)
    for number in range(1_000_000):
        record[f"n{number}"] = array
    with pytest.raises(UpdateError, match=r"1000000 unexpected \(too many to show…\)") as error:
        from_record(record, {"encoder.w": SHAPE})
    assert len(str(error.value)) < 300
    assert shown_names({"a" * 1000, "\x1b[2Jb", "c", "d"}) == "(" + "\\x1b[2Jb, " + "a" * 79 + "…, c…)"


@given(st.text() | JSON)
@example("a\nb\x1b[31m\x85\u2028\u202e")
@example("x" * 10_000)
@example("\x00" * 10_000)
def test_a_strangers_text_is_shown_on_one_line_of_bounded_length(value: object) -> None:
    text = shown(value)
    assert text.isprintable()
    assert len(text) <= LONGEST_TEXT
    if isinstance(value, str) and value.isprintable() and len(value) < LONGEST_TEXT:
        assert text == value


def test_an_array_of_another_kind_of_bytes_is_refused() -> None:
    with pytest.raises(ForeignError, match="serialised as torch"):
        read_array(Array(dtype="float32", shape=SHAPE, stype="torch", data=npy()), np.float32, SHAPE)
