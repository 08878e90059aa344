from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ImplicitVRLittleEndian, RLELossless
from scipy import ndimage

from client.ingest.ingest import IngestError, ingest
from client.ingest.store import FILES
from shared.site import read_site
from tests.conftest import SmallHospitals
from tests.support.dicom_files import ct_dataset
from tests.support.small_sites import (
    CLIENT,
    HEADER,
    ROOT,
    SERIES,
    SIDE,
    SPACING_MM,
    contents,
    draw,
    file_code,
    fresh,
    in_process,
    index,
    ingested,
    make_site,
    patients,
    refusal,
    three,
    tiny_head,
    write_images,
    write_multi_frame,
)

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
    write("without PatientID", "PatientID is empty, so patients cannot be told apart", PatientID=None)
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
        f"{SERIES}.3.png": "cannot be read as PNG: cut or damaged",
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
    read_hu = sys.modules["client.ingest.read_series"].read_hu
    monkeypatch.setattr("client.ingest.read_series.read_hu", trapped)
    _, report = ingested(file, workers=2)
    assert report.slices == 2 + 4
    (fault,) = report.faults
    assert fault.what == file_code(read_site(file), "images/7")
    assert "ended its reader" in fault.reason


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
    """Cache folders are deleted and made again; the hospital's files must survive a wrong site.yaml."""
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
