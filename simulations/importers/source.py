"""A public set's folder: found, read and reported on.

In: what somebody downloaded and unzipped. Out: its root, the rows of its tables, the headers of its DICOM files, and an
account of what was not taken. A set that cannot be used is refused with what was found, what was expected and what to
do; a single bad file or row is left out and counted.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.config import disable_value_validation

from shared.errors import HemafedError

EXAMPLES = 20  # of what was left out for one reason; the rest is counted


class SourceError(HemafedError, ValueError):
    """A set's folder, one of its files, or the target cannot be used; says what was found and the next step."""


@dataclass(frozen=True)
class DataSet:
    """A public set, as its site.yaml introduces it.

    Attributes:
      name: as on the command line.
      title: with the paper to cite.
      page: URL of its description.
      terms: what its publisher allows, in a few words; the page has the binding text.
    """

    name: str
    title: str
    page: str
    terms: str


class LeftOut:
    """Files that were left out: per reason a count and the first EXAMPLES names."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, reason: str) -> None:
        """One thing that was not taken."""
        self._counts[reason] += 1
        if len(self._names[reason]) < EXAMPLES:
            self._names[reason].append(name)

    def summary(self) -> list[dict[str, object]]:
        """Reason, count and examples, most first; for import.json."""
        return [
            {"reason": reason, "count": count, "examples": self._names[reason]}
            for reason, count in self._counts.most_common()
        ]

    def text(self) -> str:
        """The same in lines, for an error; "" if nothing was left out."""
        return "".join(
            f"\n  left out {count}: {reason} ({', '.join(self._names[reason][:3])}{', ...' if count > 3 else ''})"
            for reason, count in self._counts.most_common()
        )


def find_root(data_set: DataSet, source: Path, target: Path, needed: Sequence[str]) -> Path:
    """The folder that holds what a set consists of: the source, or the one folder in it, as some archives unpack.

    Args:
      data_set: for messages.
      source: the folder that was named.
      target: where hospitals are to be written.
      needed: names of files and folders, all of which must be there.
    Raises:
      SourceError: no such folder, something missing in it, or a target inside it, which would be imported in turn.
    """
    source, target = source.absolute(), target.absolute()
    if not source.is_dir():
        raise SourceError(
            f"{data_set.name}: SOURCE is {source}, and there is no such folder; expected the unpacked set, see {data_set.page}"
        )
    if target.resolve().is_relative_to(source.resolve()):
        raise SourceError(
            f"{data_set.name}: TARGET {target} lies in SOURCE {source}; name a folder outside, or a second import would take "
            "the first one's files"
        )
    folders = [source, *sorted(one for one in source.iterdir() if one.is_dir())]
    whole = [folder for folder in folders if all((folder / name).exists() for name in needed)]
    if whole and (whole[0] == source or len(whole) == 1):
        return whole[0]
    if whole:
        names = ", ".join(folder.name for folder in whole)
        raise SourceError(
            f"{data_set.name}: {source} holds the set {len(whole)} times ({names}); give one of them as SOURCE"
        )
    missing = ", ".join(repr(name) for name in needed if not (source / name).exists())
    found = sorted(one.name for one in source.iterdir())
    listed = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
    raise SourceError(
        f"{data_set.name}: {source} has no {missing}; it has {listed or 'nothing'}. Expected the folder as published, "
        f"unpacked, see {data_set.page}"
    )


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Rows of a CSV table: line number, and the values of some columns without surrounding blanks; empty rows left out.

    Raises:
      SourceError: not a CSV table in UTF-8, or a column is missing.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            found = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in found]
            if missing:
                raise SourceError(
                    f"{path.name} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, found)) or 'none'}. "
                    "Expected the table as published, of the version that the importer's documentation names"
                )
            places = [found.index(name) for name in columns]
            for row in reader:
                if any(value.strip() for value in row):
                    yield reader.line_num, tuple(row[i].strip() if i < len(row) else "" for i in places)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(
            f"{path.name} is not a CSV table in UTF-8 ({type(error).__name__}); download it again"
        ) from error


def read_header(path: Path, keywords: Sequence[str]) -> dict[str, str]:
    """Elements of a DICOM file as text, "" where absent; pixels are not read.

    Raises:
      SourceError: not DICOM, or damaged.
    """
    try:
        # Published files break rules, as UIDs that are none do; a warning for each of a million files helps nobody.
        with disable_value_validation():
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(keywords))
            values = {keyword: ds.get(keyword) for keyword in keywords}
            return {keyword: "" if value is None else str(value).strip() for keyword, value in values.items()}
    except Exception as error:  # pydicom raises many types, by where a file is damaged
        raise SourceError(f"cannot be read as DICOM ({type(error).__name__})") from error
