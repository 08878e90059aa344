from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ImplicitVRLittleEndian, RLELossless
from scipy import ndimage

from client import scan as scan_module
from client.ingest import IngestError, ingest
from client.store import FILES, read_journal
from shared.site import read_site
from shared.slices import CacheError, read_cache
from tests.conftest import SmallHospitals, edit_site
from tests.dicom_files import ct_dataset
from tests.small_sites import (
    CLIENT,
    ROOT,
    SERIES,
    SIDE,
    SPACING_MM,
    answer_of,
    contents,
    edit_data,
    file_code,
    in_process,
    index,
    ingested,
    make_site,
    patients,
    three,
    tiny_head,
    write_images,
    write_multi_frame,
)

HEADER = "series_uid,sop_uid,hypodensity\n"


def draw(folder: Path, sop: str, value: int = 1) -> None:
    """A mask file with two segments: a square of `value`, a smaller one of the next number."""
    folder.mkdir(exist_ok=True)
    mask_YX = np.zeros((SIDE, SIDE), np.uint8)
    mask_YX[18:24, 18:24], mask_YX[28:30, 28:30] = value, value + 1
    Image.fromarray(mask_YX).save(folder / f"{sop}.png")


def counted(file: Path, workers: int = 1) -> tuple[int, int, dict[str, bytes]]:
    """An ingest: headers and series that it read, and the cache's bytes."""
    headers: list[int] = [0]
    site = read_site(file)
    report = ingest(site, workers, lambda what, done, total: headers.append(total) if what == "headers" else None)
    return headers[-1], report.read, contents(site.cache)


def fresh(file: Path) -> dict[str, bytes]:
    """The bytes of the cache that an ingest from nothing makes of the folder as it is; the state is kept."""
    site = read_site(file)
    shutil.rmtree(site.cache, ignore_errors=True)
    ingest(site, workers=1)
    return contents(site.cache)


def refusal(file: Path) -> str:
    with pytest.raises(IngestError) as caught:
        ingest(read_site(file), workers=1)
    return str(caught.value)


# What is there and what is not


def test_masks_of_real_series_lie_on_the_clot(hospitals: SmallHospitals) -> None:
    cache = hospitals.cache("hospital-02")  # another field of view than 224 mm
    rows = np.nonzero(cache.masks.any(axis=(1, 2)))[0]
    assert len(rows) > 10
    area_mm2 = 0.0
    for path in hospitals.site("hospital-02").masks.iterdir():
        area_mm2 += pydicom.dcmread(path).pixel_array.sum() * (245 / 512) ** 2
    assert cache.masks.sum() == pytest.approx(area_mm2, rel=0.01)  # 1 mm per pixel
    for row in rows:
        mask_YX = cache.masks[row].astype(bool)
        if mask_YX.sum() > 300:
            ring_YX = ndimage.binary_dilation(mask_YX, iterations=6) & ~ndimage.binary_dilation(mask_YX, iterations=2)
            soft_YX = ring_YX & (np.abs(cache.hu[row] - 40) < 60)
            assert cache.hu[row][mask_YX].mean() > cache.hu[row][soft_YX].mean() + 5


def test_a_report_counts_what_is_in_the_cache(tmp_path: Path) -> None:
    table = HEADER + "1.2.826.1.1,1.2.826.1.1.1,1\n1.2.826.1.2,1.2.826.1.2.2,0\n"
    file = make_site(tmp_path, patients(1, 2, 3), labels=table, data={"masks": "masks", "segment": 1})
    draw(tmp_path / "masks", "1.2.826.1.1.1")
    cache, report = ingested(file)
    assert (report.slices, report.patients, report.series) == (6, 3, 3)
    assert (report.positives, report.unlabelled, report.masked) == (1, 4, 1)
    assert (report.files, report.read, report.faults, report.unchanged) == (7, 3, (), False)
    assert cache.counts() == {"patients": 3, "slices": 6, "positives": 1}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == FILES - {n for n in FILES if "partial" in n}


def test_a_hospital_without_ct_says_what_is_there(tmp_path: Path) -> None:
    file = make_site(tmp_path, {"a": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}})
    (tmp_path / "dicom" / "letter").write_text("Dear")
    text = refusal(file)
    assert "no usable CT series" in text
    assert "2 files" in text
    assert "1x a localizer" in text
    assert not (tmp_path / "cache").exists()


