"""A centre tests the models of a run, and only those; each once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from client.boundary.audit import read_entries
from client.boundary.evaluations import FILE, MONTH_S, EvaluationsError, LedgerError, reserve
from client.boundary.footing import Footing, ModelNotOfRunError, after_round, check_final, lengths, part
from shared.config import parse_config
from shared.groups import HEADS
from shared.refusals import Refusal
from shared.site import Site
from shared.wire.records import PROBE, Tensors, from_record, shapes_of, tally_from_record
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.asking import NAME, ask, evaluate, evaluation_order, own_heads, refusal, tensors, train_rounds

OPEN = {"release": ["encoder", "cls", "seg", "rec"], "metrics": True, "min_patients": 2}


@pytest.fixture
def file(copied_hospitals: SmallHospitals) -> Path:
    """A hospital's site.yaml; its cells hold at least two patients."""
    edit_site(copied_hospitals.files[NAME], policy=OPEN)
    return copied_hospitals.files[NAME]


def sent(reply: Message) -> dict[str, object]:
    """What a reply holds, byte for byte; but for the newest hash of the audit log, which grows with each reply."""
    assert not reply.has_error(), reply.error.reason
    content = {}
    for name, record in reply.content.items():
        content[name] = {k: v.data if hasattr(v, "data") else v for k, v in record.items() if k != "audit"}
    return content


def changed(arrays: Tensors, name: str, value: float) -> Tensors:
    other = {key: one.copy() for key, one in arrays.items()}
    other[name].flat[0] += value
    return other


def test_one_message_tests_both_splits(file: Path) -> None:
    reply = evaluate(file, "initial")
    assert set(reply.content) == {"facts", "metrics", "tally-val", "tally-test"}
    test = tally_from_record(reply.content["tally-test"], 100)
    assert test.counts.shape[0] == 101
    assert test.patients == dict(reply.content["metrics"])["patients"] == 2
    assert tally_from_record(reply.content["tally-val"], 0).counts.shape[0] == 1


def test_the_same_request_gets_the_same_bytes_and_another_model_the_first_ones_answer(file: Path) -> None:
    """Before, each of 371 requests was answered with new counts of a model of the centre's choice."""
    first = sent(evaluate(file, "initial"))
    assert sent(evaluate(file, "initial")) == first
    assert sent(evaluate(file, "initial", encoder=changed(tensors(("encoder",)), ENCODER, 1.0))) == first
    train_rounds(file, 1)
    assert sent(evaluate(file, "initial")) == first, "a run that is resumed before its first checkpoint asks again"
    events = [entry["event"] for _, _, entry in read_entries(file.parent / "state")]
    assert events == ["released"] * 5


ENCODER, HEAD = "encoder.patch_embed.proj.weight", "cls.weight"


@pytest.mark.parametrize("value", [1e-3, 10.0, 9e7])
@pytest.mark.parametrize("name", [ENCODER, HEAD])
def test_an_initial_model_that_is_not_of_the_seed_is_refused(file: Path, name: str, value: float) -> None:
    changes = {"encoder": tensors(("encoder",)), "heads": tensors(HEADS)}
    key = "encoder" if name == ENCODER else "heads"
    changes[key] = changed(changes[key], name, value)
    assert refusal(evaluate(file, "initial", **changes)) == Refusal.NOT_OF_RUN
    assert not (file.parent / "state" / FILE).exists(), "a refused model uses up nothing"


def test_a_pretrained_encoder_must_be_the_one_that_round_1_begins_with(file: Path) -> None:
    flat = small_config(model__pretrained="swin.safetensors")
    other = changed(tensors(("encoder",)), ENCODER, 1.0)
    assert refusal(evaluate(file, "initial", flat, heads=changed(tensors(HEADS), HEAD, 0.1))) == Refusal.NOT_OF_RUN
    assert not evaluate(file, "initial", flat, encoder=other).has_error()
    content = evaluation_order("initial", encoder=tensors(("encoder",)))
    order = RecordDict({"arrays": content["arrays"], "config": ConfigRecord({"server-round": 1, "run": "test"})})
    assert refusal(ask({"site": str(file)}, "train", order, flat)) == Refusal.NOT_OF_RUN
    order["arrays"] = evaluation_order("initial", encoder=other)["arrays"]
    assert not ask({"site": str(file)}, "train", order, flat).has_error()


def test_round_1_begins_with_the_seeds_encoder(file: Path) -> None:
    content = evaluation_order("initial", encoder=changed(tensors(("encoder",)), ENCODER, 1.0))
    order = RecordDict({"arrays": content["arrays"], "config": ConfigRecord({"server-round": 1, "run": "test"})})
    assert refusal(ask({"site": str(file)}, "train", order)) == Refusal.NOT_OF_RUN


def test_the_initial_model_is_tested_before_training_only(file: Path) -> None:
    train_rounds(file, 1)
    assert refusal(evaluate(file, "initial")) == Refusal.NOT_OF_RUN


