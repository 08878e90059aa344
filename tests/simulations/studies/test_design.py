from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import simulations.studies.consortia as consortia
import simulations.studies.design as experiments
import simulations.studies.experiments_page as experiments_page
import simulations.studies.runner as runner
import simulations.studies.tables as tables
from server.storage.checkpoint import load_checkpoint
from shared.config import parse_config
from simulations.phantom.hospitals import HOSPITALS
from simulations.phantom.patient import FEATURES
from simulations.studies.consortia import CAUSES, consortium
from simulations.studies.design import (
    Arm,
    Experiment,
    Job,
    Training,
    all_experiments,
    jobs,
    read_experiment,
    trainings,
)
from simulations.studies.results import read_result, state
from simulations.studies.runner import run_jobs
from simulations.studies.tables import scores_table, text
from simulations.studies.training import StudyError, adjust_weights, pool, read_trained, save_trained, train, with_steps
from tests.conftest import SmallHospitals, small_config
from tests.support.cohorts import bleeding
from tests.support.loopback import LoopbackGrid, run_server

NAMES = ["hospital-01", "hospital-02"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"federation__codec": "int2"},
        {"federation__strategy": "fedadam", "federation__server_learning_rate": 0.01},
    ],
)
def test_a_loop_here_is_the_run_through_flower(
    copied_hospitals: SmallHospitals, tmp_path: Path, changes: dict[str, object]
) -> None:
    flat = small_config(run__folder=str(tmp_path), run__id="flower", **changes)
    run_server(LoopbackGrid([copied_hospitals.files[n] for n in NAMES], flat), flat)
    expected = load_checkpoint(tmp_path / "flower" / "checkpoint")
    trained = train({n: copied_hospitals.cache(n) for n in NAMES}, parse_config(flat), "federated")
    assert trained.encoder.keys() == expected.arrays.keys()
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(trained.encoder[name], value, err_msg=name)
    assert sorted(trained.heads) == NAMES
    assert len(trained.trace) == 2


def test_one_site_federated_is_the_site_alone(hospitals: SmallHospitals) -> None:
    config, cache = parse_config(small_config()), hospitals.cache("hospital-01")
    one, other = (train({"hospital-01": cache}, config, mode) for mode in ("federated", "alone"))
    for name, value in one.encoder.items():
        np.testing.assert_array_equal(other.encoder[name], value)
    with pytest.raises(StudyError, match="with 2 hospitals, expected one"):
        train(dict.fromkeys(NAMES, cache), config, "alone")


def test_pooled_hospitals_keep_all_slices_and_splits(hospitals: SmallHospitals) -> None:
    caches = {n: hospitals.cache(n) for n in NAMES}
    whole = pool(caches)
    assert len(whole.label) == sum(len(c.label) for c in caches.values())
    assert len(whole.rows("train")) == sum(len(c.rows("train")) for c in caches.values())
    np.testing.assert_array_equal(whole.hu[: len(caches[NAMES[0]].hu)], caches[NAMES[0]].hu)


def test_equal_weights_without_gaps_and_more_weight_where_the_global_model_is_worse() -> None:
    even = {"a": 0.25, "b": 0.25, "c": 0.5}
    assert adjust_weights(even, dict.fromkeys(even, 0.3), 0.1) == even
    moved = adjust_weights(even, {"a": 2.0, "b": 1.0, "c": 0.0}, 0.1)  # centre 1, widest 1
    assert moved == pytest.approx({"a": 0.35, "b": 0.25, "c": 0.4})
    held = adjust_weights({"a": 0.04, "b": 0.96}, {"a": 0.0, "b": 1.0}, 0.5)
    assert held["a"] > 0
    assert sum(held.values()) == pytest.approx(1.0)


def test_a_training_with_adjusted_weights_is_another_one(hospitals: SmallHospitals) -> None:
    caches = {n: hospitals.cache(n) for n in NAMES}
    config = parse_config(small_config())
    plain, adjusted = (train(caches, config, "federated", adjust=flag) for flag in (False, True))
    assert any((plain.encoder[n] != adjusted.encoder[n]).any() for n in plain.encoder)


def test_a_training_is_read_as_it_was_written(hospitals: SmallHospitals, tmp_path: Path) -> None:
    trained = train({"hospital-01": hospitals.cache("hospital-01")}, parse_config(small_config()), "alone")
    save_trained(tmp_path / "m", trained)
    again = read_trained(tmp_path / "m")
    assert (again.seconds, again.images, again.trace) == (trained.seconds, trained.images, trained.trace)
    for name, value in trained.encoder.items():
        np.testing.assert_array_equal(again.encoder[name], value)
    assert again.heads.keys() == trained.heads.keys()


