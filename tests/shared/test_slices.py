from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from shared.slices import COLUMNS, CacheError, read_cache


def write_cache(folder: Path, slices: int = 3, **changes: int) -> Path:
    """A cache on disk; changes set the length of one part or the format."""
    folder.mkdir()
    lengths = {"hu": slices, "masks": slices, "index": slices, "head": slices, "format": 1} | changes
    np.save(folder / "slices.npy", np.full((lengths["hu"], 224, 224), 40, dtype=np.int16))
    np.save(folder / "masks.npy", np.ones((lengths["masks"], 224, 224), dtype=np.uint8))
    labels, masked, splits = ("1", "0", "") * 2, ("1", "0", "1") * 2, ("train", "val", "test") * 2
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in range(lengths["index"]):
            values = (f"p{row}", f"s{row}", "0.0", "5.0", labels[row], masked[row], splits[row], "")
            writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    (folder / "cache.json").write_text(json.dumps({"format": lengths["format"], "slices": lengths["head"]}))
    return folder


def test_a_cache_is_read_as_written(tmp_path: Path) -> None:
    cache = read_cache(write_cache(tmp_path / "cache"))
    assert (cache.hu.shape, cache.hu.dtype, int(cache.hu[2, 5, 5])) == ((3, 224, 224), np.int16, 40)
    assert (cache.masks.dtype, int(cache.masks[0, 0, 0])) == (np.uint8, 1)
    assert isinstance(cache.hu, np.memmap)
    assert cache.patient.tolist() == ["p0", "p1", "p2"]
    assert cache.label[:2].tolist() == [1.0, 0.0]
    assert np.isnan(cache.label[2])
    assert cache.has_mask.tolist() == [True, False, True]


def test_rows_of_splits(tmp_path: Path) -> None:
    cache = read_cache(write_cache(tmp_path / "cache", slices=6))
    assert cache.rows("train").tolist() == [0, 3]
    assert cache.rows("val", "test").tolist() == [1, 2, 4, 5]
    assert cache.rows().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_missing_cache_names_folder_and_next_step(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="hemafed-client ingest") as caught:
        read_cache(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"hu": 2}, r"slices \(2, 224, 224\).*expected \(3, 224, 224\)"),
        ({"masks": 4}, r"masks \(4, 224, 224\)"),
        ({"index": 2}, "index 2 rows"),
        ({"head": 5}, "cache.json 5"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, changes: dict[str, int], text: str) -> None:
    folder = write_cache(tmp_path / "cache", **changes)
    with pytest.raises(CacheError, match=text) as caught:
        read_cache(folder)
    assert str(folder) in str(caught.value)
    assert "hemafed-client ingest" in str(caught.value)


@pytest.mark.parametrize("name", ["slices.npy", "masks.npy", "index.csv"])
def test_a_missing_part_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_cache(tmp_path / "cache")
    (folder / name).unlink()
    with pytest.raises(CacheError, match="hemafed-client ingest") as caught:
        read_cache(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["cache.json", "slices.npy", "masks.npy", "index.csv"])
def test_a_part_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_cache(tmp_path / "cache")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CacheError, match="hemafed-client ingest") as caught:
        read_cache(folder)
    assert str(folder) in str(caught.value)
