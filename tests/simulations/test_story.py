"""The story through real Flower processes: SuperLink, Ray, the bundle that Flower ships; two small hospitals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from server.evaluation.evaluate import evaluate_unseen
from server.evaluation.report import write_report
from server.storage.checkpoint import load_checkpoint
from server.storage.run_folder import read_config, read_rounds, read_summary
from shared.host.processes import owned
from simulations.rehearsal.superlink import CONNECTION, SimulationError, run_app, start_superlink
from tests.conftest import SmallHospitals, small_config
from tests.support.loopback import LoopbackGrid, run_server

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["hospital-01", "hospital-02"]


def nested(flat: dict) -> dict:
    sections: dict = {}
    for key, value in flat.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


def test_flower_runs_the_same_training_and_nothing_stays(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    flat = small_config(
        run__folder=str(tmp_path / "runs"), run__id="flower", simulation__hospitals=str(copied_hospitals.root)
    )
    chosen = tmp_path / "run.toml"
    chosen.write_text(tomli_w.dumps(nested(flat)))
    with start_superlink(tmp_path / "flwr") as link:
        run_id = run_app(link, ROOT, chosen, supernodes=2)
        listed = subprocess.run([link.flwr, "list", CONNECTION], env=link.environment, capture_output=True, text=True)
        log = subprocess.run(
            [link.flwr, "log", str(run_id), CONNECTION, "--show"], env=link.environment, capture_output=True, text=True
        )
        # A run that fails is noticed although `flwr run --stream` exits 0, and the cause is in the last lines.
        broken = tmp_path / "broken.toml"
        broken.write_text(
            tomli_w.dumps(nested(flat | {"federation.quorum": 3, "federation.wait_s": 0.0, "run.id": "broken"}))
        )
        with pytest.raises(SimulationError, match=r"federation\.quorum is 3") as failure:
            run_app(link, ROOT, broken, supernodes=2)
    assert str(run_id) in listed.stdout
    assert "round 2/2: 2 hospitals" in log.stdout + log.stderr
    assert "finished:failed" in str(failure.value)
    assert owned(tmp_path / "flwr") == [], "nothing stays"

    folder = tmp_path / "runs" / "flower"
    evaluate_unseen(folder, read_config(folder), [copied_hospitals.files["hospital-05"]])
    assert write_report(folder).is_file()
    assert {"seen", "unseen"} <= read_summary(folder).evaluation.keys()
    assert [line.round for line in read_rounds(folder)] == [1, 2]

    # Flower ran the bundle, and the bundle's training is that of the code here.
    alone = small_config(run__folder=str(tmp_path / "alone"), run__id="alone")
    run_server(LoopbackGrid([copied_hospitals.files[n] for n in NAMES], alone), alone)
    expected, found = (load_checkpoint(f / "checkpoint") for f in (tmp_path / "alone" / "alone", folder))
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)


def test_the_bundle_holds_only_code_that_hospitals_run(tmp_path: Path) -> None:
    copy = tmp_path / "hemafed"
    tracked = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in tracked.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "hospitals" / "a").mkdir(parents=True)
    (copy / "hospitals" / "a" / "site.yaml").write_text("site: a\n")
    (copy / "notes.json").write_text("{}")
    subprocess.run([Path(sys.executable).parent / "flwr", "build"], cwd=copy, check=True, capture_output=True)
    (bundle,) = copy.glob("*.fab")
    names = {n for n in zipfile.ZipFile(bundle).namelist() if not n.startswith(".info")}
    code = {
        str(p.relative_to(ROOT)) for folder in ("server", "client", "shared") for p in (ROOT / folder).rglob("*.py")
    }
    assert names - {"pyproject.toml", "README.md", "LICENSE"} == code


def test_a_superlink_ends_with_an_interrupted_block(tmp_path: Path) -> None:
    leaders = []

    def interrupted() -> None:
        with start_superlink(tmp_path) as link:
            leaders.append(link.pid)
            os.kill(leaders[0], 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ProcessLookupError):
        os.kill(leaders[0], signal.SIGCONT)