def test_steps_become_rounds(hospitals: SmallHospitals) -> None:
    caches = {n: hospitals.cache(n) for n in NAMES}  # 10 patients of 3 slices, 6 of them train: 18 slices, 3 steps of 8
    config = with_steps(parse_config(small_config()), caches, 30)
    assert config.federation.rounds == 30 // -(-np.mean([len(c.rows("train")) for c in caches.values()]) // 8)


def test_every_experiment_can_be_read_and_every_arm_runs_a_known_recipe() -> None:
    names = [experiment.name for experiment in all_experiments()]
    assert len(names) == len(set(names)) >= 9
    for experiment in all_experiments():
        assert len(experiment.seeds) >= 3
        results = [job.result for job in jobs(experiment)]
        assert len(results) == len(set(results)) == len(experiment.seeds) * len(experiment.arms)
        for job in jobs(experiment):
            assert job.digest() == job.digest()
            job.arm.run_config(job.seed)
            assert trainings(job)


def test_consortia_change_one_thing_at_a_time() -> None:
    causes = consortium("causes").tests
    reference = causes["reference"][0]
    for cause in CAUSES.keys() - {"reference"}:
        (hospital,) = causes[cause]
        changed = [k for k in ("scanner", "cohort") if getattr(hospital, k) != getattr(reference, k)]
        assert len(changed) == 1
        a, b = (vars(getattr(h, changed[0])) for h in (reference, hospital))
        assert sum(a[key] != b[key] for key in a) == 1
        assert hospital.number == reference.number  # the same patients
    for feature in FEATURES:
        group = consortium(f"planted {feature}")
        assert {h.cohort.rho for h in group.training} == {0.9}
        assert {h.cohort.rho for h in group.tests["rho -0.9"]} == {-0.9}
    with pytest.raises(KeyError):
        consortium("planted nothing")


TINY = """
title = "t"
question = "q"
expected = "e"
reference = "multi"
seeds = [0, 1]
table = "groups"

[all]
steps = 2

[[arms]]
name = "cls"
config = { "loss.seg" = 0.0, "loss.rec" = 0.0 }
measures = ["attention", "ceiling"]

[[arms]]
name = "multi"
consortium = "planted corner"
measures = ["attention", "reliance", "cosines"]

[[arms]]
name = "alone"
mode = "alone"

[[arms]]
name = "probe"
mode = "federated"
heads = "probe"
last = 0.5
against = "cls"
measures = ["similarity"]

[[arms]]
name = "adapted"
mode = "federated"
adapt = "reconstruction"

[[arms]]
name = "calibrated"
mode = "federated"
adapt = "calibration"
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment on two small hospitals and two others, in folders of its own."""
    few = [bleeding(h, 10, 3) for h in HOSPITALS]
    monkeypatch.setattr(consortia, "TRAINING", tuple(few[:2]))
    monkeypatch.setattr(consortia, "HELD_OUT", tuple(replace(h, patients=6) for h in few[4:6]))
    monkeypatch.setattr(experiments, "FOLDER", tmp_path / "experiments")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments_page, "FOLDER", tmp_path / "experiments")
    monkeypatch.setattr(experiments_page, "PAGE", tmp_path / "EXPERIMENTS.md")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tiny.toml").write_text(TINY)
    return read_experiment("tiny")


