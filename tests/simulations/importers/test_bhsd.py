from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from shared.site import read_site
from simulations.importers import IMPORTERS, SourceError
from tests.simulations.importers.conftest import (
    Steps,
    counts,
    left_out,
    read_rows,
    read_site_yaml,
    snapshot,
    write_nifti,
)
from tests.simulations.importers.test_volume import read_series

ONE, AGAIN, OTHER = "ID_2db7ee14_ID_2591d00dfc", "ID_2db7ee14_ID_f27e38fdfd", "ID_0237f3c9_ID_40015688b9"
TILT = np.deg2rad(19.0)
# As the set's: rows to the left, columns to the front, slices along the tilted normal.
AFFINE = np.array(
    [
        [-0.488281, 0, 0, 125.0],
        [0, 0.488281 * np.cos(TILT), -5.288 * np.sin(TILT), -96.03],
        [0, 0.488281 * np.sin(TILT), 5.288 * np.cos(TILT), -63.31],
        [0, 0, 0, 1],
    ]
)


def write_scan(root: Path, name: str, labels: tuple[int, ...], dtype: type = np.uint16) -> None:
    """A volume with one label per slice."""
    rng = np.random.default_rng(len(name) + sum(labels))
    shape = (16, 18, len(labels))
    write_nifti(root / "images" / f"{name}.nii.gz", rng.integers(-1024, 3071, shape).astype(np.int16), AFFINE)
    mask = np.zeros(shape, dtype)
    for k, value in enumerate(labels):
        mask[2:5, 3:9, k] = value
    write_nifti(root / "ground truths" / f"{name}.nii.gz", mask, AFFINE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two scans of one patient and one of another."""
    root = tmp_path / "download" / "label_192"
    write_scan(root, ONE, (0, 2, 5))
    write_scan(root, AGAIN, (1, 0))
    write_scan(root, OTHER, (3, 4))
    return root


def test_what_a_mask_shows_labels_its_slice(source: Path, tmp_path: Path, steps: Steps) -> None:
    (path,) = IMPORTERS["bhsd"](source.parent, tmp_path / "target", steps)
    folder = tmp_path / "target" / "bhsd"
    names = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
    rows = read_rows(folder)
    assert ["".join(row[name] for name in names) for row in rows] == [
        "100100",
        "100010",
        "000000",
        "101000",
        "100001",
        "110000",
        "000000",
    ]
    assert {row["hypodensity"] for row in rows} == {""}
    assert read_site_yaml(path)["data"]["segment"] == [1, 2, 3, 4, 5]
    assert read_site(path).segments == (1, 2, 3, 4, 5)
    assert counts(folder) == {"patients": 2, "scans": 3, "slices": 7, "masks": 3}
    assert left_out(folder) == {}
    assert "never train on one of the two sets and test on the other" in path.read_text()
    images = {name: read_series(folder / "dicom" / name) for name in (ONE, AGAIN, OTHER)}
    assert {name: {image.PatientID for image in series} for name, series in images.items()} == {
        ONE: {"ID_2db7ee14"},
        AGAIN: {"ID_2db7ee14"},
        OTHER: {"ID_0237f3c9"},
    }
    assert len({series[0].StudyInstanceUID for series in images.values()}) == 3
    assert [row["sop_uid"] for row in rows[:2]] == [image.SOPInstanceUID for image in images[OTHER]]


def test_masks_are_linked_under_their_series_uid(source: Path, tmp_path: Path, steps: Steps) -> None:
    IMPORTERS["bhsd"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "bhsd"
    for name in (ONE, AGAIN, OTHER):
        uid = read_series(folder / "dicom" / name)[0].SeriesInstanceUID
        assert (folder / "masks" / f"{uid}.nii.gz").samefile(source / "ground truths" / f"{name}.nii.gz")
    assert len(list((folder / "masks").iterdir())) == 3


def test_what_does_not_fit_is_counted(source: Path, tmp_path: Path, steps: Steps) -> None:
    write_scan(source, "ID_00000001_ID_0000000001", (6, 0))
    write_scan(source, "ID_00000002_ID_0000000002", (2, 0))
    moved = AFFINE.copy()
    moved[:3, 3] = 0
    write_nifti(source / "ground truths" / "ID_00000002_ID_0000000002.nii.gz", np.zeros((16, 18, 2), np.uint8), moved)
    write_scan(source, "ID_00000003_ID_0000000003", (2, 0))
    (source / "ground truths" / "ID_00000003_ID_0000000003.nii.gz").unlink()
    write_scan(source, "phantom", (2, 0))
    write_scan(source, "ID_00000004_ID_0000000004", (2, 0))
    broken = np.zeros((16, 18, 2), np.float32)
    broken[3, 3, 1] = np.nan
    write_nifti(source / "images" / "ID_00000004_ID_0000000004.nii.gz", broken, AFFINE)
    write_scan(source, "ID_00000005_ID_0000000005", (2, 0))
    half = np.zeros((16, 18, 2), np.float32)
    half[3, 3, 1] = 1.5
    write_nifti(source / "ground truths" / "ID_00000005_ID_0000000005.nii.gz", half, AFFINE)
    IMPORTERS["bhsd"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "bhsd"
    found = left_out(folder)
    (off,) = [reason for reason in found if "voxels off" in reason]
    assert found.pop(off) == (1, ["ID_00000002_ID_0000000002"])
    assert found == {
        "mask: mask with the labels [6], expected 0 and [1, 2, 3, 4, 5]": (1, ["ID_00000001_ID_0000000001"]),
        "mask: there is none": (1, ["ID_00000003_ID_0000000003"]),
        "not named PATIENT_STUDY.nii.gz, as ID_0237f3c9_ID_40015688b9.nii.gz": (1, ["images/phantom.nii.gz"]),
        "image: 1 values are not finite, expected HU": (1, ["ID_00000004_ID_0000000004"]),
        "mask: mask with values between whole numbers, expected labels": (1, ["ID_00000005_ID_0000000005"]),
    }
    assert counts(folder) == {"patients": 6, "scans": 7, "slices": 15, "masks": 3}
    unmasked = [row for row in read_rows(folder) if row["any"] == ""]
    assert len(unmasked) == 8
    assert {row["epidural"] for row in unmasked} == {""}


def test_a_second_import_writes_nothing(source: Path, tmp_path: Path, steps: Steps) -> None:
    target = tmp_path / "target"
    IMPORTERS["bhsd"](source, target, steps)
    first = snapshot(target)
    assert len(first) == 7 + 3 + 3
    IMPORTERS["bhsd"](source, target, steps)
    assert snapshot(target) == first


def test_a_mask_that_misses_whole_numbers_is_written_anew(source: Path, tmp_path: Path, steps: Steps) -> None:
    mask = np.zeros((16, 18, 2), np.uint16)
    mask[3, 3, 1] = 5
    write_nifti(source / "ground truths" / f"{AGAIN}.nii", mask, AFFINE, slope=1.0001)
    (source / "ground truths" / f"{AGAIN}.nii.gz").unlink()
    IMPORTERS["bhsd"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "bhsd"
    uid = read_series(folder / "dicom" / AGAIN)[0].SeriesInstanceUID
    written = nibabel.load(folder / "masks" / f"{uid}.nii.gz").get_fdata()
    assert (written[3, 3, 1], written.sum()) == (5, 5)
    assert counts(folder)["masks"] == 3


def test_a_changed_mask_is_taken_anew(source: Path, tmp_path: Path, steps: Steps) -> None:
    IMPORTERS["bhsd"](source, tmp_path / "target", steps)
    (source / "ground truths" / f"{ONE}.nii.gz").unlink()
    write_scan(source, ONE, (0, 0, 4))
    IMPORTERS["bhsd"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "bhsd"
    uid = read_series(folder / "dicom" / ONE)[0].SeriesInstanceUID
    assert np.unique(nibabel.load(folder / "masks" / f"{uid}.nii.gz").get_fdata()[:, :, 2]).tolist() == [0, 4]


def test_bad_sources_are_refused(source: Path, tmp_path: Path, steps: Steps) -> None:
    importer, target = IMPORTERS["bhsd"], tmp_path / "target"
    (target / "bhsd").mkdir(parents=True)
    (target / "bhsd" / "site.yaml").write_text("site: bhsd\n")
    with pytest.raises(SourceError, match="exists and does not begin with '# Written by hemafed-sim import bhsd'"):
        importer(source, target, steps)
    assert [path.name for path in target.rglob("*") if path.is_file()] == ["site.yaml"]
    (source / "ground truths").rename(source / "labels")
    with pytest.raises(SourceError, match=r"has no 'ground truths'; it has images, labels\. Expected the folder"):
        importer(source, tmp_path / "other", steps)
    for path in (source / "images").iterdir():
        path.unlink()
    (source / "labels").rename(source / "ground truths")
    with pytest.raises(SourceError, match="none of 0 scans can be used with its mask"):
        importer(source, tmp_path / "other", steps)
