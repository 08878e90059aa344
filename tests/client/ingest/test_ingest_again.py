from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from client.ingest import scan as scan_module
from client.ingest.ingest import ingest
from shared.site import read_site
from tests.conftest import edit_site
from tests.support.small_sites import (
    HEADER,
    answer_of,
    counted,
    draw,
    edit_data,
    file_code,
    fresh,
    ingested,
    make_site,
    patients,
    tiny_head,
    write_images,
)


def test_an_unchanged_ingest_costs_a_walk(tmp_path: Path) -> None:
    """No file of the hospital's is opened and no process started; a hook of the interpreter watches."""

    def watched(sender: Connection) -> None:
        seen: list[tuple[str, str]] = []
        sys.addaudithook(lambda event, args: seen.append((event, str(args[0]) if args else "")))
        report = ingest(site, 2, lambda *progress: seen.append(("progress", "")))
        opened = [path for event, path in seen if event == "open" and ("/dicom/" in path or "/masks/" in path)]
        started = [event for event, _ in seen if event in ("os.fork", "os.posix_spawn", "subprocess.Popen")]
        sender.send((report, opened, started, ("progress", "") in seen))

    file = make_site(tmp_path, patients(1, 2), data={"masks": "masks", "segment": 1})
    draw(tmp_path / "masks", "1.2.826.1.1.1")
    (tmp_path / "dicom" / "letter").write_text("Dear")
    site = read_site(file)
    first = ingest(site, workers=1)
    times = {path: path.stat().st_mtime_ns for path in site.cache.iterdir()}
    results = []
    for _ in range(2):
        answer, _ = answer_of(watched)
        results.append((*answer, {path: path.stat().st_mtime_ns for path in site.cache.iterdir()} == times))
        os.utime(tmp_path / "dicom" / "letter")
    assert results[0] == (replace(first, read=0, unchanged=True), [], [], False, True)
    assert results[1][2] != [], "the hook sees what it looks for"
    assert results[1][3:] == (True, False)
    assert len(first.faults) == 1


def _add_image(root: Path) -> None:
    write_images(root / "dicom", {"p1/3": patients(1, slices=3)["p1/3"]})


def _drop_image(root: Path) -> None:
    (root / "dicom" / "p1" / "1").unlink()


def _touch_image(root: Path) -> None:
    os.utime(root / "dicom" / "p1" / "1", ns=(1, 1))


def _other_pixels(root: Path) -> None:
    write_images(root / "dicom", {"p1/1": patients(1)["p1/1"] | {"hu_YX": tiny_head(77)}})


def _add_patient(root: Path) -> None:
    write_images(root / "dicom", patients(5))


def _drop_patient(root: Path) -> None:
    shutil.rmtree(root / "dicom" / "p2")


def _move_patient(root: Path) -> None:
    (root / "dicom" / "p2").rename(root / "dicom" / "elsewhere")


def _add_letter(root: Path) -> None:
    (root / "dicom" / "letter").write_text("Dear")


def _relabel(root: Path) -> None:
    (root / "labels.csv").write_text(HEADER + "1.2.826.1.1,1.2.826.1.1.1,0\n")


def _no_labels(root: Path) -> None:
    edit_data(root / "site.yaml", labels=None)


def _other_mask(root: Path) -> None:
    draw(root / "masks", "1.2.826.1.1.1", value=2)


def _add_mask(root: Path) -> None:
    draw(root / "masks", "1.2.826.1.2.1")


def _drop_mask(root: Path) -> None:
    (root / "masks" / "1.2.826.1.1.1.png").unlink()


def _other_segment(root: Path) -> None:
    edit_data(root / "site.yaml", segment=2)


def _accept_lossy(root: Path) -> None:
    edit_data(root / "site.yaml", accept_lossy=True)


def _other_role(root: Path) -> None:
    edit_site(root / "site.yaml", role="held-out")


CHANGES = [
    (_add_image, 1, 1),
    (_drop_image, 0, 1),
    (_touch_image, 1, 1),
    (_other_pixels, 1, 1),
    (_add_patient, 2, 1),
    (_drop_patient, 0, 0),
    (_move_patient, 2, 1),
    (_add_letter, 1, 0),
    (_relabel, 0, 0),
    (_no_labels, 0, 0),
    (_other_mask, 1, 1),
    (_add_mask, 1, 1),
    (_drop_mask, 0, 1),
    (_other_segment, 0, 1),
    (_accept_lossy, 2, 1),  # the two images that had been left out
    (_other_role, 0, 0),
]


def changing_site(root: Path) -> Path:
    """Four patients, one labelled and with a mask, one lossy."""
    images = patients(1, 2, 3, 4)
    for name in ("p4/1", "p4/2"):
        images[name] |= {"LossyImageCompression": "01"}
    table = HEADER + "1.2.826.1.1,1.2.826.1.1.1,1\n1.2.826.1.3,1.2.826.1.3.1,0\n"
    file = make_site(root, images, labels=table, data={"masks": "masks", "segment": 1})
    draw(root / "masks", "1.2.826.1.1.1")
    return file


