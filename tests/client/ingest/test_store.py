from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from client.dicom.faults import Fault
from client.ingest.read_series import CachedSeries, PartRow
from client.ingest.store import (
    ARRAYS,
    HEAD,
    JOURNAL,
    PartialCache,
    index_rows,
    read_journal,
    remove,
    remove_leftovers,
    strangers,
    swap_in,
)
from shared.slices import SIDE_PX, CacheError, read_cache
from tests.support.small_sites import contents

SPLITS = {"patient": "train"}


def part(number: int, slices: int = 2) -> CachedSeries:
    """A series whose pictures hold its number."""
    rows = tuple(PartRow(f"{number}.{n}", 5.25 * n, bool(n), ("uneven", "lossy")[:n], "c0ffee") for n in range(slices))
    shape = (slices, SIDE_PX, SIDE_PX)
    faults = (Fault(f"file {number}", "torn"),)
    return CachedSeries(
        f"series-{number}",
        "patient",
        5.25,
        rows,
        faults,
        np.full(shape, number, np.int16),
        np.full(shape, number, np.uint8),
        np.zeros(1),
    )


def write(cache: Path, numbers: list[int], finish: bool = True, slices: int = 2) -> int:
    """An ingest that adds parts of these numbers; returns how many were there already."""
    with PartialCache(cache) as partial:
        there = partial.begin([f"print-{n}" for n in numbers])
        for n in numbers[there:]:
            one = part(n, slices)
            partial.add(f"print-{n}", one, one.hu, one.masks)
        if finish:
            rows = sum(len(p.rows) for p in partial.parts)
            partial.finish({}, SPLITS, {"format": 1, "slices": rows})
    return there


def values(cache: Path) -> list[int]:
    return read_cache(cache).hu[:, 0, 0].tolist()


def test_a_cache_is_written_part_by_part(tmp_path: Path) -> None:
    assert write(tmp_path / "cache", [3, 1, 2]) == 0
    cache = read_cache(tmp_path / "cache")
    assert cache.hu[:, 0, 0].tolist() == cache.masks[:, 5, 5].tolist() == [3, 3, 1, 1, 2, 2]
    assert (cache.hu.dtype, cache.masks.dtype) == (np.int16, np.uint8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    parts = read_journal(tmp_path / "cache")
    assert [(p.fingerprint, p.start, p.series, p.patient, p.spacing_mm) for p in parts] == [
        (f"print-{n}", 2 * i, f"series-{n}", "patient", 5.25) for i, n in enumerate([3, 1, 2])
    ]
    assert [p.rows for p in parts] == [part(n).rows for n in [3, 1, 2]]
    assert [p.faults for p in parts] == [part(n).faults for n in [3, 1, 2]]


def test_the_index_has_a_row_per_slice(tmp_path: Path) -> None:
    write(tmp_path / "cache", [7])
    with open(tmp_path / "cache" / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    common = {"patient": "patient", "series": "series-7", "spacing_mm": "5.25", "label": "", "split": "train"}
    assert rows == [
        common | {"z_mm": "0.00", "has_mask": "0", "flags": ""},
        common | {"z_mm": "5.25", "has_mask": "1", "flags": "uneven"},
    ]
    assert index_rows(read_journal(tmp_path / "cache"), {"7.1": "1"}, SPLITS)[1]["label"] == "1"


@pytest.mark.parametrize(
    ("first", "then", "kept"),
    [
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 3], 1),
        ([1, 2], [2, 1], 0),
        ([1, 2, 3], [1, 9, 3], 1),
        ([], [1], 0),
        ([1], [1], 1),
    ],
)
def test_a_stopped_ingest_goes_on_as_far_as_it_made_the_same(
    tmp_path: Path, first: list[int], then: list[int], kept: int
) -> None:
    write(tmp_path / "cache", first, finish=False)
    assert not (tmp_path / "cache").exists()
    assert write(tmp_path / "cache", then) == kept
    write(tmp_path / "fresh" / "cache", then)
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh" / "cache")
    assert values(tmp_path / "cache") == [n for n in then for _ in range(2)]


@pytest.mark.parametrize("name", [JOURNAL, *ARRAYS])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.7, 0.99, 1])
def test_a_stop_at_any_byte_loses_the_last_parts_at_most(tmp_path: Path, name: str, share: float) -> None:
    """What is missing in one of the files is made again; nothing half is taken."""
    write(tmp_path / "cache", [1, 2, 3], finish=False)
    path = tmp_path / "cache.partial" / name
    content = path.read_bytes()
    left = content[: int(share * len(content))]
    path.write_bytes(left)
    part_bytes = 2 * SIDE_PX**2 * ARRAYS[name].itemsize if name in ARRAYS else 1
    whole = left.count(b"\n") if name == JOURNAL else max(0, len(left) - 128) // part_bytes
    assert write(tmp_path / "cache", [1, 2, 3, 4]) == whole
    assert values(tmp_path / "cache") == [1, 1, 2, 2, 3, 3, 4, 4]
    write(tmp_path / "fresh" / "cache", [1, 2, 3, 4])
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh" / "cache")


