"""Count the size of a message before its parts are assembled.

A few megabytes can name one piece a thousand times and become gigabytes. Nobody has looked at a signature then, so all
that decides the size is counted from the heads and the lists of names: pieces as often as they occur in an array, arrays
as often as they occur in a record.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content

from client.node.frames import MOST_BYTES
from shared.errors import HemafedError

MOST_INFLATED = MOST_BYTES // 2  # as many bytes as a message may have on its way
MOST_NAMES = 8 << 20  # bytes of all objects but pieces; the largest ensemble has less than 1 MB of names
MOST_VALUES = (
    1 << 20
)  # of config and metric records, whose values take up to fifty times their bytes; ours have kilobytes
MOST_PLACES = 20_000  # pieces in the list of one array; a piece has 5 MB
UNCHECKED_MEMORY = 2 << 30  # of address space to put a message together; one of 400 MB took 456 MB
# An object's children are of these kinds, so that no tree is deeper than five.
_BELOW = {
    "Message": {"RecordDict"},
    "RecordDict": {"ArrayRecord", "ConfigRecord", "MetricRecord"},
    "ArrayRecord": {"Array"},
    "Array": {"ArrayChunk"},
    "ArrayChunk": set(),
    "ConfigRecord": set(),
    "MetricRecord": set(),
}
_KINDS = {
    kind.__qualname__: kind
    for kind in (Message, RecordDict, ArrayRecord, Array, ArrayChunk, ConfigRecord, MetricRecord)
}


class PartsError(HemafedError, ValueError):
    """Parts are no message, or become more than our bounds."""


def check_parts(name: str, contents: Mapping[str, bytes]) -> None:
    """Refuse parts that are no message or would take more memory than a message may.

    Args:
      name: of the message's own object.
      contents: name -> object; each name is its content's hash, so that no object can be below itself.
    Raises:
      PartsError: an object is missing, malformed or of a kind that is not allowed there, or there is too much.
    """
    try:
        if not contents[name].startswith(b"Message "):
            raise PartsError("the centre sent something else than a message")
        _check_overhead(contents)
        size = _size(name, contents, {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, PartsError):
            raise
        raise PartsError(f"a message whose parts cannot be read ({type(error).__name__})") from error
    if size > MOST_INFLATED:
        raise PartsError(f"a message that becomes {size} bytes, expected at most {MOST_INFLATED}")


def _check_overhead(contents: Mapping[str, bytes]) -> None:
    """Bound what is parsed: names in JSON and values in protobuf become many times their bytes."""
    names = sum(len(content) for content in contents.values() if not content.startswith(b"ArrayChunk "))
    values = sum(
        len(content) for content in contents.values() if content.startswith((b"ConfigRecord ", b"MetricRecord "))
    )
    if names > MOST_NAMES or values > MOST_VALUES:
        raise PartsError(f"a message of {names} bytes beside its arrays, {values} of them values")


def _size(name: str, contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    """Return the bytes of one object and of all below it, as often as they occur."""
    if name in known:
        return known[name]
    content = contents[name]
    kind, below, _ = get_object_head_values_from_object_content(content)
    for child in below:
        child_kind = contents[child][:20].partition(b" ")[0].decode()
        if child_kind not in _BELOW[kind]:
            raise PartsError(f"a {kind} of the message has a {child_kind!a}")
    sizes = {child: _size(child, contents, known) for child in below}
    known[name] = sum(sizes[child] for child in _places(kind, content, below)) + len(content)
    return known[name]


def _places(kind: str, content: bytes, below: list[str]) -> list[str]:
    """Return the children of an object, each as often as it occurs in the assembled message."""
    if kind not in ("Array", "ArrayRecord"):
        return below
    told = json.loads(get_object_body(content, _KINDS[kind]))
    if kind == "ArrayRecord":
        return list(told.values())
    places = told["arraychunk_ids"]
    if len(places) > MOST_PLACES:
        raise PartsError(f"an array of {len(places)} pieces, expected at most {MOST_PLACES}")
    if not all(type(place) is int and 0 <= place < len(below) for place in places):
        raise PartsError("an array whose list of pieces cannot be read")
    return [below[place] for place in places]


@contextmanager
def bounded_memory(more: int = UNCHECKED_MEMORY) -> Iterator[None]:
    """Let this process map at most `more` bytes of memory beyond what it has, until the block ends.

    A second bound, for what the count above does not see. It ends with the check of the signature: CUDA maps far more
    addresses than it uses memory, so that training cannot have one of this kind.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + more
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *allowed]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
