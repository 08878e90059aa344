"""The hospital's own record of what it was asked and what left: append-only, each entry chained to the one before.

One JSON object per line in `audit.jsonl` of the site's state folder. An entry's hash covers its content and the hash of the
entry before, so that whoever changes, inserts or removes a line breaks every hash after it. Removing the last lines breaks
nothing, so the newest hash goes to the coordinating centre with every reply: an older one that the centre kept must be
found in the chain. Nothing about a patient is recorded: names, shapes, sizes and norms of what left, and refusals.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from shared.refusals import Refusal, Refused

FILE = "audit.jsonl"
START = "0" * 64  # what the first entry is chained to
CUT = "cut line"  # entry that follows a line which a crash or a full disk left unfinished
_LONGEST_LINE = 512 * 1024  # of an entry that is written here; one of a round has about 40 KiB
LONGEST_REFUSAL = 1500  # of a refusal's facts, in characters: a message that is refused costs its sender nothing
_SHORT_TEXT = 200
_LONGEST_TEXT, _MOST_ITEMS, _MOST_TENSORS, _DEEPEST = 1000, 200, 2000, 6
_TAIL = 1 << 20  # what is read first of a log's end


class AuditError(Refused):
    """The audit log cannot be written, so nothing may leave."""

    code = Refusal.AUDIT


@dataclass(frozen=True)
class Verdict:
    """Result of checking an audit log.

    Attributes:
      entries: whole entries.
      newest: hash of the last one; START of an empty log.
      faults: what is wrong, a sentence each with the line's number.
    """

    entries: int
    newest: str
    faults: tuple[str, ...]


def record(folder: Path, event: str, facts: Mapping[str, object], most: int = _LONGEST_LINE // 2) -> str:
    """Append an entry, on disk when this returns.

    Args:
      folder: the site's state folder.
      event: such as "released" or "refused".
      facts: JSON-ready content of the entry; nothing of a patient.
      most: characters of the facts, of which a longer rest is left out, with its size and hash in its place.
    Returns:
      The entry's hash, 64 hexadecimal digits.
    Raises:
      AuditError: it cannot be written; the text does not name the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILE, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: two messages may be answered at a time
            before, unfinished, cut = _end(file)
            text = "\n" if unfinished else ""
            if cut:
                whole = {"cut_bytes": len(cut), "cut_sha256": hashlib.sha256(cut).hexdigest()}
                before, line = _entry(before, CUT, whole)
                text += line
            newest, line = _entry(before, event, facts, most)
            file.write((text + line).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise AuditError(
            f"the site's audit log cannot be written ({error.strerror}), so nothing leaves; the site must make room or "
            "correct the rights of its state folder"
        ) from error
    return newest


def known_items(items: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """Return what a message holds under known keys; the rest as a number and one hash."""
    kept = {key: value for key, value in items.items() if key in known}
    rest = [f"{key!a}: {value!a}" for key, value in items.items() if key not in known]
    digest = hashlib.sha256("\n".join(sorted(rest)).encode()).hexdigest()
    return kept | ({"left_out_keys": len(rest), "left_out_sha256": digest} if rest else {})


def printable(text: str) -> str:
    """A text on one line of plain characters, whatever it holds: control characters would forge lines on a screen."""
    return text.encode("unicode_escape", "backslashreplace").decode("ascii") if not _is_plain(text) else text


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _entry(before: str, event: str, facts: Mapping[str, object], most: int = _LONGEST_LINE // 2) -> tuple[str, str]:
    """Hash and line of a new entry, little longer than `most` whatever the facts are."""
    bounded = _bounded_items(facts)
    size = len(json.dumps(bounded))
    if size > most:
        plain = {key: value for key, value in bounded.items() if isinstance(value, str | int | float)}
        if most < _LONGEST_TEXT * len(plain):
            plain = {key: _shortened(value) for key, value in plain.items()}
        bounded = {**plain, "left_out_bytes": size, "left_out_sha256": _hash(bounded)}
    content = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **bounded, "before": before}
    newest = _hash(content)
    return newest, json.dumps(content | {"hash": newest}, sort_keys=True) + "\n"


def _shortened(value: str | int | float) -> str | int | float:
    return value[: _SHORT_TEXT - 1] + "~" if isinstance(value, str) and len(value) > _SHORT_TEXT else value


def _bounded(value: object, depth: int = 0) -> object:
    """A value as it is recorded: long texts as their length and hash, control characters escaped, numbers finite."""
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
            return f"({len(value)} characters, sha256 {digest})"
        return printable(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        short = abs(value) < 10**30 and math.isfinite(value)
        return value if short else f"({type(value).__name__} that is not a plain number)"
    if depth > _DEEPEST:
        return "(nested too deep)"
    if isinstance(value, Mapping):
        return _bounded_items(value, depth)
    if isinstance(value, list | tuple):
        first = [_bounded(one, depth + 1) for one in value[:_MOST_TENSORS]]
        return first if len(value) <= _MOST_TENSORS else [*first, f"({len(value) - _MOST_TENSORS} more)"]
    return f"({type(value).__name__})"


def _bounded_items(value: Mapping[Any, object], depth: int = 0) -> dict[str, object]:
    """As many of a mapping's items as are recorded, and how many are not."""
    items = list(value.items())
    kept = {str(_bounded(str(key))): _bounded(one, depth + 1) for key, one in items[:_MOST_ITEMS]}
    return kept if len(items) <= _MOST_ITEMS else kept | {"left_out": len(items) - _MOST_ITEMS}


def _hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _end(file: BinaryIO) -> tuple[str, bool, bytes]:
    """Return the hash of the last whole entry, whether the file ends within a line, and that line if it is no entry."""
    size, tail = file.seek(0, os.SEEK_END), _TAIL
    while True:  # a log of an older version may hold longer lines
        begin = max(0, size - tail)
        file.seek(begin)
        first, *lines = file.read().split(b"\n")
        lines = lines if begin else [first, *lines]  # the first one is cut where the file does not begin
        whole = next((entry for entry in map(_parsed, reversed(lines)) if entry is not None), None)
        if whole is not None or not begin:
            break
        tail *= 4
    last = lines[-1]
    return (str(whole["hash"]) if whole else START), bool(last), b"" if _parsed(last) else last


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An entry, or None for a line that is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("hash"), str) else None


def read_entries(folder: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Line number from 1, the line, and its entry or None where it is none."""
    path = folder / FILE
    if path.is_file():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip(b"\n"), _parsed(line)


def verify(folder: Path, known: tuple[str, ...] = ()) -> Verdict:
    """Check an audit log's chain.

    Args:
      folder: the site's state folder.
      known: hashes that the coordinating centre received, whole; each must be in the chain.
    Raises:
      AuditError: a known hash is none.
    """
    for one in known:
        if not re.fullmatch("[0-9a-f]{64}", one):
            raise AuditError(
                f"--known {one!r} is no hash; give all 64 digits, as the centre's rounds.jsonl has them under 'audit'"
            )
    before, entries, faults, unread, hashes = START, 0, [], b"", set()
    for number, line, entry in read_entries(folder):
        if entry is None:
            if unread:
                faults.append(f"line {number - 1} is no entry")
            unread = line
            continue
        explained = (
            entry.get("event") == CUT
            and entry.get("cut_bytes") == len(unread)
            and entry.get("cut_sha256") == hashlib.sha256(unread).hexdigest()
        )
        if unread and not explained:
            faults.append(f"line {number - 1} is no entry")
        unread = b""
        content = {key: value for key, value in entry.items() if key != "hash"}
        if _hash(content) != entry["hash"]:
            faults.append(f"line {number} was changed: its hash is not that of its content")
        if entry.get("before") != before:
            faults.append(f"line {number} does not follow the entry before it: a line was removed, added or moved")
        before, entries = str(entry["hash"]), entries + 1
        hashes.add(before)
    if unread:
        faults.append("the last line is unfinished; the next entry will say so")
    missing = [one for one in known if one not in hashes]
    faults += [
        f"no entry with the hash {one[:12]}… that the centre received: lines were removed, or the hash is of another site"
        for one in missing
    ]
    return Verdict(entries, before, tuple(faults))


def contents(content: RecordDict) -> dict[str, object]:
    """Describe a reply for its entry: names, shapes, bytes, norms and a hash of tensors; numbers and facts as they are."""
    described: dict[str, object] = {}
    for name, record in sorted(content.items()):
        if isinstance(record, ArrayRecord):
            whole, tensors = hashlib.sha256(), []
            for key, array in record.items():
                whole.update(key.encode() + b"\0" + array.data)
                values = array.numpy()
                # Coded differences are bytes, whose length says nothing.
                norm = None if values.dtype == np.uint8 else float(f"{np.linalg.norm(values.astype(np.float64)):.6g}")
                tensors.append([key, list(array.shape), len(array.data), norm])
            described[name] = {"tensors": tensors, "sha256": whole.hexdigest()}
        else:
            described[name] = {key: value for key, value in record.items() if not isinstance(value, bytes)}
    return described