@pytest.mark.parametrize("name", [JOURNAL, *ARRAYS])
def test_a_missing_file_of_a_stopped_ingest(tmp_path: Path, name: str) -> None:
    write(tmp_path / "cache", [1, 2], finish=False)
    (tmp_path / "cache.partial" / name).unlink()
    assert write(tmp_path / "cache", [1, 2]) == 0
    assert values(tmp_path / "cache") == [1, 1, 2, 2]


def test_more_in_the_arrays_than_in_the_journal_is_cut_off(tmp_path: Path) -> None:
    write(tmp_path / "cache", [1, 2], finish=False)
    for name in ARRAYS:
        with open(tmp_path / "cache.partial" / name, "ab") as file:
            file.write(b"half a picture")
    assert write(tmp_path / "cache", [1, 2, 3]) == 2
    assert values(tmp_path / "cache") == [1, 1, 2, 2, 3, 3]


def test_parts_without_slices_are_kept_with_their_reason(tmp_path: Path) -> None:
    write(tmp_path / "cache", [1], finish=False, slices=0)
    assert write(tmp_path / "cache", [1, 2]) == 1
    parts = read_journal(tmp_path / "cache")
    assert [len(p.rows) for p in parts] == [0, 2]
    assert parts[0].faults == (Fault("file 1", "torn"),)
    assert values(tmp_path / "cache") == [2, 2]


# Taking the old cache's place


def states(tmp_path: Path) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """A cache in place, another one finished beside it, and the bytes of both."""
    cache = tmp_path / "cache"
    write(tmp_path / "new" / "cache", [5])
    write(cache, [1, 2])
    shutil.copytree(tmp_path / "new" / "cache", tmp_path / "cache.partial")
    return cache, contents(cache), contents(tmp_path / "new" / "cache")


def test_a_finished_cache_takes_the_old_ones_place(tmp_path: Path) -> None:
    cache, _, new = states(tmp_path)
    assert swap_in(cache)
    assert contents(cache) == new
    assert not swap_in(cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "new"]


def test_a_stop_before_the_first_rename(tmp_path: Path) -> None:
    cache, old, new = states(tmp_path)
    assert contents(cache) == old
    assert values(cache) == [1, 1, 2, 2]
    assert swap_in(cache)
    assert contents(cache) == new


def test_a_stop_between_the_two_renames(tmp_path: Path) -> None:
    cache, _, new = states(tmp_path)
    cache.rename(tmp_path / "cache.old")
    with pytest.raises(CacheError, match="no slice cache"):
        read_cache(cache)
    assert swap_in(cache)
    assert contents(cache) == new
    assert not (tmp_path / "cache.old").exists()


def test_a_stop_after_the_second_rename(tmp_path: Path) -> None:
    cache, _, new = states(tmp_path)
    cache.rename(tmp_path / "cache.old")
    (tmp_path / "cache.partial").rename(cache)
    assert not swap_in(cache)
    remove_leftovers(cache)
    assert contents(cache) == new
    assert not (tmp_path / "cache.old").exists()


def test_a_stop_while_the_old_cache_is_deleted(tmp_path: Path) -> None:
    cache, _, new = states(tmp_path)
    shutil.copytree(cache, tmp_path / "cache.old")
    (tmp_path / "cache.old" / HEAD).unlink()
    assert swap_in(cache)
    assert contents(cache) == new
    assert not (tmp_path / "cache.old").exists()


@pytest.mark.parametrize("name", [HEAD, "index.csv", *ARRAYS])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_cache_that_is_not_whole_takes_nobodys_place(tmp_path: Path, name: str, damage: str) -> None:
    cache, old, _ = states(tmp_path)
    path = tmp_path / "cache.partial" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    assert not swap_in(cache)
    assert contents(cache) == old
    assert not (tmp_path / "cache.partial" / HEAD).exists()


def test_only_slice_caches_are_deleted(tmp_path: Path) -> None:
    cache, _, _ = states(tmp_path)
    assert strangers(cache) == strangers(tmp_path / "nothing") == []
    (cache / "thesis.docx").write_text("all of it")
    (cache / "photos").mkdir()
    assert strangers(cache) == ["photos", "thesis.docx"]
    remove(cache)
    assert (cache / "thesis.docx").read_text() == "all of it"
    remove(tmp_path / "cache.partial")
    assert not (tmp_path / "cache.partial").exists()
    remove(tmp_path / "nothing")
