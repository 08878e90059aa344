from __future__ import annotations

from pathlib import Path

import pytest

from server.evaluation.evaluate import evaluate_unseen
from server.evaluation.report import write_report
from server.storage.run_folder import read_config
from tests.conftest import SmallHospitals
from tests.support.rounds import run


@pytest.fixture
def two(copied_hospitals: SmallHospitals) -> SmallHospitals:
    return copied_hospitals


@pytest.fixture(scope="session")
def finished(hospitals: SmallHospitals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, tested on the held-out hospital."""
    folder, _ = run(hospitals, tmp_path_factory.mktemp("runs"), run__id="story")
    evaluate_unseen(folder, read_config(folder), [hospitals.files["hospital-05"]])
    write_report(folder)
    return folder