def test_the_final_model_is_tested_after_training_only(file: Path) -> None:
    assert refusal(evaluate(file, "final")) == Refusal.NOT_TRAINED


def test_the_final_model_is_the_one_that_the_rounds_led_to(file: Path) -> None:
    encoder, heads = train_rounds(file, 2), own_heads(file)
    crafted = {name: np.zeros_like(value) for name, value in encoder.items()}
    assert refusal(evaluate(file, "final", encoder=crafted, heads=heads)) == Refusal.NOT_OF_RUN
    far = changed(encoder, ENCODER, 30.0)
    assert refusal(evaluate(file, "final", encoder=far, heads=heads)) == Refusal.NOT_OF_RUN
    for name in (HEAD, "cls.norm.running_var", "seg.norm.weight"):
        far = changed(heads, name, 30.0)
        assert refusal(evaluate(file, "final", encoder=encoder, heads=far)) == Refusal.NOT_OF_RUN
    assert refusal(evaluate(file, "final", encoder=encoder, heads=heads, second=heads)) == Refusal.ORDER
    first = sent(evaluate(file, "final", encoder=encoder, heads=heads))
    assert sent(evaluate(file, "final", encoder=crafted, heads=heads)) == first


def test_an_ensemble_has_as_many_heads_as_the_run_config_says(file: Path) -> None:
    flat = small_config(federation__heads="ensemble", federation__rounds=1)
    encoder = train_rounds(file, 1, flat=flat)
    heads = own_heads(file, flat=flat)
    many = {f"h{number}": heads for number in range(32)}
    assert refusal(evaluate(file, "final", flat, encoder=encoder, heads=heads, **many)) == Refusal.ORDER
    far = {"other": changed(heads, HEAD, 30.0)}
    assert refusal(evaluate(file, "final", flat, encoder=encoder, heads=heads, **far)) == Refusal.NOT_OF_RUN
    assert not evaluate(file, "final", flat, encoder=encoder, heads=heads, other=heads).has_error()


def test_a_probe_is_a_head_for_classification_of_bounded_size(file: Path) -> None:
    flat = small_config(federation__heads="probe", federation__rounds=1)
    encoder = train_rounds(file, 1, flat=flat)
    probe = {name: tensors(HEADS)[name] for name in PROBE}
    huge = changed(probe, HEAD, 1000.0)
    assert refusal(evaluate(file, "final", flat, encoder=encoder, heads=huge)) == Refusal.NOT_OF_RUN
    assert refusal(evaluate(file, "final", flat, encoder=encoder)) == Refusal.TENSORS
    reply = evaluate(file, "final", flat, encoder=encoder, heads=probe)
    assert tally_from_record(reply.content["tally-test"], 100).dice_slices.sum() == 0


def test_sharing_all_ties_the_heads_like_the_encoder(file: Path) -> None:
    flat = small_config(federation__share="all", federation__rounds=1)
    order = {"server-round": 1, "run": "test"}
    content = RecordDict(
        {"arrays": evaluation_order("initial", tensors(("encoder", *HEADS)))["arrays"], "config": ConfigRecord(order)}
    )
    reply = ask({"site": str(file)}, "train", content, flat)
    after = from_record(reply.content["update"], shapes_of(tensors(("encoder", *HEADS))))
    encoder = {n: v for n, v in after.items() if n.startswith("encoder.")}
    heads = {n: v for n, v in after.items() if not n.startswith("encoder.")}
    assert (
        refusal(evaluate(file, "final", flat, encoder=encoder, heads=changed(heads, HEAD, 30.0))) == Refusal.NOT_OF_RUN
    )
    assert not evaluate(file, "final", flat, encoder=encoder, heads=heads).has_error()


@pytest.mark.parametrize(("limits", "answered"), [({"evaluations_per_run": 1}, 1), ({"evaluations_per_month": 3}, 3)])
def test_a_hospital_tests_as_often_as_its_policy_says(file: Path, limits: dict, answered: int) -> None:
    edit_site(file, policy=OPEN | limits)
    codes = []
    for run in ("one", "two", "three", "four") if "evaluations_per_month" in limits else ("one",):
        codes.append(evaluate(file, "initial", run=run).has_error())
    if "evaluations_per_run" in limits:
        encoder = train_rounds(file, 2, run="one")
        reply = evaluate(file, "final", run="one", encoder=encoder, heads=own_heads(file, "one"))
        codes.append(refusal(reply) == Refusal.EVALUATIONS)
    assert codes == [False] * answered + [True]


