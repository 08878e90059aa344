"""The slice cache as it is written: part by part, so that a stop at any moment loses one part at most.

A cache in the making is the folder `<cache>.partial`. Each part is appended to the arrays, then one line to the journal;
what the journal does not name is cut off when work goes on. A finished one gets its index and `cache.json` and takes the
old one's place. Parts of the old cache whose files have not changed are copied. Stays in the hospital.

Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from client.dicom.faults import Fault, Kind
from client.ingest.read_series import CachedSeries, PartRow
from shared.slices import COLUMNS, SIDE_PX, CacheError, SliceCache, read_cache

JOURNAL, RECORDS, HEAD = "parts.jsonl", "files.jsonl", "cache.json"
ARRAYS = {"slices.npy": np.dtype(np.int16), "masks.npy": np.dtype(np.uint8)}
FILES = {*ARRAYS, "index.csv", HEAD, JOURNAL, RECORDS, f"{RECORDS}.partial", f"{JOURNAL}.partial"}


@dataclass(frozen=True)
class StoredSeries:
    """A part in a cache: the Part without its arrays, and where they are.

    Attributes:
      fingerprint: hash of what it was made from.
      start: its first row.
      series, patient, spacing_mm, rows, faults: as in Part.
    """

    fingerprint: str
    start: int
    series: str
    patient: str
    spacing_mm: float
    rows: tuple[PartRow, ...]
    faults: tuple[Fault, ...]


def read_journal(folder: Path) -> list[StoredSeries]:
    """The parts that a cache holds, whole ones only; [] where there is no cache."""
    path = folder / JOURNAL
    if not path.is_file():
        return []
    sizes = [_rows_of(folder / name, dtype) for name, dtype in ARRAYS.items()]
    parts, start = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fingerprint, series, patient, spacing_mm, rows, faults = json.loads(line)
            kept = tuple(PartRow(i, z, m, tuple(flags), content) for i, z, m, flags, content in rows)
            found = tuple(Fault(what, reason, Kind(kind)) for what, reason, kind in faults)
        except ValueError:  # the line that a stop cut
            break
        if start + len(kept) > min(sizes):
            break
        parts.append(StoredSeries(fingerprint, start, series, patient, spacing_mm, kept, found))
        start += len(kept)
    return parts


def _rows_of(path: Path, dtype: np.dtype) -> int:
    """Return how many whole slices an array's file holds."""
    size = path.stat().st_size if path.is_file() else 0
    return max(0, size - len(_npy_head(dtype, 0))) // (SIDE_PX * SIDE_PX * dtype.itemsize)


def _npy_head(dtype: np.dtype, rows: int) -> bytes:
    """The head of a .npy file; numpy leaves room in it, so that its length does not depend on the number of rows."""
    head = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, SIDE_PX, SIDE_PX)}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()


