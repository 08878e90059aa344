from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from shared.groups import groups_shared
from shared.metrics import AREAS, Tally
from shared.model.swin import VARIANTS, MultiTaskSwin
from shared.tally import STEPS
from shared.wire.records import (
    UpdateError,
    from_record,
    shapes_of,
    tally_from_record,
    tally_to_record,
    to_arrays,
    to_record,
)

SHAPES = {"encoder.bias": (3,), "encoder.weight": (2, 3)}


def good() -> dict[str, np.ndarray]:
    return {
        "encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "encoder.bias": np.array([1e-30, -1e8, 0.1], dtype=np.float32),
    }


def npy(value: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, value)
    return file.getvalue()


def claiming(
    data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (9,), stype: str = "numpy.ndarray"
) -> ArrayRecord:
    """A record whose encoder says one thing and holds another."""
    record = to_record(good())
    record["encoder"] = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    return record


def small_tally(replicates: int = 4) -> Tally:
    draw = np.random.default_rng(0)
    rows = replicates + 1
    edges, counts = np.array([0, 4, 9, STEPS]), draw.integers(0, 9, (rows, 2, 3))
    clear, found = draw.integers(4, 9, (rows, 3)), draw.integers(0, 3, (rows, 2, AREAS))
    clear[:, 0] = 9
    return Tally(edges, counts, 0.75, draw.random(rows) * 5, draw.integers(5, 9, rows), clear, found, 12)


def test_a_record_brings_every_bit() -> None:
    arrays = from_record(to_record(good()), SHAPES)
    assert arrays.keys() == good().keys()
    for name, value in good().items():
        assert arrays[name].dtype == np.float32
        assert arrays[name].tobytes() == value.tobytes()


def test_a_record_of_the_models_encoder() -> None:
    state = MultiTaskSwin(VARIANTS["demo"]).state_dict()
    arrays = to_arrays(state, groups_shared("encoder"))
    received = from_record(to_record(arrays), shapes_of(arrays))
    assert received.keys() == {name for name in state if name.startswith("encoder.")}
    assert all(np.array_equal(value, state[name].numpy()) for name, value in received.items())
    assert to_arrays(state, groups_shared("all")).keys() == state.keys()


def test_only_the_chosen_groups_go_out_in_sorted_order() -> None:
    state = {name: torch.zeros(1) for name in ("seg.b", "encoder.z", "cls.a", "encoder.a", "encoderlike.a")}
    assert list(to_arrays(state, ("encoder",))) == ["encoder.a", "encoder.z"]
    assert list(to_arrays(state, ("encoder", "cls"))) == ["cls.a", "encoder.a", "encoder.z"]


def test_bfloat16_goes_out_as_float32() -> None:
    value = torch.tensor([1 / 3, -2.5, 1e30], dtype=torch.bfloat16, requires_grad=True)
    arrays = to_arrays({"encoder.w": value}, ("encoder",))
    assert arrays["encoder.w"].dtype == np.float32
    assert arrays["encoder.w"].tolist() == value.float().tolist()
    assert to_record(arrays)["encoder"].dtype == "float32"


def test_a_group_is_one_flat_array_in_the_order_of_names() -> None:
    record = to_record(good() | {"cls.a": np.ones((1, 2)), "cls.b": np.zeros(())})
    assert {key: array.shape for key, array in record.items()} == {"cls": (3,), "encoder": (9,)}
    assert record["encoder"].numpy().tolist() == [*good()["encoder.bias"], *good()["encoder.weight"].ravel()]
    read = from_record(record, {"encoder.weight": (2, 3), "cls.b": (), "cls.a": (1, 2), "encoder.bias": (3,)})
    assert (read["cls.a"].tolist(), read["cls.b"].tolist()) == ([[1, 1]], 0)


def test_a_transposed_array_arrives_in_its_shape() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(from_record(to_record({"encoder.w": value}), {"encoder.w": (3, 2)})["encoder.w"], value)


def without(name: str) -> ArrayRecord:
    return to_record({key: value for key, value in good().items() if key != name})


