from __future__ import annotations

from dataclasses import replace
from datetime import datetime, time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.boundary.policy import (
    FACTS,
    METRICS,
    PATIENTS,
    TALLY,
    UPDATE,
    PolicyError,
    admit,
    enforce,
    metrics_refusal,
    within_hours,
)
from shared.config import parse_config
from shared.metrics import Scores
from shared.refusals import TEXTS, Refusal
from shared.rules import Bound, Policy
from shared.site import Site
from shared.tally import tally_scores
from shared.wire.records import tally_to_record, to_record


def site(**rules: object) -> Site:
    place = Path("/nowhere")
    policy = replace(Policy(release=("encoder",), metrics=True, min_patients=5), **rules)
    return Site("hospital-03", "train", place, None, None, place, place, policy=policy)


def update(*names: str) -> ArrayRecord:
    return to_record({name: np.zeros(2, np.float32) for name in names})


def tally(patients: int) -> ArrayRecord:
    count = max(patients, 1)
    scores = Scores(np.zeros(count), np.zeros(count), np.ones(count), np.array([str(n) for n in range(count)]))
    return tally_to_record(tally_scores(scores, 1, 0, np.random.default_rng(0)))


def reply(**records: object) -> RecordDict:
    return RecordDict({FACTS: ConfigRecord({"site": "hospital-03", "withheld": ""}), **records})


def test_a_whole_reply_passes_as_it_is() -> None:
    content = reply(
        **{
            UPDATE: update("encoder.a", "encoder.b.weight"),
            METRICS: MetricRecord({PATIENTS: 5, "slices": 40}),
            TALLY: tally(5),
        }
    )
    assert enforce(site(), content) is content
    assert list(content[UPDATE]) == ["encoder"]


def test_an_empty_reply_passes() -> None:
    assert len(enforce(site(), RecordDict())) == 0


@pytest.mark.parametrize("name", ["cls.weight", "seg.output.bias", "rec.norm.weight", "head.weight", "encoders.a", ""])
def test_a_tensor_of_another_group_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(PolicyError, match=r"policy\.release") as caught:
        enforce(site(), reply(update=update("encoder.a", name)))
    assert repr(name.split(".")[0]) in str(caught.value)
    assert "'hospital-03'" in str(caught.value)
    assert "site.yaml" in str(caught.value)


def test_heads_pass_where_they_are_released() -> None:
    content = reply(update=update("encoder.a", "cls.weight", "seg.x", "rec.y"))
    assert enforce(site(release=("encoder", "cls", "seg", "rec")), content) is content
    with pytest.raises(PolicyError, match="'rec'"):
        enforce(site(release=("encoder", "cls", "seg")), content)


def test_a_hospital_that_releases_nothing_sends_no_encoder() -> None:
    with pytest.raises(PolicyError, match="'encoder'"):
        enforce(site(release=()), reply(update=update("encoder.a")))


@pytest.mark.parametrize("record", [METRICS, TALLY])
def test_numbers_are_refused_where_metrics_are_false(record: str) -> None:
    records = {METRICS: MetricRecord({PATIENTS: 1000})} | ({TALLY: tally(20)} if record == TALLY else {})
    with pytest.raises(PolicyError, match=r"policy\.metrics is false"):
        enforce(site(metrics=False), reply(**records))


@pytest.mark.parametrize(("patients", "passes"), [(0, False), (4, False), (5, True), (6, True)])
def test_numbers_over_too_few_patients_are_refused(patients: int, passes: bool) -> None:
    content = reply(metrics=MetricRecord({PATIENTS: patients, "cls": 0.5}))
    assert (metrics_refusal(site(), patients) == "") == passes
    if passes:
        assert enforce(site(), content) is content
    else:
        with pytest.raises(PolicyError, match=r"fewer patients than policy\.min_patients \(5\)") as caught:
            enforce(site(), content)
        assert str(patients) not in str(caught.value).replace("hospital-03", "").replace("(5)", "")


def test_numbers_without_a_count_of_patients_are_refused() -> None:
    with pytest.raises(PolicyError, match="fewer patients"):
        enforce(site(), reply(metrics=MetricRecord({"slices": 4000})))
    with pytest.raises(PolicyError, match="fewer patients"):
        enforce(site(), reply(tally=tally(50)))