def test_a_run_whose_state_was_cleaned_away_is_not_tested_again(file: Path) -> None:
    evaluate(file, "initial")
    shutil.rmtree(file.parent / "state" / "runs")
    assert not evaluate(file, "initial").has_error(), (
        "the same model may be scored again: its answer may have been cut off"
    )
    shutil.rmtree(file.parent / "state" / "runs")
    flat = small_config(run__seed=1)
    other = {"encoder": tensors(("encoder",), flat), "heads": tensors(HEADS, flat)}
    assert refusal(evaluate(file, "initial", flat, **other)) == Refusal.EVALUATIONS


def test_tests_of_the_last_thirty_days_count(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site(NAME)
    site = replace(site, policy=replace(site.policy, evaluations_per_month=2))
    reserve(site, "a", "initial", "1", now=0.0)
    reserve(site, "b", "initial", "1", now=10.0)
    with pytest.raises(EvaluationsError):
        reserve(site, "c", "initial", "1", now=MONTH_S - 1)
    with pytest.raises(EvaluationsError):
        reserve(site, "c", "initial", "1", now=-5.0)  # a clock that was put back
    reserve(site, "c", "initial", "1", now=MONTH_S + 5)


@pytest.mark.parametrize("damage", [b"not JSON\n", b'{"run": "a"}\n', b"[1]\n", b"\xff\xfe\n"])
def test_a_damaged_list_of_tests_stops_tests(copied_hospitals: SmallHospitals, damage: bytes) -> None:
    site: Site = copied_hospitals.site(NAME)
    reserve(site, "a", "initial", "1")
    with open(site.state / FILE, "ab") as file:
        file.write(damage)
    with pytest.raises(LedgerError):
        reserve(site, "b", "initial", "1")


def test_a_damaged_answer_is_not_made_again(file: Path) -> None:
    evaluate(file, "initial")
    (file.parent / "state" / "runs" / "test" / "answer-initial.npz").write_bytes(b"half")
    assert refusal(evaluate(file, "initial")) == Refusal.STATE


def test_the_list_of_tests_names_run_stage_and_model(file: Path) -> None:
    reply = evaluate(file, "initial")
    (line,) = (file.parent / "state" / FILE).read_text().splitlines()
    entry = json.loads(line)
    assert (entry["run"], entry["stage"], entry["model"]) == ("test", "initial", reply.content["facts"]["model"])


def test_a_split_of_too_few_patients_stays_and_both_are_refused_before_scoring(file: Path) -> None:
    edit_site(file, policy=OPEN | {"min_patients": 3})
    assert refusal(evaluate(file, "initial")) == Refusal.METRICS
    assert not (file.parent / "state" / FILE).exists()


def model_arrays() -> tuple[Tensors, Tensors]:
    draw = np.random.default_rng(0)
    encoder = {"encoder.a": draw.normal(size=100).astype(np.float32)}
    heads = {"cls.w": np.ones(4, np.float32), "cls.norm.running_mean": np.zeros(4, np.float32)}
    return encoder, heads


def test_reach_grows_with_own_updates_missed_rounds_and_the_servers_step() -> None:
    encoder, heads = model_arrays()
    trained = {"encoder.a": encoder["encoder.a"] + np.float32(0.1)}  # an update of length 1
    own = {"cls.w": heads["cls.w"] + 1, "cls.norm.running_mean": heads["cls.norm.running_mean"] + 1}
    footing = after_round(None, 2, encoder, trained)
    assert footing.steps == {"encoder": pytest.approx(1.0, abs=1e-3)}

    def admitted(length: float, **keys: object) -> bool:
        config = parse_config(small_config(**keys))
        far = {"encoder.a": encoder["encoder.a"] + np.float32(length / 10)}
        try:
            check_final(config, footing, far, [own], own, heads)
        except ModelNotOfRunError:
            return False
        return True

    assert admitted(3.9)
    assert not admitted(4.1)
    assert admitted(7.9, federation__rounds=3)
    assert not admitted(8.2, federation__rounds=3)
    assert not admitted(0.0, federation__rounds=13), "eleven rounds missed"
    assert admitted(39.0, federation__strategy="fedavgm")
    assert admitted(29.0, federation__strategy="fedadam", federation__server_learning_rate=1.0)
    assert not admitted(31.0, federation__strategy="fedadam", federation__server_learning_rate=1.0)


def test_lengths_are_of_parts_and_the_longest_update_is_kept() -> None:
    assert part("cls.norm.running_var") == "cls.running"
    one = {"cls.a": np.array([3.0]), "cls.b": np.array([4.0]), "seg.x": np.full(3, 3e38, np.float32)}
    zero = {name: np.zeros_like(value) for name, value in one.items()}
    found = lengths(one, zero)
    assert found["cls"] == 5.0
    assert np.isfinite(found["seg"])
    before = Footing(1, {}, {"cls": 9.0})
    small = {"cls.a": np.array([0.0], np.float32)}
    assert after_round(before, 2, small, {"cls.a": np.array([2.0], np.float32)}).steps == {"cls": 9.0}
    assert isinstance(after_round(None, 2, small, small).received["cls.a"], torch.Tensor)
