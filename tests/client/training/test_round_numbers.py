"""Numbers leave with a round once, of the run's own models, and as often as the policy says; rounds are trained all the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.boundary.evaluations import FILE, MONTH_S, EvaluationsError, reserve, round_stage
from client.training.round import RoundReport
from client.training.round_numbers import coarse_losses
from server.federation.round_line import describe_round
from server.federation.strategy import RoundResult, _site_round
from server.storage.checkpoint import Moments
from shared.groups import HEADS
from shared.refusals import Refusal
from shared.wire import records as wire
from shared.wire.records import Tensors, from_record, shapes_of, to_record
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.asking import NAME, ask, evaluate, refusal, tensors, train_rounds

POLICY = {"release": ["encoder", "cls", "seg", "rec"], "metrics": True, "min_patients": 2}
PATCHES = "encoder.patch_embed.proj.weight"


@pytest.fixture
def file(copied_hospitals: SmallHospitals) -> Path:
    """A hospital's site.yaml; numbers that stand for two patients leave."""
    edit_site(copied_hospitals.files[NAME], policy=POLICY)
    return copied_hospitals.files[NAME]


def train(file: Path, number: int, arrays: Tensors, run: str = "test", **keys: object) -> Message:
    order = ConfigRecord({"server-round": number, "run": run})
    reply = ask({"site": str(file)}, "train", RecordDict({"arrays": to_record(arrays), "config": order}), flat(**keys))
    assert not reply.has_error(), reply.error.reason
    return reply


def flat(**keys: object) -> dict:
    return small_config(**({"federation__rounds": 1000} | keys))


def encoder() -> Tensors:
    return tensors(("encoder",))


def update(reply: Message) -> Tensors:
    return from_record(reply.content["update"], shapes_of(encoder()))


def numbers(reply: Message) -> dict[str, object]:
    """What a reply says beside its update, byte for byte."""
    content = {name: dict(record) for name, record in reply.content.items() if name in ("metrics", "tally")}
    content |= {"tally": {k: array.data for k, array in content["tally"].items()}} if "tally" in content else {}
    return content


def withheld(reply: Message) -> str:
    assert set(reply.content) == {"facts", "update"}
    return reply.content["facts"]["withheld"]


def moved(arrays: Tensors, size: float) -> Tensors:
    return arrays | {PATCHES: arrays[PATCHES] + np.float32(size)}


def test_chosen_models_get_no_numbers_from_rounds(file: Path) -> None:
    """Before, with no evaluations allowed, 12 of 12 chosen whole models got an area and exact loss sums, without end."""
    edit_site(file, policy=POLICY | {"evaluations_per_run": 0, "evaluations_per_month": 0})
    everything = tensors(("encoder", *HEADS))
    for number in range(4):
        chosen = everything | {"cls.weight": np.roll(everything["cls.weight"], number + 1, axis=-1) * 10}
        reply = train(file, 2, chosen, f"run-{number % 2}", federation__share="all")
        assert "trained no round" in withheld(reply)
    assert not (file.parent / "state" / FILE).exists(), "what is withheld uses up nothing"


def test_a_round_that_is_asked_again_gets_the_numbers_that_left_before(file: Path) -> None:
    first = train(file, 1, encoder())
    assert set(numbers(first)) == {"metrics", "tally"}
    after = update(first)
    second = train(file, 2, after)
    assert numbers(train(file, 2, after)) == numbers(second)
    other = train(file, 2, moved(after, 1.0))
    assert numbers(other) == numbers(second)
    assert other.content["facts"]["model"] == second.content["facts"]["model"] == wire.tested_hash(after, [])
    assert numbers(train(file, 1, encoder())) == numbers(first)
    assert numbers(train(file, 2, after)) == numbers(second)
    assert len((file.parent / "state" / FILE).read_text().splitlines()) == 2


def test_a_model_that_the_runs_rounds_cannot_have_led_to_gets_no_numbers(file: Path) -> None:
    after = update(train(file, 1, encoder()))
    assert "further from this run's" in withheld(train(file, 2, moved(after, 1.0)))
    assert "trained no round of this run before" in withheld(train(file, 2, after)), "asked again it is not free"


def test_numbers_are_made_once_though_an_answer_was_cut_off(file: Path, copied_hospitals: SmallHospitals) -> None:
    after = update(train(file, 1, encoder()))
    reserve(copied_hospitals.site(NAME), "test", round_stage(2), "another")
    assert "another" in withheld(train(file, 2, after))


def test_who_comes_late_trains_and_gives_numbers_from_its_second_round_on(file: Path) -> None:
    first = train(file, 5, encoder())
    assert withheld(first)
    assert set(numbers(train(file, 6, update(first)))) == {"metrics", "tally"}


def test_who_missed_rounds_gives_numbers_and_who_missed_many_from_its_next_round_on(file: Path) -> None:
    after = update(train(file, 1, encoder()))
    assert numbers(train(file, 4, after))
    after = update(train(file, 40, after))
    assert numbers(train(file, 41, after))


