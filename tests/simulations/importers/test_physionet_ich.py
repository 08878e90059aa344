from __future__ import annotations

import shutil
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

AFFINE = np.array([[-0.412, 0, 0, 105.29], [0, 0.412, 0, 23.71], [0, 0, 5, -690.5], [0, 0, 0, 1]])
HEADER = (
    "PatientNumber,SliceNumber,Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural,No_Hemorrhage,"
    "Fracture_Yes_No"
)
SLICES = 3


def write_scan(root: Path, name: str, seed: int, shift_mm: float = 0.0) -> None:
    """A volume with a mask on its second slice, stored as the set's are: 255 by a scale that misses it."""
    rng = np.random.default_rng(seed)
    write_nifti(root / "ct_scans" / f"{name}.nii", rng.integers(-1024, 3071, (18, 16, SLICES)).astype(np.int16), AFFINE)
    mask = np.zeros((18, 16, SLICES), np.uint8)
    mask[4:7, 5:9, 1] = 255
    moved = AFFINE.copy()
    moved[0, 3] += shift_mm
    write_nifti(root / "masks" / f"{name}.nii", mask, moved, slope=1.000001)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two scans as 1.3.1 publishes them, in the folder that its archive makes."""
    root = tmp_path / "download" / "computed-tomography-images-for-intracranial-hemorrhage-1.3.1"
    write_scan(root, "049", 1)
    write_scan(root, "130", 2)
    lines = [
        HEADER,
        "49,1,0,0,0,0,0,1,0",
        "49,2,0,1,0,0,1,0,1",
        "49,3,0,0,0,0,0,1,0",
        "130,1,0,0,0,0,0,1,0",
        "130,2,0,0,0,1,0,0,0",
        "130,3,0,0,0,0,0,1,1",
        ",,,,,,,,",
    ]
    (root / "hemorrhage_diagnosis_raw_ct.csv").write_text("\n".join(lines) + "\n")
    (root / "Patient_demographics.csv").write_text('Patient Number,"Age\n(years)",Gender\n49,30,Male\n')
    return root


def test_slice_labels_stand_with_their_slices(source: Path, tmp_path: Path, steps: Steps) -> None:
    (path,) = IMPORTERS["physionet-ich"](source.parent, tmp_path / "target", steps)
    folder = tmp_path / "target" / "physionet-ich"
    assert path == folder / "site.yaml"
    rows = read_rows(folder)
    names = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "fracture")
    assert ["".join(row[name] for name in names) for row in rows] == [
        "0000000",
        "1010011",
        "0000000",
        "0000000",
        "1100000",
        "0000001",
    ]
    assert {row["hypodensity"] for row in rows} == {""}
    images = read_series(folder / "dicom" / "049")
    assert [row["sop_uid"] for row in rows[:3]] == [image.SOPInstanceUID for image in images]
    heights = [float(image.ImagePositionPatient[2]) for image in images]
    assert heights == [-690.5, -685.5, -680.5]  # slice 1 is the lowest
    assert {image.PatientID for image in images} == {"049"}
    assert counts(folder) == {"patients": 2, "scans": 2, "slices": 6, "masks": 2}
    assert left_out(folder) == {}
    assert read_site_yaml(path)["data"] == {
        "images": "dicom/",
        "masks": "masks/",
        "segment": 1,
        "labels": "labels.csv",
    }
    assert read_site(path).role == "held-out"
    assert "Restricted Health Data License" in path.read_text()
    assert steps.told == [(1, 2), (2, 2)]


def test_masks_become_whole_numbers(source: Path, tmp_path: Path, steps: Steps) -> None:
    stored = nibabel.load(source / "masks" / "049.nii").get_fdata()
    assert 254.9 < stored.max() < 255.1
    assert stored.max() != 255  # the quirk is there
    IMPORTERS["physionet-ich"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "physionet-ich"
    name = read_rows(folder)[0]["series_uid"]
    mask = nibabel.load(folder / "masks" / f"{name}.nii.gz")
    values = np.asanyarray(mask.dataobj)
    assert values.dtype == np.uint8
    assert np.array_equal(values, (stored > 0).astype(np.uint8))
    assert np.allclose(mask.affine, nibabel.load(source / "ct_scans" / "049.nii").affine)


def test_what_does_not_fit_is_counted(source: Path, tmp_path: Path, steps: Steps) -> None:
    table = source / "hemorrhage_diagnosis_raw_ct.csv"
    lines = table.read_text().splitlines()
    lines[1] = "49,1,0,0,0,0,0,0,0"  # neither a type nor none
    lines[3] = "49,4,0,0,0,0,0,1,0"  # the volume has three slices
    lines += ["130,1,0,0,0,0,0,1,0", "130,2,1,0,0,1,0,0,0"]  # the same again; a contradiction
    lines += ["60,1,0,0,0,0,0,1,0", "130.0,3.0,0,0,0,0,0,1,1", "x,1,0,0,0,0,0,1,0", "131,1,0,0,0,0,,1,0"]
    table.write_text("\n".join(lines) + "\n")
    write_scan(source, "066", 3, shift_mm=0.3)
    write_scan(source, "067", 4)
    (source / "ct_scans" / "067.nii").write_bytes(b"cut")
    write_scan(source, "068", 5)
    (source / "ct_scans" / "068.nii").unlink()
    write_scan(source, "131", 6)
    (source / "masks" / "131.nii").unlink()
    (source / "ct_scans" / "readme.txt").write_text("mine")
    (source / "ct_scans" / "._049.nii").write_text("of a file manager")
    (source / "ct_scans" / "049.nii.gz").write_bytes(b"")
    IMPORTERS["physionet-ich"](source, tmp_path / "target", steps)
    folder = tmp_path / "target" / "physionet-ich"
    name = "hemorrhage_diagnosis_raw_ct.csv"
    found = left_out(folder)
    blank = found.pop(f"a slice without a row in {name}; its labels are blank")
    assert blank == (1 + 3 + 2, ["049 slice 3", *(f"066 slice {n}" for n in (1, 2, 3)), "131 slice 2", "131 slice 3"])
    assert found == {
        "No_Hemorrhage contradicts the types of hemorrhage; left blank": (1, ["049 slice 1"]),
        f"a row of {name} for a slice that the volume does not have (1 is the first)": (1, ["049 slice 4"]),
        f"two rows of {name} contradict each other; left blank": (1, ["130 slice 2"]),
        f"a patient of {name} for whom ct_scans/ has no image": (1, ["060"]),
        "PatientNumber or SliceNumber is no whole number": (1, [f"{name} line 13"]),
        f"values in {name} that are neither 0 nor 1; left blank": (1, ["131 slice 1"]),
        "mask: mask lies up to 0.73 voxels off its image by their affines, expected 0.05": (1, ["066"]),
        "image: cannot be read as NIfTI (ImageFileError)": (1, ["067"]),
        "a mask for which ct_scans/ has no image": (1, ["masks/068.nii"]),
        "mask: there is none": (1, ["131"]),
        "a second file of one scan; the first by name is used": (1, ["ct_scans/049.nii.gz"]),
        "no NIfTI file (.nii or .nii.gz)": (1, ["ct_scans/readme.txt"]),
    }
    assert counts(folder) == {"patients": 4, "scans": 4, "slices": 12, "masks": 2}
    assert {one.name for one in (folder / "dicom").iterdir()} == {"049", "066", "130", "131"}
    assert len(list((folder / "masks").iterdir())) == 2
    rows = read_rows(folder)
    assert (rows[0]["any"], rows[0]["fracture"]) == ("", "0")
    assert (rows[7]["any"], rows[7]["fracture"]) == ("", "")  # 130, slice 2


def test_a_second_import_writes_nothing_and_an_interrupted_one_is_finished(
    source: Path, tmp_path: Path, steps: Steps
) -> None:
    target = tmp_path / "target"
    (path,) = IMPORTERS["physionet-ich"](source, target, steps)
    first = snapshot(target)
    IMPORTERS["physionet-ich"](source, target, steps)
    assert snapshot(target) == first
    path.unlink()
    shutil.rmtree(path.parent / "dicom" / "130")
    next((path.parent / "masks").iterdir()).write_bytes(b"half a mask")
    IMPORTERS["physionet-ich"](source, target, steps)
    assert {name: content for name, (content, *_) in snapshot(target).items()} == {
        name: content for name, (content, *_) in first.items()
    }
    elsewhere = tmp_path / "elsewhere"
    IMPORTERS["physionet-ich"](source, elsewhere, steps)
    assert {name: content for name, (content, *_) in snapshot(elsewhere).items()} == {
        name: content for name, (content, *_) in first.items()
    }


def test_bad_sources_are_refused(source: Path, tmp_path: Path, steps: Steps) -> None:
    importer, target = IMPORTERS["physionet-ich"], tmp_path / "target"
    twice = source.parent / "copy"
    shutil.copytree(source, twice)
    with pytest.raises(SourceError, match=r"holds the set 2 times \(computed.*, copy\); give one of them"):
        importer(source.parent, target, steps)
    table = twice / "hemorrhage_diagnosis_raw_ct.csv"
    table.write_text(table.read_text().replace("No_Hemorrhage", "Hemorrhage"))
    with pytest.raises(SourceError, match=r"has no column 'No_Hemorrhage'; it has 'PatientNumber', 'SliceNumber'"):
        importer(twice, target, steps)
    table.rename(table.with_name("hemorrhage_diagnosis.csv"))
    with pytest.raises(SourceError, match=r"has no 'hemorrhage_diagnosis_raw_ct.csv'; it has Patient_demographics.csv"):
        importer(twice, target, steps)
    for mask in (source / "masks").iterdir():
        write_nifti(mask, np.zeros((18, 15, SLICES), np.uint8), AFFINE)
    with pytest.raises(SourceError, match="none of 2 scans can be used with its mask") as refused:
        importer(source, target, steps)
    assert "left out 2: mask: mask of shape (18, 15, 3), its image has (18, 16, 3) (049, 130)" in str(refused.value)
    assert not (target / "physionet-ich" / "site.yaml").exists()
