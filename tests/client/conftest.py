from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from pydicom import Dataset

from tests.dicom_files import write_series


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "dicom")


@pytest.fixture
def datasets(images: list[Path]) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in images]
