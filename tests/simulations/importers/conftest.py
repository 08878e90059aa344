"""Small published sets: files as their publishers name and encode them, read by the importers under test."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import yaml
from numpy.typing import NDArray
from pydicom.config import disable_value_validation
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

Progress = Callable[[int, int], None]


class Steps:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.told.append((done, total))


@pytest.fixture
def steps() -> Steps:
    return Steps()


def write_dicom(path: Path, **elements: object) -> None:
    """An image of 16 x 16 pixels with these elements and no others, however wrong, as anonymizers leave them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disable_value_validation():
        ds = pydicom.Dataset()
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
        ds.Rows = ds.Columns = 16
        ds.BitsAllocated = 16
        ds.add_new("PixelData", "OW", bytes(512))
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.save_as(path, enforce_file_format=True)


def write_nifti(path: Path, values: NDArray, affine: NDArray, slope: float | None = None) -> None:
    """A NIfTI file; with a slope, stored numbers are scaled when they are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, affine)
    image.set_qform(affine, code=1, strip_shears=True)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
        image.header.set_data_dtype(values.dtype)
        content = bytearray(image.header.binaryblock) + bytes(4) + values.tobytes(order="F")
        content[112:120] = np.array([slope, 0], "<f4").tobytes()  # scl_slope, scl_inter
        content[108:112] = np.array([352], "<f4").tobytes()  # vox_offset
        path.write_bytes(bytes(content))
    else:
        image.to_filename(path)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """labels.csv of a hospital."""
    with open(folder / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_site_yaml(path: Path) -> dict:
    """site.yaml as data."""
    return yaml.safe_load(path.read_text())


def left_out(folder: Path) -> dict[str, tuple[int, list[str]]]:
    """What import.json says was left out: reason -> count and examples."""
    content = json.loads((folder / "import.json").read_text())
    return {one["reason"]: (one["count"], one["examples"]) for one in content["left_out"]}


def counts(folder: Path) -> dict[str, int]:
    """What import.json says was taken."""
    return json.loads((folder / "import.json").read_text())["counts"]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file below a folder: content, inode and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
