"""Data that were left out, grouped by reason whatever numbers the reason contains.

Stays in the hospital.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from shared.errors import HemafedError

_NUMBER = re.compile(r"\b[0-9a-f]{16}\b|\d+(?:[.,]\d+)*%?")


class Kind(StrEnum):
    """What a fault means for the hospital; the reason is for people, this is for code."""

    UNUSABLE = "unusable"
    NO_HEAD_CT = (
        "no head CT"  # localizers, computed maps, hidden files: an export may hold them, and nobody misses them
    )
    DENIED = "denied"  # this user may not read it
    NOT_CHOSEN = "not chosen"  # another series of its study was taken
    COPY = "copy"  # counted once
    OUTLIER = "outlier"  # an image that does not fit its series
    AMONG_IMAGES = "among images"  # a mask in data.images
    IN_PART = "in part"  # of a mask file that was used, some pieces were not
    OFF_HEAD = "off head"  # a mask that lies in air; it is used all the same


class DicomError(HemafedError, ValueError):
    """A file or series cannot be used; the text names no patient, path or UID."""

    def __init__(self, reason: str, kind: Kind = Kind.UNUSABLE):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Fault:
    """One thing that was left out, and why.

    Attributes:
      what: "file 1a2b…" or "series 3c4d…": keyed hashes that `hemafed-client find` turns back; or a line of a table.
      reason: the value found and what was expected; names no patient.
      kind: what it means for the hospital.
    """

    what: str
    reason: str
    kind: Kind = Kind.UNUSABLE


def by_reason(faults: Iterable[Fault], name_first: bool = True) -> list[tuple[str, list[str]]]:
    """Group faults by reason, largest group first.

    Args:
      faults: to group.
      name_first: add whose numbers a reason shows, where they differ.
    Returns:
      Each reason and what was left out for it. Reasons that differ only in numbers and codes are one; the first is shown.
    """
    groups: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[_NUMBER.sub("#", fault.reason)].append(fault)
    found = []
    for members in groups.values():
        same = len({fault.reason for fault in members}) == 1
        reason = members[0].reason
        if name_first and not same:
            reason += f" (numbers of the first, {members[0].what})"
        found.append((reason, [fault.what for fault in members]))
    return sorted(found, key=lambda group: (-len(group[1]), group[0]))


def commonest(faults: Iterable[Fault]) -> str:
    """Return the most frequent reason and its count, the cause to look at first; "" without faults."""
    groups = by_reason(faults)
    if not groups:
        return ""
    reason, which = groups[0]
    return f"{reason}, {len(which)} times" if len(which) > 1 else reason
