"""One imported hospital on disk: site.yaml, labels.csv, import.json, and files that are linked instead of copied.

Everything is written beside its place and then moved there; what is there already with the same content is left alone;
site.yaml comes last, so that a folder with one is whole. Stays on the machine.
"""

from __future__ import annotations

import csv
import errno
import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from simulations.importers.source import DataSet, LeftOut, SourceError

# What the slice-labelled sets tell of a slice, in one order and spelling for all of them: 1, 0, or blank for unknown.
CLASSES = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
COLUMNS = ("series_uid", "sop_uid", "hypodensity")  # what ingest reads; the sets' own columns follow
_DECIDED = ("cache", "state", "role", "policy")  # by whoever owns the hospital; a second import keeps them
SAME_TIME_S = 2  # some file systems keep times of change to two seconds
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}  # other disk, forbidden, too many, not supported


def _marker(data_set: DataSet) -> str:
    """The first line of a site.yaml that an importer may write again."""
    return f"# Written by hemafed-sim import {data_set.name}"


def check_free(folder: Path, data_set: DataSet) -> None:
    """Refuse a folder whose site.yaml somebody else wrote.

    Raises:
      SourceError: there is such a file.
    """
    path = folder / "site.yaml"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace").partition("\n")[0] != _marker(data_set):
        raise SourceError(
            f"{path} exists and does not begin with {_marker(data_set)!r}, so this import did not write it; name another "
            "TARGET, or move that hospital away"
        )


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where it cannot be linked; a target of the same size and time is left alone."""
    source = source.resolve()  # the link is to the file, never to a symbolic link
    if target.exists():
        there, wanted = target.stat(), source.stat()
        if there.st_size == wanted.st_size and abs(there.st_mtime - wanted.st_mtime) <= SAME_TIME_S:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copy2(source, partial)
    os.replace(partial, target)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file at once, unless it is there with this content."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_bytes(content)
    os.replace(partial, path)


def write_labels(folder: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> int:
    """labels.csv of a hospital; hypodensity is blank in every row, because no public set tells it.

    Args:
      columns: the set's own, after COLUMNS.
      rows: "series_uid" and "sop_uid", and what is known of the set's own columns.
    Returns:
      How many rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, count = folder / "labels.csv", 0
    partial = _partial(path)
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *columns], restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            count += 1
    if path.is_file() and filecmp.cmp(partial, path, shallow=False):
        partial.unlink()
    else:
        os.replace(partial, path)
    return count


def write_site(
    folder: Path,
    data_set: DataSet,
    data: Mapping[str, Any],
    counts: Mapping[str, int],
    left_out: LeftOut,
    notes: Sequence[str] = (),
) -> Path:
    """import.json, then site.yaml: the last step of an import.

    Args:
      folder: of the hospital; its name is the site's.
      data_set: where it comes from.
      data: the `data` section of site.yaml, except labels.
      counts: what was taken, for import.json.
      left_out: what was not, and why.
      notes: what a user of this hospital must know, as comments in site.yaml.
    Returns:
      The site.yaml.
    """
    account = {"set": data_set.name, "page": data_set.page, "counts": dict(counts), "left_out": left_out.summary()}
    write_bytes(folder / "import.json", (json.dumps(account, indent=1, ensure_ascii=False) + "\n").encode())
    content: dict[str, Any] = {
        "site": folder.name,
        "data": {**data, "labels": "labels.csv"},
        "cache": "cache/",
        "role": "held-out",
        "policy": {"release": ["encoder"], "metrics": True, "min_patients": 10},
    }
    comments = [
        f"{data_set.title}, {data_set.page}",
        f"Terms: {data_set.terms}",
        "The set does not tell of hypodensities: that column of labels.csv is blank, which means unknown.",
        *notes,
        "role: held-out is tested on; the other choice is train, which takes part in training.",
    ]
    head = "\n".join([_marker(data_set), *(f"# {line}" for line in comments)])
    path = folder / "site.yaml"
    body = yaml.safe_dump(content | _decided(path), sort_keys=False, allow_unicode=True)
    write_bytes(path, f"{head}\n{body}".encode())
    return path


def _decided(path: Path) -> dict[str, Any]:
    """Return the settings that a user may have changed in an imported site.yaml, to be kept."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no longer YAML ({type(error).__name__}); repair or delete it") from error
    return {key: content[key] for key in _DECIDED if isinstance(content, dict) and key in content}


def strays(folder: Path, written: Iterable[Path], left_out: LeftOut) -> None:
    """Count files of an earlier import in a hospital's folder that this one would not write; nothing is deleted."""
    known = set(written)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in known:
            left_out.add(
                str(path.relative_to(folder)),
                f"in {folder.name}/ and no longer in the source: ingest will read it; delete it",
            )


def _partial(path: Path) -> Path:
    """Return the temporary path of a file before it is moved into place; hidden, and overwritten if an import was killed."""
    return path.with_name(f".{path.name}.partial")
