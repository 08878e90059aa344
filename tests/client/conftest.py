from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from pydicom import Dataset

from shared.slices import SliceCache
from tests.conftest import SmallHospitals
from tests.support.dicom_files import write_series
from tests.support.training import SLICES


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "dicom")


@pytest.fixture
def datasets(images: list[Path]) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in images]


@pytest.fixture(scope="module")
def cache(hospitals: SmallHospitals) -> SliceCache:
    """The first training slices of a hospital."""
    whole = hospitals.cache("hospital-01")
    rows = whole.rows("train")[:SLICES]
    assert len(rows) == SLICES
    return SliceCache(*(getattr(whole, key)[rows] for key in ("hu", "masks", "patient", "label", "has_mask", "split")))
