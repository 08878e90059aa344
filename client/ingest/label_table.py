"""The hospital's label table: a CSV, read with the mistakes in mind that spreadsheets make.

UIDs become keyed hashes as it is read; a line's number is what messages name. Stays in the hospital.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.dicom.pseudonyms import Pseudonyms
from shared.errors import HemafedError
from shared.site import Site

COLUMNS = ("series_uid", "sop_uid", "slice_index", "hypodensity")
_ROUNDED = re.compile(r"[0-9]+([.,][0-9]+)?E\+?[0-9]+", re.IGNORECASE)  # 1.23457E+18
_CUT_DIGITS = re.compile(r"[1-9][0-9]{14}0{2,}")  # a spreadsheet keeps 15 digits of a number
_AS_TEXT = "a spreadsheet took it for a number and rounded it: import the column as text, from the original"
_SAVE = "save it as CSV UTF-8 (comma delimited)"


class LabelError(HemafedError, ValueError):
    """A label table cannot be used; lists its faults and the next step."""


@dataclass(frozen=True)
class LabelRow:
    """One line of the table.

    Attributes:
      line: its number in the file.
      series: keyed hash of the series.
      instance: keyed hash of the SOP instance; "" where the table counts slices.
      index: slice from 0, from the feet up; -1 where the table names images.
      value: "1", "0" or "" for unknown.
    """

    line: int
    series: str
    instance: str
    index: int
    value: str


def read_labels(site: Site, pseudonyms: Pseudonyms) -> list[LabelRow]:
    """The label table, a CSV with columns series_uid, sop_uid or slice_index, and hypodensity; others are ignored.

    Lines that say nothing at all are passed over: spreadsheets end with them.

    Raises:
      LabelError: no CSV table that can be read, a missing column, a value that is none of 1, 0 and blank, a UID that a
        spreadsheet rounded, or a slice_index that is no number; all of a table's lines at once.
    """
    if site.labels is None:
        return []
    columns, table = _read_table(site.labels)
    place = next((c for c in ("sop_uid", "slice_index") if c in columns), None)
    if "series_uid" not in columns or "hypodensity" not in columns or place is None:
        raise LabelError(_no_columns(site.labels.name, columns))
    if len(set(COLUMNS) & set(columns)) < sum(column in COLUMNS for column in columns):
        raise LabelError(
            f"{site.labels.name} has a column twice; expected each of {', '.join(COLUMNS)} once: remove one"
        )
    rows, wrong = [], []
    for line, row in table:
        uid, where, value = ((row[column] or "").strip() for column in ("series_uid", place, "hypodensity"))
        if not (uid or where or value):
            continue
        reason = _wrong(uid, where, value, place)
        if reason:
            wrong.append(f"line {line}: {reason}")
            continue
        instance = pseudonyms.of("image", where) if place == "sop_uid" else ""
        index = int(where) if place == "slice_index" else -1
        rows.append(LabelRow(line, pseudonyms.of("series", uid), instance, index, value))
    if wrong:
        raise LabelError(f"{site.labels.name} cannot be read:\n  {some(wrong)}\ncorrect these lines")
    return rows


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Names of the columns, and the lines with their numbers."""
    try:
        if path.read_bytes()[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
            raise LabelError(f"{path.name} is a spreadsheet and no CSV table; {_SAVE}")
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [str(column).strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            return columns, [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise _closed(path, error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{path.name} is not a CSV table in UTF-8; {_SAVE}") from error


def _no_columns(table: str, columns: Sequence[str]) -> str:
    """Return the error for a table without the needed columns; shows the table's columns that resemble them."""
    expected = "expected series_uid, sop_uid or slice_index, and hypodensity"
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(columns) <= 2 and any(separator in column for column in columns):
            return f"{table} has {name} between its columns, as spreadsheets write in some languages, {expected} with commas; {_SAVE}"
    hints = []
    for column in columns:
        plain = re.sub(r"[\W_]", "", column).casefold()
        near = difflib.get_close_matches(plain, [c.replace("_", "") for c in COLUMNS], 1, 0.7)
        if near and column not in COLUMNS:
            meant = next(c for c in COLUMNS if c.replace("_", "") == near[0])
            hints.append(f"rename {column!r} to {meant}")
    if not hints and not set(columns) & set(COLUMNS):
        hints = ["its first line must name the columns"]
    return f"{table} has {len(columns)} columns, {expected}; {', '.join(hints) or 'add what is missing'}"


def _wrong(uid: str, where: str, value: str, place: str) -> str:
    """Return what is wrong with a line, "" if nothing is."""
    for name, text in (("series_uid", uid), (place, where if place == "sop_uid" else "")):
        if _ROUNDED.fullmatch(text) or _CUT_DIGITS.fullmatch(text):
            return f"{name} is no UID: {_AS_TEXT}"
        if text and any(sign in text for sign in "'\" ,;"):
            return f"{name} holds a quotation mark, space or comma; expected digits and dots alone"
    if value not in ("", "0", "1"):
        return "hypodensity is neither 1, 0 nor blank"
    if place == "slice_index" and not re.fullmatch("[0-9]{1,6}", where):
        return "slice_index is no number from 0 on"
    if value and not (uid and where):
        return f"{place if uid else 'series_uid'} is blank, and the line has a label"
    return ""


def table_digest(site: Site) -> str:
    """Hash of the label table's content; "" without one.

    Raises:
      LabelError: it cannot be opened.
    """
    if site.labels is None:
        return ""
    try:
        return hashlib.sha256(site.labels.read_bytes()).hexdigest()
    except OSError as error:
        raise _closed(site.labels, error) from error


def _closed(table: Path, error: OSError) -> LabelError:
    """Return the error for a table that cannot be opened."""
    return LabelError(
        f"{table.name} cannot be opened ({error.strerror}); give permission to read it, or correct data.labels"
    )


def some(lines: list[str]) -> str:
    """The first ten, and how many more."""
    return "\n  ".join(lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else []))
