"""Tensors and counts to Flower records and back, checked.

Everything that crosses a hospital's boundary as numbers passes here: global tensors on the way in, updates and
tallies on the way out. Names, shapes, dtypes and finite values are checked on arrival, on both sides, because
Flower itself accepts NaN and broadcasts a wrong shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import HemafedError
from shared.groups import group
from shared.metrics import AREAS, Tally
from shared.tally import STEPS
from shared.wire.codecs import CodecError, Coded, coded_sizes, decode
from shared.wire.foreign import LONGEST_NAME, ForeignError, read_array, shown, shown_names

PROTOCOL_VERSION = 4  # 4: coded differences
MOST_COUNTED = 10_000_000  # slices or patients of one hospital
# What numpy.load raises on a damaged file.
UNREADABLE = (ValueError, TypeError, EOFError, OSError, MemoryError, AttributeError)
# The numbers that a reply may have, and the largest of each; others are nobody's.
METRICS = ("patients", "slices", "positives", "steps", "cls", "seg", "rec", "total", "seconds")
LARGEST_METRIC = 1e12
LARGEST_VALUE = 1e8  # of a tensor; beyond it squares and steps of a server optimiser are not finite in float32
# Of a running mean or variance. Those of an honest head are of the size of its features: 0.001 to 100.
LARGEST_STATISTIC = 1e6

# The head for classification that a centre fits on data of its own (federation.heads = "probe").
PROBE = ("cls.bias", "cls.norm.running_mean", "cls.norm.running_var", "cls.weight")

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)
Tensors = Mapping[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]


class UpdateError(HemafedError, ValueError):
    """A record's tensors are not what was expected; names the tensor, never a value of a patient."""