def test_an_untested_pretrained_encoder_gets_no_numbers(file: Path) -> None:
    chosen = {"model__pretrained": "swin.safetensors"}
    assert "initial model" in withheld(train(file, 1, moved(encoder(), 1.0), "one", **chosen))
    assert not evaluate(file, "initial", flat(**chosen), run="two").has_error()
    assert numbers(train(file, 1, encoder(), "two", **chosen))


@pytest.mark.parametrize("limit", [0, 2])
def test_rounds_beyond_the_limit_of_a_month_are_trained_without_numbers(file: Path, limit: int) -> None:
    edit_site(file, policy=POLICY | {"round_counts_per_month": limit})
    arrays, given = encoder(), []
    for number in range(1, 5):
        reply = train(file, number, arrays)
        arrays = update(reply)
        given.append(bool(numbers(reply)))
    assert given == [number <= limit for number in range(1, 5)]
    assert withheld(reply) == f"policy.round_counts_per_month is {limit}"


def test_rounds_and_tests_have_limits_of_their_own(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site(NAME)
    rules = replace(site.policy, evaluations_per_month=1, round_counts_per_month=200)
    site = replace(site, policy=rules)
    for number in range(200):
        reserve(site, "a", round_stage(number), "x", now=number)
    reserve(site, "a", "initial", "x", now=200.0)
    for stage in (round_stage(201), "final"):
        with pytest.raises(EvaluationsError):
            reserve(site, "a", stage, "x", now=201.0)
    reserve(site, "a", round_stage(201), "x", now=MONTH_S + 1)


def test_honest_runs_stay_below_the_default_limit(copied_hospitals: SmallHospitals) -> None:
    site = copied_hospitals.site(NAME)
    for run in ("one", "two"):
        for number in range(200):
            reserve(site, run, round_stage(number), "x", now=1.0)
    with pytest.raises(EvaluationsError, match="round_counts_per_month is 400"):
        reserve(site, "three", round_stage(1), "x", now=2.0)


def test_losses_leave_with_four_digits(file: Path) -> None:
    report = RoundReport(
        steps=3, slices=36, cls=36 * 1.02834567, seg=36 * 0.5, rec=36 * 0.0123456, total=0.0, seconds=1.23456
    )
    sent = coarse_losses(report)
    assert {name: sent[name] / 36 for name in ("cls", "seg", "rec", "total")} == pytest.approx(
        {"cls": 1.028, "seg": 0.5, "rec": 0.01235, "total": 0.0}, abs=1e-12
    )
    assert (sent["steps"], sent["slices"], sent["seconds"]) == (3, 36, 1.235)
    metrics = dict(train(file, 1, encoder()).content["metrics"])
    mean = metrics["cls"] / metrics["slices"]
    assert mean == pytest.approx(float(f"{mean:.4g}"), rel=1e-12)


def test_a_later_policy_holds_for_stored_numbers(file: Path) -> None:
    after = update(train(file, 1, encoder()))
    edit_site(file, policy=POLICY | {"metrics": False})
    assert withheld(train(file, 1, encoder())) == "policy.metrics is false"
    edit_site(file, policy=POLICY | {"min_patients": 3})
    assert "fewer patients" in withheld(train(file, 2, after))


def test_damaged_stored_numbers_are_not_made_again(file: Path) -> None:
    train(file, 1, encoder())
    (file.parent / "state" / "runs" / "test" / "answer-round-00001.npz").write_bytes(b"half")
    order = ConfigRecord({"server-round": 1, "run": "test"})
    content = RecordDict({"arrays": to_record(encoder()), "config": order})
    assert refusal(ask({"site": str(file)}, "train", content, flat())) == Refusal.STATE


def test_the_centre_leaves_out_numbers_of_an_earlier_attempt(file: Path) -> None:
    reply = train(file, 1, encoder())
    model = wire.tested_hash(encoder(), [])
    counts = {"patients": 100, "slices": 1000, "positives": 1000}
    known = _site_round(reply.content, 1.0, 1.0, counts, model)
    assert known.tally is not None
    assert (known.metrics["patients"], known.withheld) == (2.0, "")
    other = _site_round(reply.content, 1.0, 1.0, counts, "another")
    assert (other.tally, other.metrics) == (None, {})
    line = describe_round(1, RoundResult({}, Moments(), {"a": known, "b": other}, {}, {}, 0, 1.0))
    assert json.loads(json.dumps(line.to_json()))["sites"]["b"]["withheld"].endswith("an earlier attempt at this round")
    assert "withheld" not in line.to_json()["sites"]["a"]


def test_a_run_of_one_hospital_gives_numbers_in_each_round(file: Path) -> None:
    train_rounds(file, 3, flat=flat())
    stages = [json.loads(line)["stage"] for line in (file.parent / "state" / FILE).read_text().splitlines()]
    assert stages == [round_stage(number) for number in (1, 2, 3)]