@pytest.mark.parametrize(("change", "headers", "series"), CHANGES)
def test_only_what_changed_is_read_and_the_cache_is_that_of_a_fresh_ingest(
    tmp_path: Path, change: Callable[[Path], None], headers: int, series: int
) -> None:
    file = changing_site(tmp_path)
    read, parts, before = counted(file)
    assert (read, parts) == (9, 3)
    change(tmp_path)
    read, parts, after = counted(file)
    assert (read, parts) == (headers, series)
    assert after != before
    assert after == fresh(file)
    assert ingest(read_site(file), workers=1).unchanged


def test_changes_that_are_undone_leave_no_trace(tmp_path: Path) -> None:
    file = changing_site(tmp_path)
    edit_data(file, accept_lossy=True)
    before = counted(file)[2]
    edit_data(file, accept_lossy=False)
    assert counted(file)[:2] == (2, 0)
    edit_data(file, accept_lossy=True, segment=2)
    assert counted(file)[:2] == (2, 2)
    edit_data(file, segment=1)
    assert counted(file) == (0, 1, before)


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    file = changing_site(tmp_path)
    before, _ = ingested(file)
    hu, names = np.array(before.hu), before.patient.tolist()
    for path in (tmp_path / "dicom").rglob("*"):  # same size and time, other content: only a reader would notice
        if path.is_file():
            stat = path.stat()
            path.write_bytes(b"\0" * stat.st_size)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write_images(tmp_path / "dicom", patients(5))
    after, report = ingested(file)
    assert (report.read, report.slices) == (1, 8)
    old = [i for i, name in enumerate(after.patient) if name in names]
    np.testing.assert_array_equal(after.hu[old], hu)


def test_a_change_of_role_is_noticed(tmp_path: Path) -> None:
    file = make_site(tmp_path, patients(1, 2, 3, 4, 5, slices=1))
    assert set(ingested(file)[0].split) == {"train", "val", "test"}
    edit_site(file, role="held-out")
    assert set(ingested(file)[0].split) == {"test"}


def test_faults_are_shown_again(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    (tmp_path / "dicom" / "letter").write_text("Dear")
    for _ in range(3):
        report = ingest(read_site(file), workers=1)
        assert [fault.what for fault in report.faults] == [file_code(read_site(file), "images/letter")]
        edit_site(file, policy={"min_patients": 11})
    assert report.unchanged


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in ("slices.npy", "masks.npy", "index.csv", "cache.json") for d in ("gone", "cut")]
    + [("cache.json", "other")],
)
def test_a_damaged_cache_is_written_anew(tmp_path: Path, name: str, damage: str) -> None:
    file = make_site(tmp_path)
    whole = counted(file)[2]
    path = tmp_path / "cache" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30] if damage == "cut" else b"[]")
    assert counted(file) == (0, 1, whole)


@pytest.mark.parametrize("name", ["parts.jsonl", "files.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_what_an_ingest_remembers_may_be_lost(tmp_path: Path, name: str, damage: str) -> None:
    file = make_site(tmp_path, patients(1, 2))
    ingest(read_site(file), workers=1)
    path = tmp_path / "cache" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    write_images(tmp_path / "dicom", patients(3))
    after = counted(file)[2]
    assert after == fresh(file)


def test_progress_counts_every_series(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    file = make_site(tmp_path, patients(1, 2, 3, slices=1))
    ingest(read_site(file), 1, lambda *progress: calls.append(progress))
    assert calls == [("headers", 3, 3), ("series", 1, 3), ("series", 2, 3), ("series", 3, 3)]


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_CHUNK", 3)
    file = changing_site(tmp_path)
    write_images(tmp_path / "dicom", patients(*range(5, 12)))
    bad_files_of_all_places(tmp_path)
    found = []
    for workers in (1, 2, 4):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        found.append(counted(file, workers)[2])
    assert found[0] == found[1] == found[2]


def bad_files_of_all_places(root: Path) -> None:
    (root / "dicom" / "p5" / "1").write_bytes(b"torn")
    (root / "dicom" / "letter").write_text("Dear")
    (root / "masks" / "letter").write_text("Dear")


def test_an_ingest_moves_no_time_and_no_byte_of_the_hospitals_files(tmp_path: Path) -> None:
    file = changing_site(tmp_path)

    def seen() -> dict[str, tuple[bytes, int]]:
        paths = [
            p
            for place in ("dicom", "masks", "labels.csv", "site.yaml")
            for p in (tmp_path / place, *(tmp_path / place).rglob("*"))
        ]
        return {str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns) for p in paths}

    before = seen()
    ingest(read_site(file), workers=2)
    assert seen() == before