def test_a_multi_frame_file_among_single_images(tmp_path: Path) -> None:
    file = make_site(tmp_path, patients(1))
    write_multi_frame(tmp_path / "dicom" / "frames", 4, StudyInstanceUID="1.2.77", patient="other")
    cache, report = ingested(file)
    assert (report.slices, report.series, report.patients, report.faults) == (6, 2, 2, ())
    rows = [i for i, row in enumerate(index(read_site(file))) if row["patient"] != cache.patient[-1]]
    frames = max((rows, [i for i in range(6) if i not in rows]), key=len)
    assert cache.hu[frames][:, 112, 112].tolist() == [30, 31, 32, 33]
    assert [float(index(read_site(file))[i]["z_mm"]) for i in frames] == [5, 10, 15, 20]


def test_two_series_of_one_patient_share_hash_and_split(tmp_path: Path) -> None:
    images = {
        str(n): {
            "series": f"1.2.{n}",
            "sop": f"1.2.9.{n}",
            "StudyInstanceUID": f"1.2.8.{n}",
            "patient": "same" if n < 4 else "other",
        }
        for n in range(1, 5)
    }
    cache, report = ingested(make_site(tmp_path, images))
    assert (report.patients, report.series) == (2, 4)
    names, counts = np.unique(cache.patient, return_counts=True)
    assert sorted(counts) == [1, 3]
    assert len(set(cache.split[cache.patient == names[np.argmax(counts)]])) == 1


