"""What a hospital answers, through Flower's real ClientApp: the last code before anything leaves."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, RecordDict

from client.boundary.audit import read_entries, verify
from shared.groups import HEADS
from shared.refusals import Refusal, code_of_key
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.asking import NAME, ask, refusal, train_order


def detail(hospitals: SmallHospitals) -> str:
    """What the hospital's own audit log says of the last refusal."""
    return audit_entries(hospitals)[-1]["reason"]


def test_hello_tells_public_facts_and_counts(hospitals: SmallHospitals) -> None:
    reply = ask({"site": str(hospitals.files[NAME])}, "query.hello")
    facts = dict(reply.content["facts"])
    assert len(facts.pop("audit")) == 64
    assert facts == {
        "site": NAME,
        "role": "train",
        "release": "encoder,cls,seg,rec",
        "protocol": 4,
        "withheld": "",
    }
    cache = hospitals.cache(NAME)
    counts = dict(reply.content["metrics"])
    assert counts["slices"] == len(cache.label)
    assert counts["positives"] == int(np.nansum(cache.label))


def test_hello_withholds_counts_that_the_policy_keeps(copied_hospitals: SmallHospitals) -> None:
    edit_site(copied_hospitals.files[NAME], policy={"metrics": False})
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "query.hello")
    assert list(reply.content.keys()) == ["facts"]
    assert reply.content["facts"]["withheld"] == "policy.metrics is false"


def test_a_round_leaves_the_heads_on_the_hospitals_disk(copied_hospitals: SmallHospitals) -> None:
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", train_order())
    assert {n.split(".")[0] for n in reply.content["update"]} == {"encoder"}
    kept = list((copied_hospitals.site(NAME).state / "runs" / "test").iterdir())
    assert sorted(path.name for path in kept) == ["answer-round-00001.npz", "footing.pt", "round-00001.pt"]


@pytest.mark.parametrize("group", HEADS)
def test_heads_leave_only_if_the_policy_releases_them(copied_hospitals: SmallHospitals, group: str) -> None:
    node = {"site": str(copied_hospitals.files[NAME])}
    order = RecordDict({"config": ConfigRecord({"run": "test", "groups": group})})
    assert refusal(ask(node, "query.heads", order)) == Refusal.NOT_TRAINED
    ask(node, "train", train_order())
    assert {n.split(".")[0] for n in ask(node, "query.heads", order).content["update"]} == {group}
    edit_site(copied_hospitals.files[NAME], policy={"release": ["encoder"], "min_patients": 1})
    refused = ask(node, "query.heads", order)
    assert refusal(refused) == Refusal.GROUP
    assert f"does not release tensor group '{group}'" in detail(copied_hospitals)


def test_an_unforeseen_error_leaves_as_its_type_alone(copied_hospitals: SmallHospitals) -> None:
    secret = "DOE^JANE 1950-01-01"
    index = copied_hospitals.site(NAME).cache / "index.csv"
    head, first, *rest = index.read_text().splitlines()
    row = first.split(",")
    row[head.split(",").index("label")] = secret
    index.write_text("\n".join([head, ",".join(row), *rest]) + "\n")
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "query.hello")
    assert refusal(reply) == Refusal.FAILED
    assert "DOE" not in detail(copied_hospitals)


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"train.epoch": 1}, Refusal.RUN_CONFIG, "did you mean 'train.epochs'"),
        ({"model.variant": "default"}, Refusal.TENSORS, "expected float32"),
    ],
)
def test_an_order_that_does_not_fit_is_refused_with_the_reason_in_the_hospitals_log(
    copied_hospitals: SmallHospitals, change: dict, code: int, text: str
) -> None:
    node = {"site": str(copied_hospitals.files[NAME])}
    assert refusal(ask(node, "train", train_order(), small_config() | change)) == code
    assert text in detail(copied_hospitals)


def test_a_wrong_file_as_site_tells_the_server_nothing_of_it(hospitals: SmallHospitals) -> None:
    labels = hospitals.site(NAME).labels
    reply = ask({"site": str(labels)}, "query.hello")
    assert refusal(reply) == Refusal.SITE


def audit_entries(hospitals: SmallHospitals) -> list[dict]:
    state = hospitals.site(NAME).state
    assert verify(state).faults == ()
    return [entry for _, _, entry in read_entries(state)]


@pytest.mark.parametrize(
    ("accept", "change", "rule"),
    [
        ({}, {"train.epochs": 10_000}, "train.epochs = 10000: its policy.accept takes at most 50"),
        ({}, {"federation.rounds": 100_000}, "federation.rounds = 100000"),
        ({"train.learning_rate": {"max": 1e-4}}, {"train.learning_rate": 0.1}, "at most 0.0001"),
        ({"model.variant": ["default", "tiny"]}, {}, "model.variant = 'demo': its policy.accept takes only 'default'"),
    ],
)
def test_a_run_outside_of_the_policy_is_refused_and_recorded(
    copied_hospitals: SmallHospitals, accept: dict, change: dict, rule: str
) -> None:
    edit_site(copied_hospitals.files[NAME], policy={"accept": accept})
    order = train_order(run="not-accepted")
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", order, small_config() | change)
    key = next(iter(change), "model.variant")
    assert refusal(reply) == code_of_key(key)
    assert key in reply.error.reason
    assert rule in detail(copied_hospitals)
    assert not (copied_hospitals.site(NAME).state / "runs" / "not-accepted").exists()
    entry = audit_entries(copied_hospitals)[-1]
    assert (entry["event"], entry["asked"], entry["code"]) == ("refused", "train", reply.error.code)
    assert change.items() <= entry["config"].items()


