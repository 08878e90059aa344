from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from client.ingest import scan as scan_module
from client.ingest.ingest import IngestError, ingest
from client.ingest.store import read_journal
from shared.host.processes import is_alive
from shared.site import read_site
from shared.slices import CacheError, read_cache
from tests.support.small_sites import (
    CLIENT,
    ROOT,
    answer_of,
    contents,
    counted,
    fresh,
    make_site,
    patients,
    refusal,
    write_images,
)


def die_at(file: Path, what: str, done: int) -> list[int]:
    """An ingest in a process of its own that is killed when progress is there; returns its workers."""

    def work(sender: Connection) -> None:
        def progress(now: str, count: int, total: int) -> None:
            if (now, count) == (what, done):
                sender.send([child.pid for child in multiprocessing.active_children()])
                os.kill(os.getpid(), signal.SIGKILL)

        ingest(read_site(file), 2, progress)

    workers, status = answer_of(work)
    assert status == -signal.SIGKILL
    return workers


@pytest.fixture
def eight_patients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, bytes]]:
    """A hospital whose files are read four at a time, without a cache, and the cache of an undisturbed ingest."""
    monkeypatch.setattr(scan_module, "_CHUNK", 4)
    file = make_site(tmp_path, patients(*range(1, 9)))
    whole = fresh(file)
    shutil.rmtree(tmp_path / "cache")
    return file, whole


@pytest.mark.parametrize(
    ("what", "done", "headers", "series"),
    [("headers", 4, 12, 8), ("headers", 12, 4, 8), ("headers", 16, 0, 8), ("series", 1, 0, 7), ("series", 5, 0, 3)],
)
def test_an_ingest_that_was_killed_goes_on(
    eight_patients: tuple[Path, dict[str, bytes]], what: str, done: int, headers: int, series: int
) -> None:
    file, whole = eight_patients
    die_at(file, what, done)
    cache = file.parent / "cache"
    with pytest.raises(CacheError, match="no slice cache"):
        read_cache(cache)
    assert counted(file, 2) == (headers, series, whole)
    assert not (file.parent / "cache.partial").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_no_worker_outlives_an_ingest_that_was_killed(eight_patients: tuple[Path, dict[str, bytes]]) -> None:
    workers = die_at(eight_patients[0], "series", 2)
    assert len(workers) == 2
    for _ in range(500):
        if not any(map(is_alive, workers)):
            return
        time.sleep(0.01)
    pytest.fail("workers go on without their parent")


def test_ingests_killed_again_and_again_come_to_the_same_end(eight_patients: tuple[Path, dict[str, bytes]]) -> None:
    file, whole = eight_patients
    for what, done in (("headers", 8), ("headers", 4), ("series", 2), ("series", 5), ("series", 6)):
        die_at(file, what, done)
    assert counted(file) == (0, 2, whole)


def test_an_ingest_that_was_killed_leaves_the_old_cache(eight_patients: tuple[Path, dict[str, bytes]]) -> None:
    file, _ = eight_patients
    old = fresh(file)
    for n in (2, 3, 4):
        os.utime(file.parent / "dicom" / f"p{n}" / "1", ns=(n, n))
    write_images(file.parent / "dicom", patients(9))
    die_at(file, "series", 6)  # five are in the old cache: whatever the order of pseudonyms, one of six had to be read
    assert contents(file.parent / "cache") == old
    read_cache(file.parent / "cache")
    headers, series, after = counted(file)
    assert headers == 0
    assert series < 4
    assert after == fresh(file)


def test_a_stop_between_the_renames_is_ended_by_the_next_ingest(eight_patients: tuple[Path, dict[str, bytes]]) -> None:
    """As a kill between os.replace(cache, old) and os.replace(partial, cache) leaves it."""
    file, _ = eight_patients
    root = file.parent
    fresh(file)
    shutil.copytree(root / "cache", root / "cache.old")
    (root / "dicom" / "p1" / "1").unlink()
    new = counted(file)[2]
    (root / "cache").rename(root / "cache.partial")
    with pytest.raises(CacheError, match="no slice cache"):
        read_cache(root / "cache")
    report = ingest(read_site(file), workers=1)
    assert report.unchanged
    assert contents(root / "cache") == new
    assert {path.name for path in root.iterdir()} == {"cache", "dicom", "site.yaml", "state"}


def test_a_killed_ingest_of_what_is_no_longer_there_is_forgotten(
    eight_patients: tuple[Path, dict[str, bytes]],
) -> None:
    file, whole = eight_patients
    fresh(file)
    write_images(file.parent / "dicom", patients(9))
    die_at(file, "series", 3)
    shutil.rmtree(file.parent / "dicom" / "p9")
    assert ingest(read_site(file), workers=1).unchanged
    assert contents(file.parent / "cache") == whole
    assert not (file.parent / "cache.partial").exists()


def test_the_command_can_be_killed_and_goes_on(eight_patients: tuple[Path, dict[str, bytes]]) -> None:
    file, _ = eight_patients
    write_images(file.parent / "dicom", patients(*range(10, 160)))
    whole = fresh(file)
    shutil.rmtree(file.parent / "cache")
    unfinished = file.parent / "cache.partial"
    with subprocess.Popen(
        [*CLIENT, "ingest", str(file), "--workers", "2"], cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and len(read_journal(unfinished)) < 3:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
    there = len(read_journal(unfinished))
    assert there >= 3
    headers, series, after = counted(file, 2)
    assert (headers, series) == (0, 158 - there)
    assert after == whole


def test_a_full_disk_is_a_clear_error_and_no_broken_cache(eight_patients: tuple[Path, dict[str, bytes]]) -> None:
    def work(limit: int, sender: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            ingest(read_site(file), 2)
        except IngestError as error:
            sender.send(str(error))

    file, whole = eight_patients
    for limit in (500, 5_000, 250_000, 1_000_000):  # in the records, in the journal or arrays
        text, _ = answer_of(partial(work, limit))
        assert "stopped by the system (File too large)" in text
        assert "make room" in text
        assert not (file.parent / "cache").exists()
    there = len(read_journal(file.parent / "cache.partial"))
    assert there > 0
    assert counted(file) == (0, 8 - there, whole)


def test_a_state_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    (tmp_path / "state").write_text("a file in its place")
    text = refusal(file)
    assert "stopped by the system (" in text
    assert "give permission to write cache and state" in text