def test_a_tally_over_too_few_patients_is_refused_whatever_the_metrics_say() -> None:
    """The counts themselves say how many patients they stand for."""
    with pytest.raises(PolicyError, match="fewer patients"):
        enforce(site(), reply(metrics=MetricRecord({PATIENTS: 50}), tally=tally(2)))


def test_an_unknown_record_is_refused_by_name() -> None:
    with pytest.raises(PolicyError, match="'pixels'"):
        enforce(site(), reply(pixels=ArrayRecord({"x": Array(np.zeros(3, np.float32))})))
    with pytest.raises(PolicyError, match="'heads'"):
        enforce(site(), reply(heads=update("cls.weight")))


@pytest.mark.parametrize(
    "records",
    [
        {FACTS: ArrayRecord({"cls.weight": Array(np.zeros(3, np.float32))})},
        {FACTS: MetricRecord({"positives": 3})},
        {UPDATE: ConfigRecord({"encoder.x": b"anything"})},
        {UPDATE: MetricRecord({"encoder.x": 1.0})},
        {METRICS: ConfigRecord({PATIENTS: 50, "names": "Doe"})},
        {METRICS: ArrayRecord({PATIENTS: Array(np.array(50))})},
        {METRICS: MetricRecord({PATIENTS: 50}), TALLY: ConfigRecord({"names": "Doe"})},
    ],
    ids=[
        "tensors as facts",
        "numbers as facts",
        "text as update",
        "numbers as update",
        "text as metrics",
        "tensor",
        "text",
    ],
)
def test_a_record_of_another_kind_is_refused(records: dict) -> None:
    with pytest.raises(PolicyError):
        enforce(site(), RecordDict(records))


@pytest.mark.parametrize("fact", [{"positives": 3}, {"patients": 2}, {"names": "Doe^Jane"}, {"pixels": b"\x00"}])
def test_a_fact_that_no_reply_has_is_refused(fact: dict) -> None:
    """Facts are not counted as numbers over patients, so only public ones may be among them."""
    with pytest.raises(PolicyError, match=next(iter(fact))):
        enforce(site(metrics=False), RecordDict({FACTS: ConfigRecord({"site": "hospital-03", **fact})}))


def test_every_fact_of_a_reply_passes_without_metrics() -> None:
    facts = {
        "site": "hospital-03",
        "role": "train",
        "release": "encoder",
        "protocol": 1,
        "withheld": "policy.metrics is false",
    }
    content = RecordDict({FACTS: ConfigRecord(facts), UPDATE: update("encoder.a")})
    assert enforce(site(metrics=False), content) is content


NOON = datetime(2026, 3, 1, 12)


@pytest.mark.parametrize(
    ("bound", "epochs", "passes"),
    [
        (Bound(high=5), 5, True),
        (Bound(high=5), 6, False),
        (Bound(low=2, high=5), 1, False),
        (Bound(low=2), 100, True),
        (Bound(choices=(1, 3)), 3, True),
        (Bound(choices=(1, 3)), 2, False),
    ],
)
def test_a_run_is_admitted_within_bounds(bound: Bound, epochs: int, passes: bool) -> None:
    config, asked = parse_config({"train.epochs": epochs}), site(accept=(("train.epochs", bound),))
    if passes:
        admit(asked, config, NOON)
    else:
        with pytest.raises(PolicyError, match=rf"train.epochs = {epochs}: its policy.accept takes"):
            admit(asked, config, NOON)


@pytest.mark.parametrize(
    ("start", "end", "now", "within"),
    [
        (time(8), time(18), time(12), True),
        (time(8), time(18), time(18), False),
        (time(19), time(6, 30), time(23), True),
        (time(19), time(6, 30), time(2), True),
        (time(19), time(6, 30), time(6, 30), False),
        (time(19), time(6, 30), time(12), False),
    ],
)
def test_hours_may_span_midnight(start: time, end: time, now: time, within: bool) -> None:
    assert within_hours((start, end), datetime.combine(NOON, now)) is within


def test_hours_hold_for_every_kind_of_work() -> None:
    asleep = site(hours=(time(19), time(6, 30)))
    with pytest.raises(PolicyError, match=r"between 19:00 and 06:30 .* it is 12:00") as caught:
        admit(asleep, parse_config({}), NOON)
    assert caught.value.code == Refusal.HOURS
    assert not any(digit in TEXTS[Refusal.HOURS] for digit in "0123456789")
