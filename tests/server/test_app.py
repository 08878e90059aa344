"""The whole procedure with real client code on a loopback grid: what it leaves, resuming, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from server.app import finish
from server.evaluation.evaluate import evaluate_unseen
from server.evaluation.report import write_report
from server.federation.roster import Participant
from server.storage.checkpoint import load_checkpoint, read_tensors
from server.storage.run_folder import RunError, load_tallies, read_config, read_rounds, read_summary
from shared.config import ConfigError
from shared.metrics import summarise
from shared.tally import pooled
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.loopback import LoopbackGrid, run_server
from tests.support.rounds import NAMES, run, stopped_in_round

METRICS = ("auc", "f1", "dice")


def test_the_summary_has_every_field(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary.rounds == 2
    assert summary.config_hash == read_config(finished).hash()
    assert summary.seconds_per_round > 0
    assert set(summary.sites) == {"hospital-01", "hospital-02", "hospital-05"}
    for site in summary.sites.values():
        assert site.positives is not None
        assert (site.patients, site.slices) == (10, 30)
    for stage in ("evaluation", "evaluation_before_training"):
        for part in ("seen", "unseen"):
            for metric in ("auc", "f1", "dice"):
                assert getattr(summary, stage)[part][metric].keys() == {
                    "value",
                    "low",
                    "high",
                    "n_slices",
                    "n_patients",
                }
        assert set(getattr(summary, stage)["per_site"]) == set(summary.sites)
    encoder, _ = read_tensors(finished / "checkpoint" / "initial.safetensors")
    size = sum(value.nbytes for value in encoder.values())
    assert 2 * size < summary.bytes_up_per_round < 2 * (size + 100_000)


def test_the_end_of_a_run_needs_no_summary_of_its_beginning(finished: Path, tmp_path: Path) -> None:
    """Before: a run whose summary.json was lost failed after its last round."""
    folder = tmp_path / finished.resolve().name
    shutil.copytree(finished, folder)
    (folder / "summary.json").write_text("{")
    finish(folder, [Participant(1, "hospital-01", "train", frozenset(), {"patients": 10})])
    summary = read_summary(folder)
    assert (summary.rounds, summary.config_hash) == (2, read_config(folder).hash())
    assert summary.sites["hospital-01"].patients == 10
    assert summary.evaluation == read_summary(finished).evaluation


def test_the_summary_follows_from_the_counts(finished: Path) -> None:
    result = read_summary(finished).evaluation
    for part in ("seen", "unseen"):
        found = summarise(pooled(load_tallies(finished, "final", part).values()), result["threshold_bin"])
        assert result[part]["auc"]["value"] == found["auc"].value
        assert result[part]["dice"]["low"] == found["dice"].low


def test_training_moved_the_encoder_and_lowered_the_loss(finished: Path) -> None:
    initial, _ = read_tensors(finished / "checkpoint" / "initial.safetensors")
    final = load_checkpoint(finished / "checkpoint")
    assert final.round_number == 2
    assert all(not np.array_equal(initial[n], final.arrays[n]) for n in initial if n.endswith("weight"))
    first, last = read_rounds(finished)
    for name in NAMES:
        assert last.sites[name].rec < first.sites[name].rec


def test_the_report_is_one_page_that_needs_no_other(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image") == 3, "curves, ROC, examples"
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    for name in ("hospital-01", "hospital-02", "hospital-05"):
        assert name in page
    auc = read_summary(finished).evaluation["unseen"]["auc"]["value"]
    assert f"{auc:.3f}" in page


def test_no_identifier_of_a_patient_is_in_the_runs_folder(finished: Path, hospitals: SmallHospitals) -> None:
    import pydicom

    planted = set()
    for path in hospitals.root.glob("*/dicom/*/*"):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        planted |= {str(ds.PatientID), str(ds.PatientName), str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID)}
    planted |= {h for name in hospitals.files for h in hospitals.cache(name).patient}
    assert len(planted) > 100
    for path in finished.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in planted if word.encode() in content], path.name


def test_a_stopped_run_resumed_is_the_undisturbed_run(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    whole, _ = run(copied_hospitals, tmp_path / "a", run__id="whole")

    flat = small_config(run__folder=str(tmp_path / "b"), run__id="stopped")
    stopped_in_round(copied_hospitals, flat, 2)
    # The client that was asked had trained round 2 when the server died; it must not train it twice from there.
    resumed, _ = run(copied_hospitals, tmp_path / "b", run__id="stopped", run__resume=True)
    expected, found = load_checkpoint(whole / "checkpoint"), load_checkpoint(resumed / "checkpoint")
    assert [line.round for line in read_rounds(resumed)] == [1, 2]
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)


def test_the_same_seed_gives_the_same_run(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    runs = [run(copied_hospitals, tmp_path, run__id=name)[0].resolve() for name in ("one", "two")]
    one, two = (load_checkpoint(folder / "checkpoint") for folder in runs)
    for name, value in one.arrays.items():
        assert value.tobytes() == two.arrays[name].tobytes()
    first, second = (read_summary(folder).evaluation["per_site"] for folder in runs)
    for name in NAMES:  # intervals differ: a deployed hospital draws afresh for each test
        assert [first[name][m]["value"] for m in METRICS] == [second[name][m]["value"] for m in METRICS]


@pytest.mark.parametrize("strategy", ["fedprox", "fedavgm", "fedadam"])
def test_every_strategy_runs(strategy: str, copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    rate = 0.001 if strategy == "fedadam" else 1.0
    folder, _ = run(
        copied_hospitals,
        tmp_path,
        federation__strategy=strategy,
        federation__server_learning_rate=rate,
        federation__rounds=1,
    )
    assert read_summary(folder).evaluation["seen"]["dice"]["value"] is not None


def test_counts_of_too_few_patients_stay_at_the_hospital(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    edit_site(
        copied_hospitals.files["hospital-02"],
        policy={"release": ["encoder", "cls", "seg", "rec"], "metrics": True, "min_patients": 100},
    )
    folder, _ = run(copied_hospitals, tmp_path, federation__rounds=1)
    summary, (line,) = read_summary(folder), read_rounds(folder)
    assert summary.sites["hospital-02"].patients is None
    assert line.sites["hospital-01"].cls is not None
    assert line.sites["hospital-02"].cls is None
    assert line.sites["hospital-02"].bytes_up > 0, "its encoder took part"
    assert set(summary.evaluation["per_site"]) == {"hospital-01"}
    page = (folder / "report.html").read_text()
    assert "hospital-02" in page


def test_a_run_whose_hospitals_keep_every_number_still_trains_and_is_tested(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    for name in NAMES:
        edit_site(copied_hospitals.files[name], policy={"release": ["encoder", "cls", "seg", "rec"], "metrics": False})
    folder, _ = run(copied_hospitals, tmp_path, federation__rounds=1)
    evaluate_unseen(folder, read_config(folder), [copied_hospitals.files["hospital-05"]])
    result = read_summary(folder).evaluation
    assert "seen" not in result
    assert result["unseen"]["auc"]["value"] is not None
    assert result["unseen"]["f1"]["value"] is None
    assert write_report(folder).is_file()


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"federation__epochs": 1}, ConfigError, "unknown config key 'federation.epochs'"),
        ({"federation__heads": "probe"}, ConfigError, "development_site is empty"),
        ({"federation__heads": "ensemble", "federation__share": "all"}, ConfigError, "use 'average'"),
        ({"federation__strategy": "fedadam"}, ConfigError, "federation.server_learning_rate is 1 with"),
        ({"run__id": "none", "run__resume": True}, RunError, "no run 'none'"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anybody_is_asked(
    keys: dict, error: type, text: str, hospitals: SmallHospitals, tmp_path: Path
) -> None:
    flat = small_config(run__folder=str(tmp_path), **keys)
    grid = LoopbackGrid([hospitals.files["hospital-01"]], flat)
    with pytest.raises(error, match=re.escape(text)):
        run_server(grid, flat)
    assert grid.asked == []


def test_a_runs_name_is_used_once(finished: Path, hospitals: SmallHospitals) -> None:
    with pytest.raises(RunError, match="exists"):
        run(hospitals, finished.resolve().parent, run__id="story")


def test_a_run_is_not_resumed_with_another_config(finished: Path, hospitals: SmallHospitals) -> None:
    with pytest.raises(RunError, match="another config"):
        run(hospitals, finished.resolve().parent, run__id="story", run__resume=True, run__seed=5)


def test_a_held_out_node_does_not_train(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    flat = small_config(run__folder=str(tmp_path), federation__rounds=1)
    grid = LoopbackGrid([copied_hospitals.files[n] for n in [*NAMES, "hospital-05"]], flat)
    run_server(grid, flat)
    trained = {m.metadata.dst_node_id for m in grid.asked if m.metadata.message_type == "train"}
    assert trained == {1, 2}
    assert "hospital-05" not in json.loads((tmp_path / "latest" / "summary.json").read_text())["sites"]


def test_site_files_of_the_fixture_are_the_published_form(hospitals: SmallHospitals) -> None:
    content = yaml.safe_load(hospitals.files["hospital-01"].read_text())
    assert {"site", "data", "cache", "role", "policy"} <= content.keys()