def test_an_experiment_runs_resumes_and_makes_its_table(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simulations.studies.trials import draw_for, measure_job, train_one

    store, wanted = tmp_path / "store", [job for job in jobs(tiny) if job.seed == 0]
    assert state(tiny) == (0, 0, 12)
    said: list[str] = []
    draw_for(wanted, store, said.append)
    assert said
    for job in wanted:  # as run_jobs does, in this process, where the small hospitals are
        for training in trainings(job):
            if not training.folder(store).is_dir():
                train_one(training, store)
        measure_job(job, store, "0000")
    assert state(tiny) == (6, 0, 12)
    result = read_result(tiny, "multi")
    assert result is not None
    assert result.seeds == (0,)
    content = result.contents[0]
    assert content["commit"] == "0000"
    assert content["config"]["run.seed"] == 0
    assert content["slices_trained"] > 0
    assert set(content["measures"]["scores"]) == {"val", "seen", "rho 0", "rho -0.9"}
    assert set(content["measures"]["reliance"]) == {"shift", "flips"}
    shares = content["measures"]["attention"]["seen"]
    assert sum(v for k, v in shares.items() if k.startswith("cam_")) == pytest.approx(1)
    cosines = content["measures"]["cosines"]
    assert len(cosines) >= 1
    assert all(-1 <= c["cls-seg"] <= 1 for c in cosines)
    similar = read_result(tiny, "probe").contents[0]["measures"]["similarity"]
    assert len(similar["cka"]) == 4
    assert all(0 <= v <= 1 for v in similar["cka"])
    ceiling = read_result(tiny, "cls").contents[0]["measures"]["ceiling"]
    scores = ceiling["oracle"]["unseen"]["all"]
    known = [i for i, v in enumerate(scores["label"]) if v != "-"]
    labels, logits = [int(scores["label"][i]) for i in known], [scores["logit"][i] for i in known]
    assert roc_auc_score(labels, logits) > 0.9  # who sees the lesion without noise can tell
    lines = scores_table(
        replace(tiny, arms=tuple(a for a in tiny.arms if a.name != "multi"), reference="cls")
    ).splitlines()
    assert len(lines) == 2 + 5
    assert "not run" not in "".join(lines)

    # The page and the files' heads, twice the same; every table can be made.
    pages = []
    for _ in range(2):
        pages.append(experiments_page.write_tables().read_text() + (experiments.FOLDER / "tiny.toml").read_text())
    assert pages[0] == pages[1]
    assert "6 of 12 results stored" in pages[0]
    assert read_experiment("tiny") == tiny
    for arms, kind in (
        (("cls",), "baseline"),
        (("multi",), "spurious"),
        (("probe", "multi", "cls"), "similarity"),
        (("multi",), "groups"),
    ):
        part = replace(tiny, arms=tuple(tiny.arm(name) for name in arms), table=kind, reference=arms[0])
        made = tables.TABLES[kind](part)
        assert "not run" not in made
        assert made.count("|") >= 20

    # What is stored is not run again; another recipe of the same arm is.
    before = {job.result: job.result.stat().st_mtime_ns for job in wanted}
    said = []
    run_jobs(wanted, store, workers=1, say=said.append)
    assert said == ["6 of 6 results are stored"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = Job(tiny, replace(tiny.arm("cls"), steps=4), 0)
    assert not other.done()


def test_an_arm_is_measured_as_soon_as_its_models_are_there(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def note(kind: str) -> Callable[..., str]:
        def work(what: Training | Job, store: Path, *_: object) -> str:
            order.append(kind)
            if isinstance(what, Training):
                what.folder(store).mkdir(parents=True)
            return kind

        return work

    # The order of the pieces alone: threads in place of processes, and pieces that only take note.
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(runner, "draw_for", lambda jobs, store, say: None)
    monkeypatch.setattr(runner, "train_one", note("train"))
    monkeypatch.setattr(runner, "measure_job", note("measure"))
    wanted = [job for job in jobs(tiny) if job.seed == 0]
    said: list[str] = []
    run_jobs(wanted, tmp_path / "store", workers=1, say=said.append)
    # cls; multi; two alone; then the federation that three arms share, one of them with weights averaged: two models.
    assert order == [
        "train",
        "measure",
        "train",
        "measure",
        "train",
        "train",
        "measure",
        "train",
        "measure",
        "train",
        "measure",
        "measure",
    ]
    assert said[-1].startswith("12 of 12: measure; about 0 min left")


def test_a_damaged_or_foreign_result_is_not_taken(tiny: Experiment) -> None:
    job = next(jobs(tiny))
    job.result.parent.mkdir(parents=True)
    for content in ("", "{}", '{"recipe": "other"}'):
        job.result.write_text(content)
        assert not job.done()
    job.result.write_text(json.dumps({"recipe": job.digest()}))
    assert job.done()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "alone"', 'name = "cls"', "expected each name once"),
        ('reference = "multi"', 'reference = "none"', "reference 'none'"),
        ('mode = "alone"', 'mode = "lonely"', "mode is 'lonely', expected one of"),
        ('heads = "probe"', 'heads = "none"', "heads is 'none'"),
        ("steps = 2", "stepps = 2", "unknown key 'stepps'"),
        ('"loss.seg" = 0.0', '"loss.sge" = 0.0', "did you mean 'loss.seg'"),
        ('"planted corner"', '"planted hat"', "planted hat"),
        ('["similarity"]', '["likeness"]', "expected of"),
        ('title = "t"', "", "title"),
        ('against = "cls"', 'against = "clss"', "against is 'clss'"),
    ],
)
def test_a_wrong_experiment_says_what_and_where(tiny: Experiment, before: str, after: str, message: str) -> None:
    path = experiments.FOLDER / "tiny.toml"
    path.write_text(TINY.replace(before, after, 1))
    with pytest.raises(StudyError, match=message.replace("[", r"\[")):
        read_experiment("tiny")
    with pytest.raises(StudyError, match="no experiment 'nothing'; there are: tiny"):
        read_experiment("nothing")


def test_an_interval_is_written_as_a_value_with_its_bounds() -> None:
    rows = np.concatenate([[0.5], np.linspace(0, 1, 1001)])
    assert text(rows) == ".500 [.025, .975]"
    assert text(rows - 1, signed=True) == "-.500 [-.975, -.025]"
    assert text(np.full(5, np.nan)) == "–"
    assert text(np.full(5, 10.5)) == "10.500 [10.500, 10.500]"


def test_an_arm_with_an_unknown_config_key_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        Arm("a", config={"train.batchs": 3}).run_config(0)
