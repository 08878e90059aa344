"""A round's tensors in few bits: what is sent is the difference to tensors that both sides hold.

In: new tensors and those that the receiver holds. Out: bytes for each group of tensors, and the tensors that the receiver
makes of them; what is lost on the way the sender adds to what it sends next (error feedback: Seide et al. 2014; Karimireddy
et al. 2019, arXiv:1901.09847). "int2", "int4" and "int8" take blocks of 1,024 values of a tensor, and for each block a step
that follows its root mean square; levels lie evenly, at the distance that is best for normally distributed values. "fp16"
rounds every difference. Running statistics travel whole: a rounded variance could be negative.

A group's bytes are those of its tensors in sorted order of their names, little-endian: a running statistic as float32; another
tensor as one step a block (float32) and then levels, the first value in a byte's lowest bits, or as float16 values. Both sides
compute with the same elementwise float32 operations, so that they hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.groups import group

PLAIN = "fp32"  # no codec: every value as it is
BITS = {"fp16": 16, "int8": 8, "int4": 4, "int2": 2}
BLOCK = 1024  # values with one step
# Distance of levels that loses least of a normal distribution of variance 1: Max 1960, table II; 8 bits computed alike.
_STEPS = {2: 0.9957, 4: 0.3352, 8: 0.0308}
_LARGEST_HALF = 65504.0

Arrays = Mapping[str, NDArray[np.float32]]
Shapes = Mapping[str, tuple[int, ...]]


class CodecError(ValueError):
    """Bytes that no encoder wrote; names the tensor and what is wrong."""


@dataclass(frozen=True)
class Coded:
    """Tensors as they are sent.

    Attributes:
      data: group -> uint8 (n,).
      received: what the receiver makes of them, float32.
    """

    data: dict[str, NDArray[np.uint8]]
    received: dict[str, NDArray[np.float32]]


def encode(new: Arrays, start: Arrays, codec: str) -> Coded:
    """Code what changed.

    Args:
      new: tensors to send, finite.
      start: what the receiver holds; the same names and shapes.
      codec: a key of BITS.
    """
    parts: dict[str, list[bytes]] = {}
    for name in sorted(new):
        value = np.asarray(new[name], np.float32).ravel()
        coded = value.astype("<f4").tobytes() if _is_whole(name) else _encoded(value - start[name].ravel(), BITS[codec])
        parts.setdefault(group(name), []).append(coded)
    data = {key: np.frombuffer(b"".join(pieces), np.uint8) for key, pieces in parts.items()}
    return Coded(data, decode(data, start, codec))


def encode_update(trained: Arrays, start: Arrays, residual: Arrays | None, codec: str) -> tuple[Coded, Arrays]:
    """Code what a round changed, with what the last message lacked; the message, and what this one lacks.

    Args:
      trained, start: tensors at the round's end, and those that both sides hold.
      residual: of the last message; None before the first.
      codec: a key of BITS.
    """
    target = trained if residual is None else plus(trained, residual)
    coded = encode(target, start, codec)
    return coded, minus(target, coded.received)


def decode(data: Mapping[str, NDArray[np.uint8]], start: Arrays, codec: str) -> dict[str, NDArray[np.float32]]:
    """What the receiver makes of a message; the tensors' values are not checked.

    Args:
      data: group -> uint8 (n,), of the sizes that `coded_sizes` gives.
      start: what the receiver holds.
      codec: as encode took it.
    Raises:
      CodecError: a step that is not a finite number of at least 0.
    """
    content = {key: value.tobytes() for key, value in data.items()}
    begins, arrays = dict.fromkeys(content, 0), {}
    for name in sorted(start):
        key, shape = group(name), start[name].shape
        size = _size(name, start[name].size, codec)
        part = content[key][begins[key] : begins[key] + size]
        begins[key] += size
        if _is_whole(name):
            arrays[name] = np.frombuffer(part, "<f4").astype(np.float32).reshape(shape)
        else:
            difference = _decoded(part, start[name].size, BITS[codec], name)
            arrays[name] = start[name] + difference.reshape(shape)
    return arrays


def plus(one: Arrays, other: Arrays) -> dict[str, NDArray[np.float32]]:
    """Tensor by tensor, one plus other."""
    return {name: value + other[name] for name, value in one.items()}


def minus(one: Arrays, other: Arrays) -> dict[str, NDArray[np.float32]]:
    """Tensor by tensor, one minus other."""
    return {name: value - other[name] for name, value in one.items()}


def coded_sizes(shapes: Shapes, codec: str) -> dict[str, int]:
    """Bytes of each group."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        sizes[group(name)] = sizes.get(group(name), 0) + _size(name, math.prod(shape), codec)
    return sizes


def _is_whole(name: str) -> bool:
    """Whether a tensor travels as it is."""
    return ".running_" in name


def _size(name: str, count: int, codec: str) -> int:
    """Bytes of a tensor of so many values."""
    bits = BITS[codec]
    if _is_whole(name):
        return 4 * count
    return -(-count * bits // 8) + (0 if bits == 16 else 4 * -(-count // BLOCK))


def _encoded(difference: NDArray[np.float32], bits: int) -> bytes:
    """The bytes of one tensor's differences (n,)."""
    if bits == 16:
        return difference.clip(-_LARGEST_HALF, _LARGEST_HALF).astype("<f2").tobytes()
    count = len(difference)
    blocks = _blocks(difference)
    squares = np.square(blocks, dtype=np.float64).sum(axis=1)
    squares[-1:] *= BLOCK / (count - BLOCK * (len(blocks) - 1))  # the last one is filled up with zeros
    steps = (_STEPS[bits] * np.sqrt(squares / BLOCK)).astype(np.float32)
    share = blocks / np.where(steps > 0, steps, 1)[:, None]
    levels = np.floor(share + 2 ** (bits - 1)).clip(0, 2**bits - 1).astype(np.uint8)
    return steps.astype("<f4").tobytes() + _pack(levels.ravel()[:count], bits).tobytes()


def _decoded(part: bytes, count: int, bits: int, name: str) -> NDArray[np.float32]:
    """The differences (count,) behind one tensor's bytes."""
    if bits == 16:
        return np.frombuffer(part, "<f2").astype(np.float32)
    head = 4 * -(-count // BLOCK)
    steps = np.frombuffer(part[:head], "<f4").astype(np.float32)
    if not (np.isfinite(steps) & (steps >= 0)).all():
        raise CodecError(f"tensor {name}: a step that is no finite number of at least 0")
    levels = _blocks(_unpack(np.frombuffer(part[head:], np.uint8), count, bits).astype(np.float32))
    return ((levels - np.float32((2**bits - 1) / 2)) * steps[:, None]).ravel()[:count]


def _blocks(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values (n,) as blocks (N, BLOCK), the last one filled up with zeros."""
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


def _pack(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Levels of so many bits, 8 / bits in a byte."""
    padded = np.pad(levels, (0, -len(levels) % (8 // bits))).reshape(-1, 8 // bits)
    return np.bitwise_or.reduce(padded << _shifts(bits), axis=1)


def _unpack(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """The inverse of _pack."""
    return ((packed[:, None] >> _shifts(bits)) & np.uint8(2**bits - 1)).ravel()[:count]


def _shifts(bits: int) -> NDArray[np.uint8]:
    return np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
