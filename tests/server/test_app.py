"""The whole procedure with real client code on a loopback grid: what it leaves, resuming, heads, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.app import Error, Message

from server.checkpoint import load_checkpoint, read_tensors
from server.evaluate import EvaluationError, evaluate_unseen
from server.report import write_report
from server.results import report_anew
from server.roster import QuorumError
from server.runs import RunError, load_tallies, read_config, read_rounds, read_summary
from shared.config import ConfigError
from shared.metrics import merge_tallies, summarise
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.loopback import LoopbackGrid, run_server

NAMES = ["hospital-01", "hospital-02"]


def run(hospitals: SmallHospitals, folder: Path, **keys: object) -> tuple[Path, LoopbackGrid]:
    """A run of two hospitals; its folder and the grid."""
    flat = small_config(run__folder=str(folder), **keys)
    grid = LoopbackGrid([hospitals.files[n] for n in NAMES], flat)
    run_server(grid, flat)
    return folder / "latest", grid


@pytest.fixture(scope="module")
def finished(hospitals: SmallHospitals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, tested on the held-out hospital."""
    folder, _ = run(hospitals, tmp_path_factory.mktemp("runs"), run__id="story")
    evaluate_unseen(folder, read_config(folder), [hospitals.files["hospital-05"]])
    write_report(folder)
    return folder


