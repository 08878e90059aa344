"""What the global model uses as heads, and what becomes of a run whose hospitals keep theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from server.evaluation.evaluate import evaluate_unseen
from server.federation.roster import QuorumError
from server.storage.checkpoint import load_checkpoint, read_tensors
from server.storage.run_folder import read_config, read_summary
from shared.config import ConfigError, parse_config
from shared.groups import HEADS
from shared.model.scoring import build_model
from shared.wire.records import to_arrays, to_record
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.loopback import Change, LoopbackGrid, run_server
from tests.support.rounds import NAMES, run


def test_an_ensemble_keeps_each_hospitals_heads(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    folder, _ = run(copied_hospitals, tmp_path, federation__heads="ensemble", federation__rounds=1)
    names = sorted(path.name for path in (folder / "checkpoint").glob("heads-final-*"))
    assert names == ["heads-final-hospital-01.safetensors", "heads-final-hospital-02.safetensors"]
    evaluate_unseen(folder, read_config(folder), [copied_hospitals.files["hospital-05"]])
    assert "unseen" in read_summary(folder).evaluation


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
    result = read_summary(folder).evaluation["seen"]
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
    assert "unseen" in read_summary(folder).evaluation, "what was tested before is not lost"
    assert read_config(folder).federation.heads == "average", "and is said to be of what it is"
    assert read_summary(folder).rounds == 1
    probe = {
        "federation__heads": "probe",
        "federation__development_site": str(copied_hospitals.files["hospital-01"]),
    }
    run(copied_hospitals, tmp_path, **again, **probe)
    assert (folder / "rounds.jsonl").read_text() == before
    assert read_config(folder).federation.heads == "probe"
    assert [path.name for path in (folder / "checkpoint").glob("heads-final-*")] == ["heads-final-probe.safetensors"]
    summary = read_summary(folder)
    assert "unseen" not in summary.evaluation | summary.evaluation_before_training, "it was of other heads"
    assert not (folder / "evaluation" / "examples.png").exists()


def pulled_heads(value: float) -> Change:
    """A third hospital that trains nothing and sends heads of one value."""

    def change(asked: Message, reply: Message) -> Message:
        kind, facts = asked.metadata.message_type, ConfigRecord({"site": "hospital-05"})
        if asked.metadata.dst_node_id != 3 or kind not in ("train", "query.heads"):
            return reply
        if kind == "train":
            return Message(RecordDict({"update": asked.content["arrays"], "facts": facts}), reply_to=asked)
        state = build_model(parse_config(small_config()).model, 0).state_dict()
        heads = {name: np.full_like(tensor, value) for name, tensor in to_arrays(state, HEADS).items()}
        return Message(RecordDict({"update": to_record(heads), "facts": facts}), reply_to=asked)

    return change


@pytest.mark.parametrize(
    ("keys", "largest"),
    [
        ({"federation__rule": "median"}, 50),
        ({"federation__norm_bound": 1.0}, 50),
        ({}, 1e5),  # the plain mean takes what it is given
    ],
)
def test_heads_are_combined_by_the_rule_of_the_rounds(
    copied_hospitals: SmallHospitals, tmp_path: Path, keys: dict[str, object], largest: float
) -> None:
    """Before: with a median and a bound, heads of 1e8 from one of five hospitals were averaged in all the same."""
    edit_site(copied_hospitals.files["hospital-05"], role="train")
    flat = small_config(run__folder=str(tmp_path), federation__rounds=1, federation__quorum=3, **keys)
    sites = [copied_hospitals.files[name] for name in (*NAMES, "hospital-05")]
    run_server(LoopbackGrid(sites, flat, change=pulled_heads(9e5)), flat)
    heads, _ = read_tensors(tmp_path / "latest" / "checkpoint" / "heads-final-average.safetensors")
    most = max(float(np.abs(value).max()) for value in heads.values())
    assert (most > largest) if not keys else (most < largest)
    assert all((value >= 0).all() for name, value in heads.items() if name.endswith("running_var"))


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


def test_sharing_all_needs_no_heads(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    folder, grid = run(copied_hospitals, tmp_path, federation__share="all", federation__rounds=1)
    assert "query.heads" not in {m.metadata.message_type for m in grid.asked}
    heads, _ = read_tensors(folder / "checkpoint" / "heads-final-average.safetensors")
    checkpoint = load_checkpoint(folder / "checkpoint")
    np.testing.assert_array_equal(heads["cls.weight"], checkpoint.arrays["cls.weight"])
