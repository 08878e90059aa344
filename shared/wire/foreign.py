"""Text and arrays that somebody else sent: read within bounds, shown without what a screen or a page would obey.

Nothing here raises anything but what its docstring says, whatever the bytes are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import DTypeLike, NDArray

from shared.errors import HemafedError

LONGEST_TEXT = 300
LONGEST_NAME = 80
_LONGEST_HEADER = 1024  # bytes; numpy writes 118 for a float32 array
# What numpy.save writes for an array of numbers (numpy/lib/format.py, versions 1.0 and 2.0); anything else is none of ours.
_HEADER = re.compile(
    rb"\{'descr': '([<>|=][a-zA-Z]\d{1,3})', 'fortran_order': (False|True), 'shape': \((\d{1,12},|\d{1,12}(?:, \d{1,12}){1,7}|)\), \} *\n"
)


class ForeignError(HemafedError, ValueError):
    """Bytes that are not what was expected; the text is bounded and can be shown."""


def shown(value: object, most: int = LONGEST_TEXT) -> str:
    """Return a stranger's text as it can be shown: one line, no control characters, at most `most` characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = f"a {type(value).__name__}"
    clean = "".join(one if one.isprintable() else _escaped(one) for one in text[:most])
    return clean if len(text) <= most and len(clean) <= most else clean[: most - 1] + "…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown_names(names: Collection[object]) -> str:
    """Return the first three of a stranger's names, sorted."""
    first = sorted(shown(name, LONGEST_NAME) for name in names)[:3] if len(names) < 10_000 else ["too many to show"]
    return "(" + ", ".join(first) + ("…)" if len(names) > len(first) else ")")


def read_array(array: Array, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read the array behind received bytes without numpy.load, which raises a dozen kinds of errors and unpacks archives.

    Args:
      array: as received.
      dtype: that it must have, little-endian.
      shape: that it must have.
    Returns:
      A new array.
    Raises:
      ForeignError: the bytes are not exactly what numpy.save writes for such an array.
    """
    wanted = np.dtype(dtype).newbyteorder("<")
    expected = f"expected {wanted.name} {shape}"
    data = array.data
    if not isinstance(data, bytes) or array.stype != "numpy.ndarray":
        raise ForeignError(f"serialised as {shown(array.stype, LONGEST_NAME)}, {expected}")
    start, descr, fortran, told = _header(data)
    if descr != wanted.str or told != shape:
        raise ForeignError(f"{descr} {shown(told, LONGEST_NAME)}, {expected}")
    if fortran and len(shape) > 1:
        raise ForeignError(f"stored by columns, {expected} by rows")
    size = math.prod(shape) * wanted.itemsize
    if len(data) - start != size:
        raise ForeignError(f"{len(data) - start} bytes of values, expected {size}")
    return np.frombuffer(data, wanted, offset=start).reshape(shape).astype(np.dtype(dtype))


def _header(data: bytes) -> tuple[int, str, bool, tuple[int, ...]]:
    """Return where the values begin, their type as numpy writes it, whether they are stored by columns, and the shape.

    Raises:
      ForeignError: there is no header of an array of numbers.
    """
    version, width = data[6:8], 2 if data[6:8] == b"\x01\x00" else 4
    if data[:6] != b"\x93NUMPY" or version not in (b"\x01\x00", b"\x02\x00"):
        raise ForeignError(f"{len(data)} bytes that are no array")
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if start > min(_LONGEST_HEADER, len(data)):
        raise ForeignError(f"{len(data)} bytes that are no array: a header of {start} bytes")
    found = _HEADER.fullmatch(data, 8 + width, start)
    if found is None:
        raise ForeignError(f"{len(data)} bytes that are no array of numbers")
    shape = tuple(int(number) for number in re.findall(rb"\d+", found[3]))
    return start, found[1].decode("ascii"), found[2] == b"True", shape
