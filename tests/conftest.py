"""Real hospitals, small: phantom DICOM written, ingested and read by the code under test."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from client.ingest.ingest import ingest
from shared.config import RunConfig, parse_config
from shared.site import Site, read_site
from shared.slices import SliceCache, read_cache
from simulations.phantom.hospitals import HOSPITALS
from simulations.phantom.write_hospitals import write_hospitals
from tests.support.cohorts import bleeding

torch.set_num_threads(1)
os.environ.pop("FORCE_COLOR", None)  # commands' words are compared without colours

# Few examples, the same each time; `pytest tests/client/dicom/test_fuzz.py --hypothesis-profile=long` looks further.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("short", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=3000, **_COMMON)
settings.load_profile("short")

REAL_DICOM = Path(__file__).resolve().parents[2] / "shared" / "data" / "dicom"
PATIENTS, SLICES = 10, 3


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers one tests real processes, first and one after the other; the others take file by file."""
    real = Path(__file__).parent / "federation"
    for item in items:
        item.add_marker(pytest.mark.xdist_group("federation" if item.path.parent == real else str(item.path)))
    items.sort(key=lambda item: item.path.parent != real)


@dataclass(frozen=True)
class SmallHospitals:
    """Hospitals 1 and 2 (train) and 5 (held-out), ingested.

    Attributes:
      root: their parent folder.
      files: site name -> site.yaml.
      untouched: a copy of the parent folder from before any test; a test copies it.
    """

    root: Path
    files: dict[str, Path]
    untouched: Path

    def site(self, name: str) -> Site:
        return read_site(self.files[name])

    def cache(self, name: str) -> SliceCache:
        return read_cache(self.site(name).cache)


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> SmallHospitals:
    """Not to be changed by a test; take `copied_hospitals` for that."""
    root = tmp_path_factory.mktemp("hospitals")
    chosen = tuple(bleeding(HOSPITALS[i], PATIENTS, SLICES) for i in (0, 1, 4))
    files = write_hospitals(root, seed=1, hospitals=chosen)
    for file in files:
        edit_site(file, policy={"release": ["encoder", "cls", "seg", "rec"], "metrics": True, "min_patients": 1})
        ingest(read_site(file))
    untouched = tmp_path_factory.mktemp("untouched") / "hospitals"
    shutil.copytree(root, untouched)
    return SmallHospitals(root, {file.parent.name: file for file in files}, untouched)


@pytest.fixture
def copied_hospitals(hospitals: SmallHospitals, tmp_path: Path) -> SmallHospitals:
    """A copy of the hospitals that a test may change, as they were before anybody asked them."""
    root = tmp_path / "hospitals"
    shutil.copytree(hospitals.untouched, root)
    return SmallHospitals(root, {name: root / name / "site.yaml" for name in hospitals.files}, hospitals.untouched)


@pytest.fixture(scope="session")
def config() -> RunConfig:
    """The demonstration's model, one short epoch, float32."""
    return parse_config(small_config())


def small_config(**changes: object) -> dict[str, object]:
    """A flat run config that a test runs in seconds; keys with '__' for the dot."""
    flat = {
        "model.variant": "demo",
        "train.epochs": 1,
        "train.batch": 8,
        "train.precision": "fp32",
        "federation.rounds": 2,
        "federation.wait_s": 20.0,
        "evaluation.replicates": 100,
    }
    return flat | {key.replace("__", "."): value for key, value in changes.items()}


def edit_site(file: Path, **sections: object) -> None:
    """Change top-level keys of a site.yaml."""
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(content | sections))


@pytest.fixture(scope="session")
def real_dicom() -> Path:
    """Folder of DICOM files that nobody in this project made; CI must have it."""
    if not REAL_DICOM.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {REAL_DICOM}")
        pytest.skip(f"no real DICOM files in {REAL_DICOM}")
    return REAL_DICOM
