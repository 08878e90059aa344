from __future__ import annotations

import csv
import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from client.cli import app
from client.segment import segment
from client.segment.segment import without_spots
from shared.config import ModelSettings
from shared.model.scoring import build_model
from shared.model.starting import write_model
from tests.conftest import SmallHospitals
from tests.support.dicom_files import ct_dataset, enhanced_ct, head_hu, write_ct, write_series

RUNNER = CliRunner()
SETTINGS = ModelSettings(variant="demo", windows_hu="0:80")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "mine.safetensors"
    write_model(path, build_model(SETTINGS, 0), SETTINGS, {"data": "nothing at all"})
    return path


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between 50 and 95 HU is hematoma, smoothly, whatever the weights: the way to the pixels is tested."""
    monkeypatch.setattr(
        segment, "probabilities", lambda model, settings, hu, device: ((hu > 50) & (hu < 95)).astype(np.float32)
    )


def run(folder: Path, out: Path, model: Path | str, *more: str):
    return RUNNER.invoke(app, ["segment", str(folder), str(out), "--model", str(model), "--workers", "1", *more])


def spotted(spot_hu: int = 70, size: int = 14) -> np.ndarray:
    hu = np.kron(head_hu((64, 64)), np.ones((4, 4), np.int16))
    hu[90 : 90 + size, 140 : 140 + size] = spot_hu
    return hu


def test_masks_lie_where_the_images_show_it_on_their_own_pixels(tmp_path: Path, bright: None, model: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_ct(folder / "a" / "one.dcm", spotted(), spacing=(0.8, 0.8))
    write_ct(folder / "two", spotted()[::-1], spacing=(0.8, 0.8), series="1.2.3", sop="1.2.3.1", column=(0, -1, 0))
    result = run(folder, out, model)
    assert result.exit_code == 0, result.output
    assert "2 slices of 2 series: 2 with hematoma, 0 with nothing marked" in result.output
    for name in ("a/one.dcm", "two"):
        mask = np.load(out / "masks" / f"{name}.npy")
        truth = (pydicom.dcmread(folder / name).pixel_array == 70).astype(np.uint8)
        assert mask.dtype == np.uint8
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9
    with open(out / "segments.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a/one.dcm", "two"}
    assert float(rows["two"]["area_mm2"]) == pytest.approx(196 * 0.64, rel=0.15)


def test_a_seg_says_what_found_it_and_is_read_by_another_library(tmp_path: Path, bright: None, model: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        write_ct(
            folder / f"{number}",
            spotted(70 if number else 35),
            spacing=(0.8, 0.8),
            position=(0.0, 0.0, 5.0 * number),
            sop=f"1.2.826.1.{number + 1}",
        )
    assert run(folder, out, model, "--form", "both").exit_code == 0
    (file,) = (out / "seg").iterdir()
    seg = highdicom.seg.segread(file)
    first = file.read_bytes()
    description = seg.SegmentSequence[0]
    assert description.SegmentAlgorithmType == "AUTOMATIC"
    assert "research use only" in seg.SeriesDescription
    volume = seg.get_volume().array[..., 0] if seg.get_volume().array.ndim == 4 else seg.get_volume().array
    arrays = [np.load(out / "masks" / f"{number}.npy") for number in range(3)]
    assert sorted(int(plane.sum()) for plane in volume if plane.any()) == sorted(
        int(one.sum()) for one in arrays if one.any()
    )
    assert not arrays[0].any()
    assert run(folder, out, model, "--form", "both").exit_code == 0
    again = pydicom.dcmread(file)
    assert again.SOPInstanceUID == pydicom.dcmread(pydicom.filebase.DicomBytesIO(first)).SOPInstanceUID


def test_a_hospitals_series_with_a_gap_in_the_headers_and_other_files_beside(
    tmp_path: Path, model: Path, hospitals: SmallHospitals
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(hospitals.site("hospital-01").images, folder)
    (folder / "notes.txt").write_text("not DICOM")
    result = run(folder, out, model, "--form", "both", "--threshold", "0.99")
    assert result.exit_code == 0, result.output
    assert "left out 1:" in result.output
    images = [path for path in folder.rglob("*") if path.is_file() and path.name != "notes.txt"]
    assert len(list((out / "masks").rglob("*.npy"))) == len(images)
    page = (out / "segments.html").read_text()
    assert "Research use only" in page
    assert "nothing at all" in page
    for path in images[:3]:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert str(header.PatientID) not in page
        assert str(header.PatientName) not in page


def test_images_of_a_series_that_does_not_hold_together_are_taken_one_by_one(
    tmp_path: Path, bright: None, model: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_ct(folder / "a", spotted(), spacing=(0.8, 0.8))
    write_ct(folder / "b", spotted(75), spacing=(0.9, 0.9), sop="1.2.826.1.2")
    result = run(folder, out, model)
    assert "2 slices of 2 series" in result.output
    assert np.load(out / "masks" / "a.npy").any()
    assert np.load(out / "masks" / "b.npy").any()


def test_the_frames_of_a_file_become_the_layers_of_an_array(tmp_path: Path, bright: None, model: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    singles = [
        ct_dataset(spotted(hu), spacing=(0.8, 0.8), position=(0.0, 0.0, 5.0 * number), sop=f"1.2.826.1.{number + 1}")
        for number, hu in enumerate((35, 70, 72))
    ]
    enhanced_ct(singles, [1, 0, 2]).save_as(folder / "many.dcm", enforce_file_format=True)
    result = run(folder, out, model, "--form", "both")
    assert result.exit_code == 0, result.output
    mask = np.load(out / "masks" / "many.dcm.npy")
    assert mask.shape == (3, 256, 256)
    assert [bool(layer.any()) for layer in mask] == [True, False, True]
    assert "left out" not in result.output
    assert len(list((out / "seg").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["IN", "IN/out"], "lie within each other"),
        (["IN", "OUT", "--form", "png"], "expected one of npy, seg, both"),
        (["NOWHERE", "OUT"], "no folder"),
        (["IN", "OUT", "--model", "tiny"], "no starting model"),
        (["IN", "OUT", "--model", "gone.safetensors"], "no model file"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, model: Path, arguments: list[str], words: str) -> None:
    write_series(tmp_path / "IN")
    places = [str(tmp_path / one) if one.split("/")[0] in ("IN", "OUT", "NOWHERE") else one for one in arguments]
    options = [] if "--model" in places else ["--model", str(model)]
    result = RUNNER.invoke(app, ["segment", *places, *options])
    assert result.exit_code != 0
    assert words in " ".join(result.output.split())


def test_files_of_another_kind_in_the_folder_of_masks_stay(tmp_path: Path, model: Path) -> None:
    write_series(tmp_path / "in", count=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert run(tmp_path / "in", tmp_path / "out", model).exit_code == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_small_spots_are_left_away_and_large_ones_stay() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:4, 2:4] = mask[10:15, 10:15] = True
    mask[15, 15] = True  # touches the large one by a corner
    kept = without_spots(mask, 5)
    assert kept.sum() == 26
    assert not kept[:5, :5].any()
    assert not without_spots(np.zeros((4, 4), bool), 1).any()


def test_images_that_do_not_say_whose_they_are_are_segmented_all_the_same(
    tmp_path: Path, bright: None, model: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_ct(folder / "a", spotted(), spacing=(0.8, 0.8), patient="")
    write_ct(folder / "b", spotted(75), spacing=(0.8, 0.8), StudyInstanceUID=None, FrameOfReferenceUID=None)
    write_ct(folder / "c", spotted(80), spacing=(0.8, 0.8), AccessionNumber=None, StudyID=None, PatientBirthDate=None)
    result = run(folder, out, model, "--form", "both")
    assert "left out" not in result.output
    assert all(np.load(out / "masks" / f"{name}.npy").any() for name in "abc")
    assert len(list((out / "seg").iterdir())) == 3