def to_arrays(state: Mapping[str, Tensor], groups: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
    """Copies of the tensors of some groups as float32 arrays, in sorted order of their names."""
    return {name: state[name].detach().cpu().float().numpy().copy() for name in sorted(state) if group(name) in groups}


def expected_shapes(state: Mapping[str, Tensor], groups: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of some groups, in sorted order of their names."""
    return {name: tuple(state[name].shape) for name in sorted(state) if group(name) in groups}


def to_record(arrays: Tensors) -> ArrayRecord:
    """float32 arrays as a Flower record: one flat array for each group of tensors, in sorted order of the tensors' names.

    Each of Flower's arrays costs a signed call or two, whatever its size; the shapes are known on both sides.
    On the client's side this is what leaves the hospital.
    """
    flat: dict[str, list[NDArray[np.float32]]] = {}
    for name in sorted(arrays):
        flat.setdefault(group(name), []).append(np.asarray(arrays[name], dtype=np.float32).ravel())
    return ArrayRecord({key: Array(np.concatenate(parts)) for key, parts in flat.items()})


def from_record(record: ArrayRecord, expected: Shapes) -> dict[str, NDArray[np.float32]]:
    """A Flower record as arrays; the inverse of `to_record`.

    Args:
      record: as received.
      expected: name -> shape of every tensor that must be there, and no other.
    Raises:
      UpdateError: a group is missing, unexpected, of another size or dtype, or a tensor has a value that is not finite or
        beyond LARGEST_VALUE, or a running statistic that no features have: a negative variance, one beyond LARGEST_STATISTIC.
    """
    sizes: dict[str, int] = {}
    for name, shape in expected.items():
        sizes[group(name)] = sizes.get(group(name), 0) + math.prod(shape)
    flat = _groups(record, sizes, np.float32)
    begins, arrays = dict.fromkeys(sizes, 0), {}
    for name in sorted(expected):
        key, begin = group(name), begins[group(name)]
        begins[key] = begin + math.prod(expected[name])
        arrays[name] = flat[key][begin : begins[key]].reshape(expected[name])
        _check_values(name, arrays[name])
    return arrays


def coded_record(coded: Coded) -> ArrayRecord:
    """Coded differences as a Flower record: bytes for each group. On the client's side this is what leaves the hospital."""
    return ArrayRecord({key: Array(data) for key, data in coded.data.items()})


def from_coded_record(record: ArrayRecord, start: Tensors, codec: str) -> dict[str, NDArray[np.float32]]:
    """A Flower record of coded differences as arrays.

    Args:
      record: as received.
      start: the tensors that the sender coded the difference to.
      codec: a key of BITS.
    Raises:
      UpdateError: as from_record, or bytes that no encoder wrote.
    """
    data = _groups(record, coded_sizes(shapes_of(start), codec), np.uint8)
    try:
        arrays = decode(data, start, codec)
    except CodecError as error:
        raise UpdateError(str(error)) from error
    for name, value in arrays.items():
        _check_values(name, value)
    return arrays


def _groups(record: ArrayRecord, sizes: Mapping[str, int], dtype: type) -> dict[str, NDArray[Any]]:
    """The flat array of each group.

    Raises:
      UpdateError: one is missing, unexpected or of another size or dtype.
    """
    missing, extra = sizes.keys() - record.keys(), record.keys() - sizes.keys()
    if missing or extra:
        raise UpdateError(
            f"{len(missing)} groups of tensors missing {shown_names(missing)}, {len(extra)} unexpected {shown_names(extra)}; "
            f"expected {sorted(sizes)}, those of federation.share"
        )
    return {key: _decoded(record[key], f"tensors of {key}", dtype, (size,)) for key, size in sizes.items()}


def _check_values(name: str, value: NDArray[np.float32]) -> None:
    """Refuse a tensor with values that are not finite or too large, or a statistic that no features have."""
    if not (np.abs(value) <= LARGEST_VALUE).all():  # NaN is none of them
        if bad := np.count_nonzero(~np.isfinite(value)):
            raise UpdateError(f"tensor {name}: {bad} values are not finite")
        raise UpdateError(f"tensor {name}: values beyond {LARGEST_VALUE:g}")
    _check_statistic(name, value)


def _check_statistic(name: str, value: NDArray[np.float32]) -> None:
    """Refuse a running mean or variance that no features have: the root of a negative variance is NaN."""
    if ".running_" not in name:
        return
    if name.endswith(".running_var") and (value < 0).any():
        raise UpdateError(f"tensor {name}: a negative variance")
    if (np.abs(value) > LARGEST_STATISTIC).any():
        raise UpdateError(f"tensor {name}: values beyond {LARGEST_STATISTIC:g}")


def typed_record(content: RecordDict, name: str, kind: type[Record]) -> Record:
    """One record of a reply.

    Raises:
      UpdateError: it is missing or of another kind.
    """
    record = content.get(name)
    if not isinstance(record, kind):
        raise UpdateError(f"a reply whose {name!r} is {type(record).__name__}, expected {kind.__name__}")
    return record


def read_metrics(content: RecordDict) -> dict[str, float]:
    """The numbers of a reply; none if its hospital withholds them.

    Raises:
      UpdateError: a value is a list or not finite.
    """
    if "metrics" not in content:
        return {}
    metrics = typed_record(content, "metrics", MetricRecord)
    strange = metrics.keys() - set(METRICS)
    if strange:
        raise UpdateError(f"{len(strange)} metrics of unknown names {shown_names(strange)}, expected some of {METRICS}")
    single = {key: float(value) for key, value in metrics.items() if not isinstance(value, list)}
    good = {key: value for key, value in single.items() if np.isfinite(value) and abs(value) <= LARGEST_METRIC}
    if wrong := metrics.keys() - good.keys():
        raise UpdateError(f"metrics {sorted(wrong)[:3]} are not finite numbers of at most {LARGEST_METRIC:g}")
    return good


def _decoded(array: Array, what: str, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array behind received bytes.

    Raises:
      UpdateError: it says or is something else than what was expected.
    """
    declared = (array.dtype, tuple(array.shape))
    if declared != (np.dtype(dtype).name, shape):
        raise UpdateError(
            f"{what}: {shown(declared[0], LONGEST_NAME)} {shown(declared[1], LONGEST_NAME)}, expected {np.dtype(dtype).name} {shape}"
        )
    try:
        return read_array(array, dtype, shape)
    except ForeignError as error:
        raise UpdateError(f"{what}: {error}") from error


def shapes_of(arrays: Tensors) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(value.shape) for name, value in arrays.items()}


def tally_to_arrays(tally: Tally) -> dict[str, NDArray[Any]]:
    """Counts as arrays, as they are sent and kept."""
    return {
        "edges": tally.edges.astype(np.int32),
        "counts": tally.counts.astype(np.int32),
        "auc": np.array([tally.auc], dtype=np.float64),
        "dice_sum": tally.dice_sum.astype(np.float64),
        "dice_slices": tally.dice_slices.astype(np.int32),
        "clear": tally.clear.astype(np.int32),
        "found": tally.found.astype(np.int32),
        "patients": np.array([tally.patients], dtype=np.int32),
    }


def tally_from_arrays(values: Mapping[str, NDArray[Any]], replicates: int) -> Tally:
    """Counts from arrays, checked against themselves.

    Raises:
      UpdateError: an array is missing, of another shape or dtype, not finite, or its values cannot be counts of one test.
    """
    edges = values.get("edges", np.zeros(0))
    expected = _tally_arrays(replicates, len(edges) - 1 if edges.ndim == 1 else 0)
    _check_names(values, expected)
    for name, (dtype, shape) in expected.items():
        value = values[name]
        if value.shape != shape or value.dtype != dtype:
            raise UpdateError(f"tally {name}: {value.dtype} {value.shape}, expected {np.dtype(dtype).name} {shape}")
        if not np.isfinite(value).all() or (value < 0).any() or (value > MOST_COUNTED).any():
            raise UpdateError(f"tally {name}: expected finite values from 0 to {MOST_COUNTED}")
    dice_sum, dice_slices = values["dice_sum"], values["dice_slices"]
    if edges[0] != 0 or edges[-1] != STEPS or (np.diff(edges) <= 0).any():
        raise UpdateError(f"tally edges: expected rising steps from 0 to {STEPS}")
    if values["auc"][0] > 1 or (dice_sum > dice_slices).any():
        raise UpdateError("tally auc and dice_sum: expected an area of at most 1, and no Dice above 1")
    if (values["clear"][:, 1] > values["clear"][:, 0]).any():
        raise UpdateError("tally clear: more alarms than slices without blood")
    return Tally(
        edges=edges.astype(np.int64),
        counts=values["counts"].astype(np.int64),
        auc=float(values["auc"][0]),
        dice_sum=dice_sum,
        dice_slices=dice_slices.astype(np.int64),
        clear=values["clear"].astype(np.int64),
        found=values["found"].astype(np.int64),
        patients=int(values["patients"][0]),
    )


def _tally_arrays(replicates: int, cells: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Return dtype and shape of each array of a tally of so many bootstrap samples and cells of scores.

    Raises:
      UpdateError: there cannot be so many cells.
    """
    if not 1 <= cells <= STEPS:
        raise UpdateError(f"tally edges: of {cells} cells, expected 1 to {STEPS}")
    rows = replicates + 1
    return {
        "edges": (np.int32, (cells + 1,)),
        "counts": (np.int32, (rows, 2, cells)),
        "auc": (np.float64, (1,)),
        "dice_sum": (np.float64, (rows,)),
        "dice_slices": (np.int32, (rows,)),
        "clear": (np.int32, (rows, 3)),
        "found": (np.int32, (rows, 2, AREAS)),
        "patients": (np.int32, (1,)),
    }


def _check_names(values: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Refuse a tally of other arrays than those expected."""
    if values.keys() != expected.keys():
        missing, extra = expected.keys() - values.keys(), values.keys() - expected.keys()
        raise UpdateError(
            f"tally lacks {shown_names(missing)} and has {shown_names(extra)} beside, expected {sorted(expected)}"
        )


def arrays_to_record(values: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Arrays of a tally as a Flower record; they leave the hospital."""
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in values.items()})


def tally_to_record(tally: Tally) -> ArrayRecord:
    """Counts as a Flower record; they leave the hospital."""
    return arrays_to_record(tally_to_arrays(tally))


def tally_from_record(record: ArrayRecord, replicates: int) -> Tally:
    """Counts from a Flower record.

    Raises:
      UpdateError: an array is missing, of another shape or dtype, negative or not finite.
    """
    told = record["edges"].shape if "edges" in record else ()
    cells = told[0] - 1 if len(told) == 1 and isinstance(told[0], int) else 0
    expected = _tally_arrays(replicates, cells)
    _check_names(record, expected)
    arrays = {name: _decoded(record[name], f"tally {name}", *of) for name, of in expected.items()}
    return tally_from_arrays(arrays, replicates)


def tested_hash(encoder: Tensors, sets: list[Tensors]) -> str:
    """SHA-256 of a model that is tested: of an encoder and of its sets of heads; two times 64 hexadecimal digits with '/' between, one without heads."""

    def digest(*parts: Tensors) -> str:
        whole = hashlib.sha256()
        for tensors in parts:
            for name in sorted(tensors):
                value = np.ascontiguousarray(tensors[name], dtype="<f4")
                whole.update(f"{name} {value.shape}".encode() + b"\0" + value.tobytes())
        return whole.hexdigest()

    return digest(encoder) + ("/" + digest(*sets) if sets else "")