@pytest.mark.parametrize("number", [0, 3])
def test_a_round_that_the_run_does_not_have_is_refused(copied_hospitals: SmallHospitals, number: int) -> None:
    order = train_order(**{"server-round": number})
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", order, small_config(federation__rounds=2))
    assert refusal(reply) == Refusal.ORDER
    assert "server-round is not a whole number from 1 to 2" in detail(copied_hospitals)


@pytest.mark.parametrize("kind", ["train", "query.heads", "evaluate"])
def test_no_work_outside_of_the_hospitals_hours(copied_hospitals: SmallHospitals, kind: str) -> None:
    """Before, tests and heads were answered at any hour."""
    later = datetime.now() + timedelta(hours=2)
    hours = f"{later:%H:%M}-{later + timedelta(hours=1):%H:%M}"
    edit_site(copied_hospitals.files[NAME], policy={"hours": hours, "min_patients": 1})
    node = {"site": str(copied_hospitals.files[NAME])}
    assert refusal(ask(node, kind, train_order())) == Refusal.HOURS
    assert not ask(node, "query.hello").has_error()


def test_what_left_stands_in_the_audit_log(copied_hospitals: SmallHospitals) -> None:
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", train_order())
    entry = audit_entries(copied_hospitals)[-1]
    assert entry["hash"] == reply.content["facts"]["audit"]
    assert (entry["event"], entry["order"]) == ("released", {"server-round": 1, "run": "test"})
    sent = {name: [list(array.shape), len(array.data)] for name, array in reply.content["update"].items()}
    assert {name: [shape, size] for name, shape, size, _ in entry["update"]["tensors"]} == sent
    assert entry["metrics"] == dict(reply.content["metrics"])


def test_nothing_leaves_that_cannot_be_recorded(copied_hospitals: SmallHospitals) -> None:
    log = copied_hospitals.site(NAME).state / "audit.jsonl"
    log.unlink(missing_ok=True)
    log.mkdir(parents=True)
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", train_order())
    assert refusal(reply) == Refusal.AUDIT
    assert not reply.has_content()


def test_tensors_that_are_not_finite_are_refused_on_arrival(copied_hospitals: SmallHospitals) -> None:
    content = train_order()
    name = next(iter(content["arrays"]))
    content["arrays"][name] = Array(content["arrays"][name].numpy() * np.float32("nan"))
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", content)
    assert refusal(reply) == Refusal.TENSORS
    assert name in detail(copied_hospitals)


@pytest.mark.parametrize("run", ["../../etc", "a/b", "", ".hidden", "x" * 200])
def test_a_runs_name_cannot_leave_the_state_folder(copied_hospitals: SmallHospitals, run: str) -> None:
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "train", train_order(run=run))
    assert refusal(reply) == Refusal.ORDER
    assert "run's name" in detail(copied_hospitals)


def test_a_held_out_hospital_does_not_train(copied_hospitals: SmallHospitals) -> None:
    reply = ask({"site": str(copied_hospitals.files["hospital-05"])}, "train", train_order())
    assert refusal(reply) == Refusal.ROLE


def test_a_simulated_node_is_a_training_hospital(hospitals: SmallHospitals) -> None:
    flat = small_config(simulation__hospitals=str(hospitals.root))
    names = [ask({"partition-id": i}, "query.hello", flat=flat).content["facts"]["site"] for i in (0, 1)]
    assert names == ["hospital-01", "hospital-02"]
    beyond = ask({"partition-id": 2, "num-partitions": 3}, "query.hello", flat=flat)
    assert "holds 2 training hospitals" in beyond.error.reason
    assert "num-supernodes=2" in beyond.error.reason


def test_a_deployed_node_takes_no_path_from_the_run_config(hospitals: SmallHospitals, tmp_path: Path) -> None:
    flat = small_config(simulation__hospitals=str(tmp_path))
    reply = ask({"site": str(hospitals.files[NAME]), "partition-id": 7}, "query.hello", flat=flat)
    assert reply.content["facts"]["site"] == NAME


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({}, "no 'site' in its node config"),
        ({"site": "nowhere/site.yaml"}, "its own log has the cause"),
        ({"partition-id": 0}, "hemafed-sim"),
    ],
)
def test_a_node_without_hospital_says_what_to_do(node: dict, text: str, tmp_path: Path) -> None:
    reply = ask(node, "query.hello", flat=small_config(simulation__hospitals=str(tmp_path)))
    assert reply.error.code == Refusal.SITE
    assert text in reply.error.reason