def test_the_summary_has_every_field(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary["rounds"] == 2
    assert summary["config_hash"] == read_config(finished).hash()
    assert summary["seconds_per_round"] > 0
    assert set(summary["sites"]) == {"hospital-01", "hospital-02", "hospital-05"}
    for site in summary["sites"].values():
        assert {"patients", "slices", "positives", "role"} <= site.keys()
        assert (site["patients"], site["slices"]) == (10, 30)
    for stage in ("evaluation", "evaluation_before_training"):
        for part in ("seen", "unseen"):
            for metric in ("auc", "f1", "dice"):
                assert summary[stage][part][metric].keys() == {"value", "low", "high", "n_slices", "n_patients"}
        assert set(summary[stage]["per_site"]) == set(summary["sites"])
    encoder, _ = read_tensors(finished / "checkpoint" / "initial.safetensors")
    size = sum(value.nbytes for value in encoder.values())
    assert 2 * size < summary["bytes_up_per_round"] < 2 * (size + 100_000)


def test_the_summary_follows_from_the_counts(finished: Path) -> None:
    result = read_summary(finished)["evaluation"]
    for part in ("seen", "unseen"):
        pooled = summarise(merge_tallies(load_tallies(finished, "final", part).values()), result["threshold_bin"])
        assert result[part]["auc"]["value"] == pooled["auc"].value
        assert result[part]["dice"]["low"] == pooled["dice"].low


def test_training_moved_the_encoder_and_lowered_the_loss(finished: Path) -> None:
    initial, _ = read_tensors(finished / "checkpoint" / "initial.safetensors")
    final = load_checkpoint(finished / "checkpoint")
    assert final.round_number == 2
    assert all(not np.array_equal(initial[n], final.arrays[n]) for n in initial if n.endswith("weight"))
    first, last = read_rounds(finished)
    for name in NAMES:
        assert last["sites"][name]["rec"] < first["sites"][name]["rec"]


def test_the_report_is_one_page_that_needs_no_other(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image") == 3, "curves, ROC, examples"
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    for name in ("hospital-01", "hospital-02", "hospital-05"):
        assert name in page
    auc = read_summary(finished)["evaluation"]["unseen"]["auc"]["value"]
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

    def stop(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train" and asked.content["config"]["server-round"] == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run_server(LoopbackGrid([copied_hospitals.files[n] for n in NAMES], flat, change=stop), flat)
    # The client that was asked had trained round 2 when the server died; it must not train it twice from there.
    resumed, _ = run(copied_hospitals, tmp_path / "b", run__id="stopped", run__resume=True)
    expected, found = load_checkpoint(whole / "checkpoint"), load_checkpoint(resumed / "checkpoint")
    assert [line["round"] for line in read_rounds(resumed)] == [1, 2]
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)


def test_the_same_seed_gives_the_same_run(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    runs = [run(copied_hospitals, tmp_path, run__id=name)[0].resolve() for name in ("one", "two")]
    one, two = (load_checkpoint(folder / "checkpoint") for folder in runs)
    for name, value in one.arrays.items():
        assert value.tobytes() == two.arrays[name].tobytes()
    assert read_summary(runs[0])["evaluation"] == read_summary(runs[1])["evaluation"]


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
    assert read_summary(folder)["evaluation"]["seen"]["dice"]["value"] is not None


def test_an_ensemble_keeps_each_hospitals_heads(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    folder, _ = run(copied_hospitals, tmp_path, federation__heads="ensemble", federation__rounds=1)
    names = sorted(path.name for path in (folder / "checkpoint").glob("heads-final-*"))
    assert names == ["heads-final-hospital-01.safetensors", "heads-final-hospital-02.safetensors"]
    evaluate_unseen(folder, read_config(folder), [copied_hospitals.files["hospital-05"]])
    assert "unseen" in read_summary(folder)["evaluation"]


def test_a_probe_needs_no_heads_of_the_hospitals(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    for name in NAMES:
        edit_site(copied_hospitals.files[name], policy={"release": ["encoder"], "min_patients": 1})
    development = str(copied_hospitals.files["hospital-01"])
    folder, grid = run(
        copied_hospitals,
        tmp_path,
        federation__heads="probe",
        federation__development_site=development,
        federation__rounds=1,
    )
    assert "query.heads" not in {m.metadata.message_type for m in grid.asked}
    result = read_summary(folder)["evaluation"]["seen"]
    assert result["auc"]["value"] is not None
    assert result["dice"]["value"] is None, "a probe has no decoder"


def test_a_probe_is_never_fitted_on_a_held_out_site(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    held_out = str(copied_hospitals.files["hospital-05"])
    with pytest.raises(ConfigError, match="role held-out"):
        run(copied_hospitals, tmp_path, federation__heads="probe", federation__development_site=held_out)


def test_heads_that_a_policy_keeps_stop_the_run_before_anybody_trains(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    edit_site(copied_hospitals.files["hospital-02"], policy={"release": ["encoder"], "min_patients": 1})
    with pytest.raises(QuorumError, match=r"hospital-02 \(not counted\)[\s\S]*its policy\.release is \['encoder'\]"):
        run(copied_hospitals, tmp_path, federation__rounds=1, federation__wait_s=0.0)
    assert not (tmp_path / "latest" / "rounds.jsonl").exists()


def test_heads_that_are_kept_after_all_cost_no_round_and_a_probe_takes_their_place(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    folder, _ = run(copied_hospitals, tmp_path, run__id="late", federation__rounds=1)
    evaluate_unseen(folder, read_config(folder), [copied_hospitals.files["hospital-05"]])
    before = (folder / "rounds.jsonl").read_text()
    edit_site(copied_hospitals.files["hospital-02"], policy={"release": ["encoder"], "min_patients": 1})
    again = {"run__id": "late", "run__resume": True, "federation__rounds": 1, "federation__wait_s": 0.0}
    with pytest.raises(QuorumError, match=r"hospital-02: its policy\.release"):
        run(copied_hospitals, tmp_path, **again)
    assert "unseen" in read_summary(folder)["evaluation"], "what was tested before is not lost"
    assert read_config(folder).federation.heads == "average", "and is said to be of what it is"
    assert read_summary(folder)["rounds"] == 1
    probe = {
        "federation__heads": "probe",
        "federation__development_site": str(copied_hospitals.files["hospital-01"]),
    }
    run(copied_hospitals, tmp_path, **again, **probe)
    assert (folder / "rounds.jsonl").read_text() == before
    assert read_config(folder).federation.heads == "probe"
    assert [path.name for path in (folder / "checkpoint").glob("heads-final-*")] == ["heads-final-probe.safetensors"]
    summary = read_summary(folder)
    assert "unseen" not in summary["evaluation"] | summary["evaluation_before_training"], "it was of other heads"
    assert not (folder / "evaluation" / "examples.png").exists()


def test_counts_that_held_out_hospitals_send_complete_the_report(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    folder, _ = run(copied_hospitals, tmp_path / "centre", federation__rounds=1)
    theirs = tmp_path / "hospital-05" / "run"
    shutil.copytree(folder.resolve(), theirs)
    evaluate_unseen(theirs, read_config(theirs), [copied_hospitals.files["hospital-05"]])
    for stage in ("initial", "final"):
        place = folder / "evaluation" / stage / "unseen"
        place.mkdir()
        shutil.copy(theirs / "evaluation" / stage / "unseen" / "hospital-05.npz", place)
    report_anew(folder)
    there, here = read_summary(theirs)["evaluation"], read_summary(folder)["evaluation"]
    assert here["unseen"] == there["unseen"]
    assert "hospital-05" in (folder / "report.html").read_text()


def test_heads_that_do_not_come_stop_the_run_with_the_reason(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    def refuse(asked: Message, reply: Message) -> Message:
        refused = asked.metadata.message_type == "query.heads" and asked.metadata.dst_node_id == 2
        return Message(Error(1001, "the disk is full"), reply_to=asked) if refused else reply

    flat = small_config(run__folder=str(tmp_path), federation__rounds=1)
    grid = LoopbackGrid([copied_hospitals.files[n] for n in NAMES], flat, change=refuse)
    with pytest.raises(
        QuorumError, match=r"heads came from 1 hospitals[\s\S]*resume[\s\S]*hospital-02: the disk is full"
    ):
        run_server(grid, flat)
    assert load_checkpoint(tmp_path / "latest" / "checkpoint").round_number == 1, "the encoder is not lost"


def sent(folder: Path, stage: str = "final") -> Path:
    return folder / "evaluation" / stage / "unseen" / "hospital-05.npz"


def _renamed(path: Path) -> None:
    for stage in ("initial", "final"):
        file = path.parents[2] / stage / "unseen" / path.name
        file.rename(file.with_name("hospital-06.npz"))


def _letter(path: Path) -> None:
    path.write_bytes(b"a letter")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _one_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def _fewer_samples(path: Path) -> None:
    _change(path, lambda values: values | {"counts": values["counts"][:5]})


def _negative(path: Path) -> None:
    _change(path, lambda values: values | {"counts": -values["counts"]})


def _other_model(path: Path) -> None:
    _change(path, lambda values: values | {"model": "0123456789ab"})


def _change(path: Path, change: Callable[[dict], dict]) -> None:
    with np.load(path) as file:
        values = {name: file[name] for name in file.files}
    np.savez_compressed(path, **change(values))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_renamed, r"hospital-06\.npz holds counts of site 'hospital-05'"),
        (_letter, r"hospital-05\.npz holds no counts of a test"),
        (_empty, r"hospital-05\.npz holds no counts of a test"),
        (_cut, r"hospital-05\.npz holds no counts of a test"),
        (_one_array, r"hospital-05\.npz holds no counts of a test"),
        (_fewer_samples, r"hospital-05\.npz holds no counts of a test .*tally counts: int32 \(5, 2, 1000\)"),
        (_negative, r"hospital-05\.npz holds no counts of a test .*of at least 0"),
        (_other_model, r"hospital-05\.npz is a test of another model \(0123456789ab\) than this run's final one"),
        (Path.unlink, r"counts of \['hospital-05'\] are in one of .*the hospital sends two files"),
    ],
)
def test_counts_that_are_not_of_this_run_are_refused(
    finished: Path, tmp_path: Path, spoil: Callable[[Path], None], told: str
) -> None:
    folder = tmp_path / "story"
    shutil.copytree(finished.resolve(), folder)
    before = (folder / "report.html").read_bytes()
    spoil(sent(folder))
    with pytest.raises((RunError, EvaluationError), match=told):
        report_anew(folder)
    assert (folder / "report.html").read_bytes() == before


def test_a_report_of_no_run_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        report_anew(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_site_is_tested_beside_the_first(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    flat = small_config(run__folder=str(tmp_path), run__id="alone", federation__rounds=1, federation__quorum=1)
    run_server(LoopbackGrid([copied_hospitals.files["hospital-01"]], flat), flat)
    edit_site(copied_hospitals.files["hospital-02"], role="held-out")
    folder = tmp_path / "alone"
    for name in ("hospital-05", "hospital-02"):
        evaluate_unseen(folder, read_config(folder), [copied_hospitals.files[name]])
    unseen = [s for s, r in read_summary(folder)["evaluation"]["per_site"].items() if r["part"] == "unseen"]
    assert unseen == ["hospital-02", "hospital-05"]


def test_counts_of_too_few_patients_stay_at_the_hospital(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    edit_site(
        copied_hospitals.files["hospital-02"],
        policy={"release": ["encoder", "cls", "seg", "rec"], "metrics": True, "min_patients": 100},
    )
    folder, _ = run(copied_hospitals, tmp_path, federation__rounds=1)
    summary, (line,) = read_summary(folder), read_rounds(folder)
    assert "patients" not in summary["sites"]["hospital-02"]
    assert "cls" in line["sites"]["hospital-01"]
    assert "cls" not in line["sites"]["hospital-02"]
    assert "bytes_up" in line["sites"]["hospital-02"], "its encoder took part"
    assert set(summary["evaluation"]["per_site"]) == {"hospital-01"}
    page = (folder / "report.html").read_text()
    assert "hospital-02" in page


def test_a_run_whose_hospitals_keep_every_number_still_trains_and_is_tested(
    copied_hospitals: SmallHospitals, tmp_path: Path
) -> None:
    for name in NAMES:
        edit_site(copied_hospitals.files[name], policy={"release": ["encoder", "cls", "seg", "rec"], "metrics": False})
    folder, _ = run(copied_hospitals, tmp_path, federation__rounds=1)
    evaluate_unseen(folder, read_config(folder), [copied_hospitals.files["hospital-05"]])
    result = read_summary(folder)["evaluation"]
    assert "seen" not in result
    assert result["unseen"]["auc"]["value"] is not None
    assert result["unseen"]["f1"]["value"] is None
    assert write_report(folder).is_file()


def test_sharing_all_needs_no_heads(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    folder, grid = run(copied_hospitals, tmp_path, federation__share="all", federation__rounds=1)
    assert "query.heads" not in {m.metadata.message_type for m in grid.asked}
    heads, _ = read_tensors(folder / "checkpoint" / "heads-final-average.safetensors")
    checkpoint = load_checkpoint(folder / "checkpoint")
    np.testing.assert_array_equal(heads["cls.weight"], checkpoint.arrays["cls.weight"])


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


def test_a_hospital_that_trained_is_no_test(finished: Path, hospitals: SmallHospitals) -> None:
    before = (finished / "summary.json").read_text()
    with pytest.raises(EvaluationError, match="'hospital-01' has role 'train'"):
        evaluate_unseen(
            finished, read_config(finished), [hospitals.files["hospital-05"], hospitals.files["hospital-01"]]
        )
    edit_site(hospitals.files["hospital-01"], role="held-out")
    try:
        with pytest.raises(EvaluationError, match=r"sites \['hospital-01'\] trained in this run"):
            evaluate_unseen(finished, read_config(finished), [hospitals.files["hospital-01"]])
    finally:
        edit_site(hospitals.files["hospital-01"], role="train")
    with pytest.raises(EvaluationError, match="stands twice"):
        evaluate_unseen(finished, read_config(finished), [hospitals.files["hospital-05"]] * 2)
    assert (finished / "summary.json").read_text() == before


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
