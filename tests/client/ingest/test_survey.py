from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.dicom.pseudonyms import Pseudonyms
from client.ingest import read_series as reading
from client.ingest import survey as survey_module
from client.ingest.read_series import CachedSeries
from client.ingest.scan import walk
from client.ingest.survey import Survey, fingerprints, read_parts, survey
from client.ingest.workers import ENDED_ITS_READER, WorkerPool
from client.masks import match as masks
from shared.site import Site, read_site
from tests.support.small_sites import (
    SERIES,
    SIDE,
    edit_data,
    file_code,
    make_site,
    patients,
    series_name,
    three,
    write_images,
)

BONE = "1.2.826.2"
HEADER = "series_uid,sop_uid,hypodensity\n"


def look(file: Path) -> Survey:
    site = read_site(file)
    with WorkerPool(1) as crew:
        return survey(
            site, Pseudonyms(site.key()), walk(site, Pseudonyms(site.key())), {}, crew, lambda what, done, total: None
        )


def draw(folder: Path, sop: str, area_YX: np.ndarray | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    mask_YX = np.zeros((SIDE, SIDE), np.uint8)
    mask_YX[20:24, 20:24] = 1
    path = folder / f"{sop}.png"
    Image.fromarray(mask_YX if area_YX is None else area_YX).save(path)
    return path


def taken(found: Survey, site: Site, *uids: str) -> bool:
    return {f"series {one.name}" for one in found.series()} == {series_name(site, uid) for uid in uids}


# Which series


@pytest.fixture
def two_kernels(tmp_path: Path) -> Path:
    """One study in a brain kernel and in a bone kernel, a folder for masks and a table without a line."""
    bone = three(BONE, ConvolutionKernel="BONE")
    images = three(ConvolutionKernel="STANDARD") | {f"bone-{name}": settings for name, settings in bone.items()}
    return make_site(tmp_path, images, labels=HEADER, data={"masks": "masks"})


@pytest.mark.parametrize(
    ("labelled", "drawn", "expected", "reason"),
    [
        ((), (), (SERIES,), "best of 2: original, kernel STANDARD (soft), 3 slices every 5.0 mm"),
        ((BONE,), (), (BONE,), "has labels"),
        ((), (BONE,), (BONE,), "has masks"),
        ((BONE,), (BONE,), (BONE,), "has labels and masks"),
        ((SERIES,), (BONE,), (SERIES, BONE), "has labels"),
        ((SERIES, BONE), (), (SERIES, BONE), "has labels"),
    ],
)
def test_labels_and_masks_decide_which_series_of_a_study_is_taken(
    two_kernels: Path, labelled: tuple, drawn: tuple, expected: tuple, reason: str
) -> None:
    root = two_kernels.parent
    (root / "labels.csv").write_text(HEADER + "".join(f"{uid},{uid}.1,1\n" for uid in labelled))
    for uid in drawn:
        draw(root / "masks", f"{uid}.2")
    found = look(two_kernels)
    assert taken(found, read_site(two_kernels), *expected)
    (choice,) = found.choices
    assert choice.reason == reason
    assert {job.series.name: len(job.masks) for job in found.jobs} == {
        job.series.name: int(any(f"series {job.series.name}" == series_name(read_site(two_kernels), u) for u in drawn))
        for job in found.jobs
    }
    assert [f.reason.partition(":")[0] for f in found.faults] == ["not chosen"] * (2 - len(expected))


def test_one_series_of_every_study_in_order_of_their_names(tmp_path: Path) -> None:
    file = make_site(tmp_path, patients(1, 2, 3))
    names = [one.name for one in look(file).series()]
    assert len(names) == 3
    assert names == sorted(names)


# What a part depends on


def prints(file: Path) -> dict[str, str]:
    found = look(file)
    return {job.series.name: name for job, name in zip(found.jobs, fingerprints(found), strict=True)}


def _touch_image(file: Path) -> None:
    os.utime(file.parent / "dicom" / "p1" / "1", ns=(1, 1))


def _add_image(file: Path) -> None:
    extra = patients(1, slices=3)["p1/3"]
    write_images(file.parent / "dicom", {"p1/3": extra})


def _drop_image(file: Path) -> None:
    (file.parent / "dicom" / "p1" / "1").unlink()


def _move_image(file: Path) -> None:
    (file.parent / "dicom" / "p1" / "1").rename(file.parent / "dicom" / "elsewhere")


def _touch_mask(file: Path) -> None:
    os.utime(file.parent / "masks" / "1.2.826.1.1.1.png", ns=(1, 1))


def _add_mask(file: Path) -> None:
    draw(file.parent / "masks", "1.2.826.1.1.2")


def _drop_mask(file: Path) -> None:
    (file.parent / "masks" / "1.2.826.1.1.1.png").unlink()


def _other_segment(file: Path) -> None:
    edit_data(file, segment=2)


def _label(file: Path) -> None:
    (file.parent / "labels.csv").write_text(HEADER + "1.2.826.1.1,1.2.826.1.1.1,0\n")


def _letter(file: Path) -> None:
    (file.parent / "dicom" / "letter").write_text("Dear")


def _lossy(file: Path) -> None:
    edit_data(file, accept_lossy=True)


CHANGES = [_touch_image, _add_image, _drop_image, _move_image, _touch_mask, _add_mask, _drop_mask, _other_segment]


@pytest.mark.parametrize(
    ("change", "expected"), [*((c, {"1"}) for c in CHANGES), *((c, set()) for c in (_label, _letter, _lossy))]
)
def test_a_fingerprint_changes_with_what_its_part_depends_on_and_nothing_else(
    tmp_path: Path, change: Callable[[Path], None], expected: set[str]
) -> None:
    table = HEADER + "1.2.826.1.1,1.2.826.1.1.1,1\n1.2.826.1.2,1.2.826.1.2.1,1\n"
    file = make_site(tmp_path, patients(1, 2), labels=table, data={"masks": "masks"})
    draw(tmp_path / "masks", "1.2.826.1.1.1")
    before = prints(file)
    assert prints(file) == before
    change(file)
    after = prints(file)
    site = read_site(file)
    changed = {n for n in "12" if before[name := series_name(site, f"1.2.826.1.{n}")[7:]] != after[name]}
    assert changed == expected


@pytest.mark.parametrize("version", ["READER_VERSION", "PART_VERSION"])
def test_another_version_of_the_program_makes_every_part_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    file = make_site(tmp_path, patients(1, 2))
    before = prints(file)
    monkeypatch.setattr(survey_module, version, 1000)
    assert not set(before.values()) & set(prints(file).values())


# Files that end their reader


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """File name -> what reading its pixels, or a mask, does to the worker: "die", "spin" or "fail"."""
    mischief: dict[str, str] = {}

    def trapped(read: Callable) -> Callable:
        def reader(one: object, *others: object) -> object:
            what = mischief.get(one.path.name)
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            while what == "spin":
                pass
            return read(one, *others)

        return reader

    monkeypatch.setattr(reading, "read_hu", trapped(reading.read_hu))
    monkeypatch.setattr(masks, "_read", trapped(masks._read))
    monkeypatch.setattr("client.ingest.workers.PATIENCE_S", 0.1)
    return mischief


def parts_of(file: Path, workers: int = 1) -> list[CachedSeries]:
    found = look(file)
    with WorkerPool(workers) as crew:
        return list(read_parts(list(found.jobs), crew))


@pytest.mark.parametrize("mischief", ["die", "spin"])
def test_an_image_that_ends_its_reader_is_the_only_one_left_out(
    tmp_path: Path, traps: dict[str, str], mischief: str
) -> None:
    file = make_site(tmp_path, three() | patients(1, 2), data={"masks": "masks"})
    draw(tmp_path / "masks", f"{SERIES}.1")
    good = {part.series: part for part in parts_of(file)}
    traps["7"] = mischief
    bad = {part.series: part for part in parts_of(file, workers=2)}
    assert bad.keys() == good.keys()
    name = series_name(read_site(file))[7:]
    part, whole = bad.pop(name), good.pop(name)
    np.testing.assert_array_equal(part.hu, whole.hu[[0, 2]])
    np.testing.assert_array_equal(part.masks, whole.masks[[0, 2]])
    assert [(f.what, f.reason) for f in part.faults] == [(file_code(read_site(file), "images/7"), ENDED_ITS_READER)]
    assert bad == good
    for other, expected in good.items():
        np.testing.assert_array_equal(bad[other].hu, expected.hu)


def test_several_images_that_end_their_reader(tmp_path: Path, traps: dict[str, str]) -> None:
    file = make_site(tmp_path)
    traps |= {"8": "die", "6": "die"}
    (part,) = parts_of(file)
    assert [row.z_mm for row in part.rows] == [10]
    assert [f.what for f in part.faults] == [file_code(read_site(file), f"images/{n}") for n in "86"]


def test_a_series_of_which_every_image_ends_its_reader(tmp_path: Path, traps: dict[str, str]) -> None:
    file = make_site(tmp_path)
    traps |= dict.fromkeys("678", "die")
    (part,) = parts_of(file)
    assert (part.rows, len(part.hu)) == ((), 0)
    assert part.faults[-1].what == series_name(read_site(file))
    assert part.faults[-1].reason == f"{ENDED_ITS_READER}; its 3 images and masks are left out"


@pytest.mark.parametrize("images", [(), ("7",)])
def test_a_mask_that_ends_its_reader_costs_no_image(tmp_path: Path, traps: dict[str, str], images: tuple) -> None:
    file = make_site(tmp_path, data={"masks": "masks"})
    mask = draw(tmp_path / "masks", f"{SERIES}.1")
    traps |= dict.fromkeys((*images, mask.name), "die")
    (part,) = parts_of(file)
    assert len(part.rows) == 3 - len(images)
    assert not part.masks.any()
    site = read_site(file)
    expected = [*(file_code(site, f"images/{n}") for n in images), file_code(site, f"masks/{mask.name}")]
    assert [(f.what, f.reason) for f in part.faults] == [(what, ENDED_ITS_READER) for what in expected]


def test_parts_come_in_the_order_of_their_jobs(tmp_path: Path) -> None:
    file = make_site(tmp_path, patients(*range(1, 9), slices=1))
    found = look(file)
    jobs = [replace(job) for job in reversed(found.jobs)]
    with WorkerPool(2) as crew:
        assert [part.series for part in read_parts(jobs, crew)] == [job.series.name for job in jobs]