def replaced(value: np.ndarray) -> ArrayRecord:
    return claiming(npy(value), str(value.dtype), value.shape)


def with_bias(*values: float) -> ArrayRecord:
    return to_record(good() | {"encoder.bias": np.array(values, np.float32)})


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (without("encoder.bias"), r"tensors of encoder: float32 \(6,\), expected float32 \(9,\)"),
        (ArrayRecord(), r"1 groups of tensors missing \(encoder\)"),
        (to_record(good() | {"seg.output.bias": np.zeros(1)}), r"1 unexpected \(seg\)"),
        (replaced(np.zeros(1, np.float32)), r"encoder: float32 \(1,\), expected float32 \(9,\)"),
        (replaced(np.zeros((9, 1), np.float32)), r"encoder: float32 \(9, 1\)"),
        (replaced(np.zeros(9, np.float64)), r"encoder: float64 \(9,\), expected float32"),
        (with_bias(0, np.nan, 0), r"encoder\.bias: 1 values are not finite"),
        (with_bias(np.inf, 0, -np.inf), r"encoder\.bias: 2 values are not finite"),
        (with_bias(0, 2e8, 0), r"encoder\.bias: values beyond 1e\+08"),
        (claiming(npy(np.zeros(1, np.float32))), r"encoder: <f4 \(1,\), expected float32 \(9,\)"),
        (claiming(npy(np.zeros(9, np.float64))), r"encoder: <f8 \(9,\)"),
        (claiming(npy(np.zeros(9, ">f4"))), r"encoder: >f4 \(9,\)"),
    ],
)
def test_a_wrong_tensor_is_named(record: ArrayRecord, text: str) -> None:
    with pytest.raises(UpdateError, match=text):
        from_record(record, SHAPES)


def pickled() -> bytes:
    file = BytesIO()
    np.save(file, np.array([{}, {}, {}], dtype=object), allow_pickle=True)
    return file.getvalue()


def zipped() -> bytes:
    file = BytesIO()
    np.savez(file, np.zeros(3, np.float32))
    return file.getvalue()


