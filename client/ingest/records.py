"""Records of a hospital's files, kept from one ingest to the next: lines of JSON without a path or an identifier.

In and out: the records of client/ingest/scan.py. A file that has the size and time of its record is not opened again. Stays in
the hospital.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from client.dicom.faults import Kind
from client.dicom.headers import CtSlice
from client.dicom.pseudonyms import Pseudonyms
from client.ingest.scan import READER_VERSION, FileRecord, FoundFile
from client.masks.match import MaskFile
from shared.site import Site

_SLICE_FIELDS = [f.name for f in fields(CtSlice) if f.name != "path"]
_MASK_FIELDS = [f.name for f in fields(MaskFile) if f.name != "path"]


def write_records(
    path: Path, site: Site, pseudonyms: Pseudonyms, pairs: Iterable[tuple[FoundFile, FileRecord]]
) -> None:
    """Keep the records of all files, in place of those that are kept."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(_maker(pseudonyms)))
        file.writelines(_lines(site, pairs))
    os.replace(partial, path)


def append_records(
    path: Path, site: Site, pseudonyms: Pseudonyms, pairs: Iterable[tuple[FoundFile, FileRecord]]
) -> None:
    """Add records as they are read, so that a stop loses few; of two lines on one file the later counts."""
    with open(path, "a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps(_maker(pseudonyms)))
        file.writelines(_lines(site, pairs))


def read_records(path: Path, site: Site, pseudonyms: Pseudonyms) -> dict[str, tuple[str, FileRecord]]:
    """Code -> stamp and record, as they were kept; paths are put back by scan. {} if made by another reader or key.

    If site.yaml's accept_lossy has changed, records that depend on it are dropped: lossy images, and files left out.
    """
    known: dict[str, tuple[str, FileRecord]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            if json.loads(file.readline()) != _maker(pseudonyms):
                return {}
            for line in file:
                code, stamp, accept_lossy, record = _parsed(line)
                decided = record.fault or any(image.lossy for image in record.images)
                if code and (accept_lossy == site.accept_lossy or not decided):
                    known[code] = (stamp, record)
    except (OSError, ValueError):  # none there
        pass
    return known


def _maker(pseudonyms: Pseudonyms) -> list[Any]:
    """Return what every record depends on beside its file."""
    return [READER_VERSION, pseudonyms.of_key()]


def _lines(site: Site, pairs: Iterable[tuple[FoundFile, FileRecord]]) -> Iterator[str]:
    """Records as lines; the line break comes first, so that what follows a line that a stop has cut is whole."""
    for f, record in pairs:
        if not f.refused:
            images = [[getattr(i, name) for name in _SLICE_FIELDS] for i in record.images]
            mask = [getattr(record.mask, name) for name in _MASK_FIELDS] if record.mask else None
            content = [f.code, f.stamp, site.accept_lossy, images, mask, record.fault, record.kind]
            yield "\n" + json.dumps(content, separators=(",", ":"))


def _parsed(line: str) -> tuple[str, str, bool, FileRecord]:
    """Code, stamp, setting and record of a line; "" and nothing of one that a stop has cut."""
    try:
        code, stamp, accept_lossy, images, mask, fault, kind = json.loads(line)
        slices = tuple(CtSlice(Path(), *(_frozen(v) for v in image)) for image in images)
        return (
            code,
            stamp,
            accept_lossy,
            FileRecord(slices, MaskFile(Path(), *map(_frozen, mask)) if mask else None, fault, Kind(kind)),
        )
    except (ValueError, TypeError):
        return "", "", False, FileRecord()


def _frozen(value: object) -> object:
    """A JSON list as a tuple."""
    return tuple(value) if isinstance(value, list) else value