def test_another_key_gives_other_hashes(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    site = read_site(file)
    ingest(site, workers=1)
    before = index(site)
    (tmp_path / "state" / "key").write_bytes(b"k" * 32)
    assert not ingest(site, workers=1).unchanged
    after = index(site)
    for column in ("patient", "series"):
        assert {row[column] for row in before}.isdisjoint({row[column] for row in after})


def test_one_split_per_patient_and_all_three_occur(hospitals: SmallHospitals) -> None:
    found = set()
    for name in ("hospital-01", "hospital-02"):
        cache = hospitals.cache(name)
        splits = {patient: set(cache.split[cache.patient == patient]) for patient in np.unique(cache.patient)}
        assert len(splits) == 10
        assert all(len(one) == 1 for one in splits.values())
        found |= set(cache.split)
    assert found == {"train", "val", "test"}


def test_splits_outlive_the_cache_and_new_patients(tmp_path: Path) -> None:
    file = make_site(tmp_path, patients(*range(1, 9), slices=1))
    before, _ = ingested(file)
    kept = json.loads((tmp_path / "state" / "splits.json").read_text())
    assert dict(zip(before.patient.tolist(), before.split.tolist(), strict=True)) == kept
    shutil.rmtree(tmp_path / "cache")
    write_images(tmp_path / "dicom", patients(*range(9, 14), slices=1))
    after, _ = ingested(file)
    later = dict(zip(after.patient.tolist(), after.split.tolist(), strict=True))
    assert len(later) == 13
    assert {patient: later[patient] for patient in kept} == kept


# Bad files


def bad_files(folder: Path) -> dict[str, str]:
    """One file of each kind among good ones: name -> what its line in the report says."""
    good = (folder / "8").read_bytes()
    made: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "an empty file"),
        "letter": (b"Dear colleague,", "not a DICOM file (no 'DICM' prefix)"),
        "no preamble": (good[132:], "not a DICOM file (no 'DICM' prefix)"),
        "cut in the header": (
            good[: good.index(b"\x20\x00\x37\x00") + 20],
            "SamplesPerPixel",
        ),
        "cut before the pixels": (
            good[: good.index(b"\xe0\x7f\x10\x00")],
            "no Pixel Data after the header: cut, or damaged",
        ),
        "cut in the pixels": (good[:-100], f"cut: {2 * SIDE * SIDE - 100} bytes of pixels, expected {2 * SIDE * SIDE}"),
        "only a preamble": (good[:132], "no SOP class, expected CT Image Storage"),
    }
    reasons = {}
    for name, (content, reason) in made.items():
        (folder / name).write_bytes(content)
        reasons[name] = reason

    def write(name: str, reason: str, syntax: str = "", **changes: object) -> None:
        ds = ct_dataset(tiny_head(), spacing=(SPACING_MM, SPACING_MM), sop=f"1.2.55.{len(reasons)}", **changes)
        ds.save_as(folder / name, enforce_file_format=True)
        if syntax:
            old = b"1.2.840.10008.1.2.1\0"
            new = syntax.encode().ljust(len(old), b"\0")
            (folder / name).write_bytes((folder / name).read_bytes().replace(old, new, 1))
        reasons[name] = reason

    write("implicit by its header", "Pixel Data", ImplicitVRLittleEndian)
    write(
        "compressed by its header",
        "the header names RLE Lossless, Pixel Data is written otherwise",
        RLELossless,
    )
    write("65535 by 65535", "65535 x 65535 pixels, expected 16 to 2048", Rows=65535, Columns=65535)
    write("without SOPInstanceUID", "without SOPInstanceUID; expected in every CT image", SOPInstanceUID=None)
    write("without SeriesInstanceUID", "without SeriesInstanceUID; expected", SeriesInstanceUID=None)
    write("without PatientID", "without PatientID; expected", PatientID=None)
    write("magnetic", "MR Image Storage, expected CT Image Storage", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    raw = good.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0", 1)  # big endian
    (folder / "big endian by its header").write_bytes(raw)
    reasons["big endian by its header"] = "expected"
    (folder / "link").symlink_to("8")
    (folder / "folder link").symlink_to(folder.parent)
    reasons["link"] = reasons["folder link"] = "a symbolic link, expected a file; it may lead out of the folder"
    os.mkfifo(folder / "fifo")
    reasons["fifo"] = "neither a file nor a folder"
    (folder / ".hidden").write_bytes(good)
    reasons[".hidden"] = "a hidden file or folder"
    (folder / "again").write_bytes(good)
    reasons["again"] = "byte for byte; counted once"
    for number in (1, 2):
        other = {"hu_YX": tiny_head(40 + number), "sop": "1.2.57", "series": "1.2.58", "StudyInstanceUID": "1.2.59"}
        write_images(folder, {f"one uid {number}": other})
        reasons[f"one uid {number}"] = "one SOPInstanceUID on 2 files that differ"
    return reasons


def test_every_kind_of_bad_file_is_one_line_and_stops_nothing(tmp_path: Path) -> None:
    file = make_site(tmp_path)
    good, _ = ingested(file)
    hu = np.array(good.hu)
    reasons = bad_files(tmp_path / "dicom")
    cache, report = ingested(file, workers=2)
    site = read_site(file)
    np.testing.assert_array_equal(cache.hu, hu)
    said: dict[str, list[str]] = {}
    for fault in report.faults:
        said.setdefault(fault.what, []).append(fault.reason)
    assert said.keys() == {file_code(site, f"images/{name}") for name in reasons}
    for name, reason in reasons.items():
        (line,) = said[file_code(site, f"images/{name}")]
        assert reason in line, name
    assert report.files == 3 + len(reasons)


def test_bad_masks_are_one_line_each_and_cost_no_image(tmp_path: Path) -> None:
    file = make_site(tmp_path, data={"masks": "masks"})
    folder = tmp_path / "masks"
    Image.fromarray((tiny_head() > 0).astype(np.uint8)).save(folder / f"{SERIES}.1.png")
    Image.fromarray(np.ones((20, 20), np.uint8)).save(folder / f"{SERIES}.2.png")
    Image.fromarray(np.ones((20, 20), np.uint8)).save(folder / "1.2.99.png")
    (folder / f"{SERIES}.3.png").write_bytes((folder / f"{SERIES}.1.png").read_bytes()[:60])
    (folder / "volume.nii.gz").write_bytes(b"\x1f\x8b no volume")
    (folder / "letter").write_text("Dear")
    (folder / "link").symlink_to(f"{SERIES}.1.png")
    write_images(folder, {"image": {"sop": "1.2.3"}})
    cache, report = ingested(file)
    site = read_site(file)
    assert cache.has_mask.tolist() == [True, False, False]
    expected = {
        f"{SERIES}.2.png": "mask is (20, 20) pixels, its image (48, 48); expected the same",
        f"{SERIES}.3.png": "mask cannot be decoded",
        "1.2.99.png": "named after no image in data.images",
        "volume.nii.gz": "cannot be read as NIfTI",
        "letter": "not a DICOM file",
        "link": "a symbolic link",
        "image": "CT Image Storage, expected Segmentation",
    }
    assert {f.what for f in report.faults} == {file_code(site, f"masks/{name}") for name in expected}
    for fault in report.faults:
        assert any(fault.what == file_code(site, f"masks/{n}") and r in fault.reason for n, r in expected.items())


def test_a_hospital_of_bad_slices_alone_is_an_error_and_costs_no_second_reading(tmp_path: Path) -> None:
    file = make_site(tmp_path, three(hu_YX=tiny_head() + 1024))
    assert "no slice of 1 series can be used; 1x values cannot be HU" in refusal(file)
    assert not (tmp_path / "cache").exists()
    calls: list[str] = []
    with pytest.raises(IngestError, match="values cannot be HU"):
        ingest(read_site(file), 1, lambda what, done, total: calls.append(what))
    assert calls == []


def test_what_may_not_be_opened_is_told_and_noticed_once_it_may(tmp_path: Path) -> None:
    prefix = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may open everything, and there is no setpriv to give that up")
        prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    file = make_site(tmp_path, patients(1, 2, 3, 4))
    locked = [tmp_path / "dicom" / name for name in ("p1/1", "p2", "p3")]
    for path, mode in zip(locked, (0o000, 0o000, 0o444), strict=True):
        path.chmod(mode)
    command = [*prefix, *CLIENT, "ingest", str(file), "--workers", "1"]
    look = [*prefix, *CLIENT, "check", str(file), "--workers", "1"]
    try:
        seen = subprocess.run(look, cwd=ROOT, capture_output=True, text=True)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        for path in reversed(locked):
            path.chmod(0o755)
    assert seen.returncode == 1, seen.stdout + seen.stderr
    problem = "problem: 4 files or folders cannot be opened (Permission denied; first, file "
    assert problem in " ".join(seen.stdout.split())
    assert "so their patients are missing: give the user who runs this the right" in " ".join(seen.stdout.split())
    assert result.returncode == 0, result.stdout + result.stderr
    text = " ".join(result.stdout.split())
    assert "test-site: 2 patients, 2 series, 3 slices" in text
    assert "left out 3: cannot be opened (Permission denied)" in text
    assert "left out 1: a folder that cannot be opened (Permission denied)" in text
    _, report = ingested(file)  # neither size nor time has changed
    assert (report.slices, report.faults, report.unchanged) == (8, (), False)
    assert contents(tmp_path / "cache") == fresh(file)


def test_an_image_that_ends_its_reader_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trapped(image: object) -> object:
        if image.path.name == "7":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_hu(image)

    file = make_site(tmp_path, three() | patients(1, 2))
    read_hu = sys.modules["client.reading"].read_hu
    monkeypatch.setattr("client.reading.read_hu", trapped)
    _, report = ingested(file, workers=2)
    assert report.slices == 2 + 4
    (fault,) = report.faults
    assert fault.what == file_code(read_site(file), "images/7")
    assert "ended its reader" in fault.reason


# Doing it again


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
        edit_site(file, weight=2.0)
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


# A stop at any moment


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


def ended(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


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
        if all(map(ended, workers)):
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
    die_at(file, "series", 4)
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
    write_images(file.parent / "dicom", patients(*range(10, 60)))
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
    assert (headers, series) == (0, 58 - there)
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


# One at a time, and nobody else's files


def test_a_second_ingest_at_once_is_refused(tmp_path: Path) -> None:
    def work() -> None:
        def wait(what: str, done: int, total: int) -> None:
            if (what, done) == ("series", 1):
                there.send(True)
                go_on.recv()

        ingest(read_site(file), 1, wait)

    file = make_site(tmp_path, patients(1, 2))
    (arrived, there), (go_on, go) = multiprocessing.Pipe(duplex=False), multiprocessing.Pipe(duplex=False)
    first = in_process(work)
    assert arrived.recv()
    for _ in range(2):
        assert refusal(file) == "site 'test-site': another ingest is at work; wait for it, or end it"
    assert not (tmp_path / "cache").exists()
    go.send(True)
    first.join()
    assert first.exitcode == 0
    assert ingest(read_site(file), workers=1).unchanged


@pytest.mark.parametrize(
    ("cache", "suffix"),
    [
        *((place, "") for place in (".", "dicom", "masks", "state", "labels.csv")),
        *(("thesis", s) for s in ("", ".partial", ".old")),
    ],
)
def test_a_cache_over_the_hospitals_own_files_is_refused(tmp_path: Path, cache: str, suffix: str) -> None:
    """Cache folders are deleted and made anew; the hospital's files must survive a wrong site.yaml."""
    file = make_site(tmp_path, labels=HEADER, data={"masks": "masks"}, cache=cache)
    draw(tmp_path / "masks", f"{SERIES}.1")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "key").write_bytes(b"k" * 32)
    (tmp_path / f"thesis{suffix}").mkdir()
    (tmp_path / f"thesis{suffix}" / "chapter").write_text("all of it")
    files = contents(tmp_path)
    with pytest.raises(ValueError, match="cache"):  # SiteError or IngestError
        ingest(read_site(file), workers=1)
    assert {name: content for name, content in contents(tmp_path).items() if name != "state/ingest.lock"} == files


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
