"""Bounds a day on what messages alone can make a hospital write: questions that are answered, refusals that are listed.

A refused message costs its sender nothing, and an entry of the audit log stays for ever. So an entry of a refusal is short
whatever was sent (client/boundary/audit.py), and beyond MOST_A_DAY of one kind refusals are counted: one entry says that it began, one
the number when the day is over.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from client.boundary.audit import LONGEST_REFUSAL, AuditError, record
from shared.host.files import replace_bytes

FILE = "daily.json"  # in the site's state folder: the day, and how many messages of each kind came
MOST_A_DAY = 2000  # a centre asks who a hospital is once a run, or once a round where it turns the hospital away
QUESTIONS = ("query.hello", "query.heads")  # answered without work that would bound them
_KINDS = ("train", "evaluate", *QUESTIONS)


def count_question(folder: Path, kind: str) -> int:
    """Count a question and return how many of its kind came this day.

    Args:
      folder: the site's state folder.
      kind: the message's type.
    Raises:
      AuditError: the number cannot be kept.
    """
    return _count(folder, kind)


def list_refusal(folder: Path, facts: Mapping[str, object], number: int | None = None) -> None:
    """Put a refusal into the audit log, or only count it.

    Args:
      folder: the site's state folder.
      facts: of the entry; `asked` is the message's type, which may be any text.
      number: what count_question returned; by default refusals of this kind are counted here.
    Raises:
      AuditError: it cannot be written.
    """
    kind = facts["asked"] if facts["asked"] in _KINDS else "other"
    number = _count(folder, f"refused {kind}") if number is None else number
    if number <= MOST_A_DAY:
        record(folder, "refused", facts, most=LONGEST_REFUSAL)
    elif number == MOST_A_DAY + 1:
        note = {"not_listed": "further refusals of this kind and day are counted"}
        record(folder, "refused", dict(facts) | note, most=LONGEST_REFUSAL)


def _count(folder: Path, kind: str) -> int:
    """Add one to a kind's number of this day; a new day begins with an entry on what was not listed the day before."""
    today = datetime.now(UTC).date().isoformat()
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: two messages may be answered at a time
            day, numbers = _read(path)
            over = {one: number - MOST_A_DAY - 1 for one, number in numbers.items() if number > MOST_A_DAY + 1}
            if day != today and over:
                record(folder, "not listed", {"day": day, "refusals": over}, most=LONGEST_REFUSAL)
            numbers = numbers if day == today else {}
            numbers[kind] = numbers.get(kind, 0) + 1
            replace_bytes(path, json.dumps({"day": today, "numbers": numbers}).encode())
            return numbers[kind]
    except OSError as error:
        raise AuditError(f"{path} cannot be written ({error.strerror}), so nothing leaves") from error


def _read(path: Path) -> tuple[str, dict[str, int]]:
    """The day and its numbers; a file that is damaged counts as none."""
    try:
        content = json.loads(path.read_text())
        return str(content["day"]), {str(kind): int(number) for kind, number in content["numbers"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}