def boundless() -> bytes:
    """A header that announces far more memory than there is, and three numbers."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)})
    return file.getvalue() + bytes(12)


@pytest.mark.parametrize(
    "record",
    [
        claiming(b""),
        claiming(b"no array at all"),
        claiming(npy(np.zeros(9, np.float32))[:-4]),
        claiming(pickled()),
        claiming(zipped()),
        claiming(boundless()),
        claiming(npy(np.zeros(9, np.float32)), stype="torch.Tensor"),
    ],
    ids=["empty", "text", "cut", "pickle", "zip", "boundless", "other serialisation"],
)
def test_bytes_that_are_no_array_are_a_wrong_tensor_and_nothing_worse(record: ArrayRecord) -> None:
    with pytest.raises(UpdateError, match=r"tensors of encoder"):
        from_record(record, SHAPES)


def test_three_names_are_enough() -> None:
    with pytest.raises(UpdateError, match=r"5 groups of tensors missing \(a, b, c…\)"):
        from_record(ArrayRecord(), dict.fromkeys("edcba", (1,)))


def test_a_tally_arrives_as_it_was() -> None:
    tally = small_tally()
    received = tally_from_record(tally_to_record(tally), replicates=4)
    assert np.array_equal(received.counts, tally.counts)
    assert np.array_equal(received.edges, tally.edges)
    assert received.auc == 0.75
    assert np.array_equal(received.dice_sum, tally.dice_sum)
    assert np.array_equal(received.dice_slices, tally.dice_slices)
    assert received.patients == 12
    assert received.counts.dtype == received.dice_slices.dtype == np.int64


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("counts", np.full((5, 2, 3), -1, np.int32), "tally counts: expected finite values from 0 to 10000000"),
        ("counts", np.full((5, 2, 3), 2_000_000_018, np.int32), "tally counts: expected finite values from 0"),
        ("counts", np.zeros((5, 2, 3), np.int64), "tally counts: int64"),
        ("counts", np.zeros((4, 2, 3), np.int32), "tally counts: int32 .4, 2, 3., expected int32 .5, 2, 3."),
        ("edges", np.array([0, 9, 4, STEPS], np.int32), "tally edges: expected rising steps from 0 to 32"),
        ("edges", np.array([0, 4, 9, STEPS + 1], np.int32), "tally edges: expected rising steps"),
        ("edges", np.array([1, 4, 9, STEPS], np.int32), "tally edges: expected rising steps"),
        ("edges", np.array([0, STEPS], np.int32), "tally counts: int32 .5, 2, 3., expected int32 .5, 2, 1."),
        ("edges", np.array(7, np.int32), "tally edges"),
        ("auc", np.array([1.5]), "expected an area of at most 1"),
        ("dice_sum", np.full(5, 4.6e6), "no Dice above 1"),
        ("dice_sum", np.full(5, 4.6e297), "tally dice_sum: expected finite values from 0"),
        ("dice_sum", np.full(5, np.nan), "tally dice_sum: expected finite"),
        ("dice_sum", np.full(5, np.inf), "tally dice_sum: expected finite"),
        ("dice_sum", np.zeros(6), r"tally dice_sum: float64 \(6,\), expected float64 \(5,\)"),
        ("dice_slices", np.zeros((5, 1), np.int32), "tally dice_slices"),
        ("clear", np.full((5, 3), -1, np.int32), "tally clear: expected finite values from 0"),
        ("clear", np.array([[3, 4, 0]] * 5, np.int32), "more alarms than slices without blood"),
        ("found", np.zeros((5, 2, 9), np.int32), r"tally found: int32 \(5, 2, 9\), expected int32 \(5, 2, 5\)"),
        ("patients", np.array([-1], np.int32), "tally patients: expected finite values from 0"),
    ],
)
def test_a_wrong_tally_is_named(name: str, value: np.ndarray, text: str) -> None:
    record = tally_to_record(small_tally())
    record[name] = Array(value)
    with pytest.raises(UpdateError, match=text):
        tally_from_record(record, replicates=4)


def test_a_tally_of_other_replicates_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"expected int32 \(101, 2, 3\)"):
        tally_from_record(tally_to_record(small_tally()), replicates=100)


def test_a_tally_without_an_array_or_with_another_is_refused() -> None:
    record = tally_to_record(small_tally())
    del record["patients"]
    with pytest.raises(
        UpdateError,
        match=r"lacks \(patients\) .* expected \['auc', 'clear', 'counts', 'dice_slices', 'dice_sum', 'edges', 'found', 'patients'\]",
    ):
        tally_from_record(record, replicates=4)
    record = tally_to_record(small_tally())
    record["scores"] = Array(np.zeros(3, np.float32))
    with pytest.raises(UpdateError, match="scores"):
        tally_from_record(record, replicates=4)


def test_tally_bytes_that_are_no_array_are_refused() -> None:
    record = tally_to_record(small_tally())
    record["patients"] = Array(dtype="int32", shape=(1,), stype="numpy.ndarray", data=b"12")
    with pytest.raises(UpdateError, match="tally patients"):
        tally_from_record(record, replicates=4)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("cls.norm.running_var", -1e-6, "a negative variance"),
        ("cls.norm.running_var", 2e6, "values beyond 1e\\+06"),
        ("cls.norm.running_mean", -2e6, "values beyond 1e\\+06"),
        ("cls.norm.running_mean", -1.0, None),
        ("cls.norm.running_var", 0.0, None),
        ("cls.norm.weight", -2e6, None),
    ],
)
def test_a_running_statistic_is_one_that_features_can_have(name: str, value: float, reason: str | None) -> None:
    """Before: a variance of -30 in the heads, and every test of the final model gave NaN."""
    record, expected = to_record({name: np.array([1.0, value], np.float32)}), {name: (2,)}
    if reason is None:
        assert from_record(record, expected)[name][1] == np.float32(value)
    else:
        with pytest.raises(UpdateError, match=reason):
            from_record(record, expected)
