"""Held-out hospitals: tested here, or on their own machine with counts that they send."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from server.evaluation.evaluate import EvaluationError, evaluate_unseen
from server.evaluation.results_table import report_anew
from server.storage.run_folder import RunError, read_config, read_summary
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.loopback import LoopbackGrid, run_server
from tests.support.rounds import run


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
    there, here = read_summary(theirs).evaluation, read_summary(folder).evaluation
    assert here["unseen"] == there["unseen"]
    assert "hospital-05" in (folder / "report.html").read_text()


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


def _bomb(file: Path) -> None:
    """Before: 1.5 MB that were 1.6 GB, read whole before anybody looked."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("counts.npy", "w") as part:
        for _ in range(200):
            part.write(bytes(1_000_000))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_renamed, r"hospital-06\.npz holds counts of site 'hospital-05'"),
        (_letter, r"hospital-05\.npz holds no counts of a test"),
        (_empty, r"hospital-05\.npz holds no counts of a test"),
        (_cut, r"hospital-05\.npz holds no counts of a test"),
        (_one_array, r"hospital-05\.npz holds no counts of a test"),
        (_fewer_samples, r"hospital-05\.npz holds no counts of a test .*tally counts: int32 \(5, 2, \d+\)"),
        (_negative, r"hospital-05\.npz holds no counts of a test .*finite values from 0 to"),
        (_bomb, r"hospital-05\.npz holds no counts of a test \(ValueError: it unpacks to 200 MB"),
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


def test_a_test_that_was_cut_off_between_the_two_models_is_done_again(
    finished: Path, hospitals: SmallHospitals, tmp_path: Path
) -> None:
    folder = tmp_path / "story"
    shutil.copytree(finished.resolve(), folder)
    sent(folder).unlink()
    evaluate_unseen(folder, read_config(folder), [hospitals.files["hospital-05"]])
    assert values(folder) == values(finished)


def values(folder: Path) -> dict:
    """Site -> metrics without their intervals, whose draws are fresh in each test."""
    sites = read_summary(folder).evaluation["per_site"]
    return {site: [found[name]["value"] for name in ("auc", "f1", "dice")] for site, found in sites.items()}


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
    unseen = [s for s, r in read_summary(folder).evaluation["per_site"].items() if r["part"] == "unseen"]
    assert unseen == ["hospital-02", "hospital-05"]


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