class PartialCache:
    """A cache in the making. Use as a context; `finish` puts it in place.

    Attributes:
      folder: `<cache>.partial`.
      parts: what it holds.
    """

    def __init__(self, cache: Path):
        self.cache = cache
        self.folder = cache.with_name(cache.name + ".partial")
        self.parts: list[StoredSeries] = []
        self._arrays: dict[str, BinaryIO] = {}

    def __enter__(self) -> PartialCache:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._arrays.values():
            file.close()

    def begin(self, fingerprints: list[str]) -> int:
        """Go on where an earlier ingest stopped, as far as it made the same parts in the same order.

        Returns:
          How many of the parts are there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = read_journal(self.folder)
        same = 0
        while same < min(len(journal), len(fingerprints)) and journal[same].fingerprint == fingerprints[same]:
            same += 1
        self.parts = journal[:same]
        rows = sum(len(part.rows) for part in self.parts)
        lines = "".join(_line(part) for part in self.parts)
        shortened = self.folder / f"{JOURNAL}.partial"
        shortened.write_text(lines, encoding="utf-8")
        os.replace(shortened, self.folder / JOURNAL)
        for name, dtype in ARRAYS.items():
            head = _npy_head(dtype, 0)
            file = open(self.folder / name, "r+b" if (self.folder / name).exists() else "w+b")  # noqa: SIM115
            file.truncate(len(head) + rows * SIDE_PX * SIDE_PX * dtype.itemsize)
            file.write(head)
            file.seek(0, os.SEEK_END)
            self._arrays[name] = file
        return same

    def add(
        self, fingerprint: str, part: CachedSeries | StoredSeries, hu: NDArray[np.int16], masks: NDArray[np.uint8]
    ) -> None:
        """Append a part, of a worker or of the old cache."""
        start = sum(len(p.rows) for p in self.parts[-1:]) + (self.parts[-1].start if self.parts else 0)
        stored = StoredSeries(fingerprint, start, part.series, part.patient, part.spacing_mm, part.rows, part.faults)
        for name, array in zip(ARRAYS, (hu, masks), strict=True):
            self._arrays[name].write(np.ascontiguousarray(array, ARRAYS[name]).data)
            self._arrays[name].flush()
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(_line(stored))
        self.parts.append(stored)

    def finish(self, labels: Mapping[str, str], splits: Mapping[str, str], head: Mapping[str, Any]) -> None:
        """Write index and head, and take the old cache's place.

        Args:
          labels: image name -> label.
          splits: patient -> split.
          head: content of cache.json, see client/ingest/ingest.py.
        """
        rows = sum(len(part.rows) for part in self.parts)
        for name, dtype in ARRAYS.items():
            file = self._arrays[name]
            file.seek(0)
            file.write(_npy_head(dtype, rows))
            _to_disk(file)
        with open(self.folder / "index.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(index_rows(self.parts, labels, splits))
            _to_disk(file)
        with open(self.folder / HEAD, "w", encoding="utf-8") as file:  # last: it says that the cache is whole
            json.dump(head, file, indent=1)
            _to_disk(file)
        swap_in(self.cache)


def index_rows(
    parts: Iterable[StoredSeries], labels: Mapping[str, str], splits: Mapping[str, str]
) -> list[dict[str, str]]:
    """Rows of index.csv."""
    return [
        {
            "patient": part.patient,
            "series": part.series,
            "z_mm": f"{row.z_mm:.2f}",
            "spacing_mm": f"{part.spacing_mm:.2f}",
            "label": labels.get(row.image, ""),
            "has_mask": str(int(row.has_mask)),
            "split": splits[part.patient],
            "flags": " ".join(row.flags),
        }
        for part in parts
        for row in part.rows
    ]


def whole_cache(folder: Path) -> SliceCache | None:
    """The cache in a folder; None if it is missing, or damaged in any way."""
    try:
        return read_cache(folder)
    except (CacheError, KeyError, TypeError):  # the latter of a file that is whole as JSON or CSV, and lacks something
        return None


def swap_in(cache: Path) -> bool:
    """Put a finished `<cache>.partial` in the cache's place; False if there is none.

    A stop between the two renames leaves `<cache>.old` and the finished one; the next call ends what was begun.
    """
    partial, old = cache.with_name(cache.name + ".partial"), cache.with_name(cache.name + ".old")
    if not (partial / HEAD).is_file():
        return False
    if not whole_cache(partial):  # cut by a power failure
        (partial / HEAD).unlink()
        return False
    remove(old)
    if cache.exists():
        os.replace(cache, old)
    os.replace(partial, cache)
    remove(old)
    return True


def remove_leftovers(cache: Path) -> None:
    """Delete what earlier ingests left beside a cache that is current."""
    for suffix in (".partial", ".old"):
        remove(cache.with_name(cache.name + suffix))


def remove(folder: Path) -> None:
    """Delete a slice cache, and nothing else."""
    if folder.is_dir() and not strangers(folder):
        shutil.rmtree(folder)


def strangers(folder: Path) -> list[str]:
    """Names in a folder that are no files of a slice cache."""
    return sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []


def _line(part: StoredSeries) -> str:
    """A part as a line of the journal."""
    content = {k: v for k, v in asdict(part).items() if k != "start"}
    rows = [list(row.values()) for row in content["rows"]]
    faults = [list(fault.values()) for fault in content["faults"]]
    fields = [part.fingerprint, part.series, part.patient, part.spacing_mm, rows, faults]
    return json.dumps(fields, separators=(",", ":")) + "\n"


def _to_disk(file: Any) -> None:
    """Wait until a file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())
