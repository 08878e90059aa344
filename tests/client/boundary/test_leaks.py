"""Attacks by a centre that read numbers of a hospital's data through its answers; each got through before.

The hospital's ClientApp, policy and audit log are the real ones; the attacker sees replies and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client.boundary.audit import verify
from client.cli import audit_lines
from shared.config import RunConfig
from shared.groups import HEADS
from shared.refusals import FIRST_KEY, TEXTS, Refusal, code_of_key
from shared.site import read_site
from shared.wire.records import Tensors, to_record
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.asking import NAME, ask, evaluate, evaluation_order, refusal, tensors, train_order, train_rounds

SILENT = {"release": ["encoder"], "metrics": False, "min_patients": 1_000_000}


@pytest.fixture
def silent(copied_hospitals: SmallHospitals) -> Path:
    """A hospital that releases no number."""
    edit_site(copied_hospitals.files[NAME], policy=SILENT)
    return copied_hospitals.files[NAME]


def train(file: Path, encoder: Tensors | None = None, flat: dict | None = None, **order: object) -> Message:
    content = RecordDict(
        {
            "arrays": to_record(tensors(("encoder",)) if encoder is None else encoder),
            "config": ConfigRecord({"server-round": 1, "run": "test"} | order),
        }
    )
    return ask({"site": str(file)}, "train", content, flat)


@pytest.mark.parametrize("mu", [float("nan"), float("inf"), -1.0, 0.5, 1e300])
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_proximal_mu_is_the_run_configs(silent: Path, mu: float, strategy: str) -> None:
    """Before: "loss is 1.0283 and the gradient's norm nan in round 1, step 0", the exact loss of two chosen slices."""
    flat = small_config(federation__strategy=strategy)
    assert refusal(train(silent, flat=flat, **{"proximal-mu": mu})) == Refusal.ORDER


def huge(names: str, size: float) -> Tensors:
    """An encoder some of whose weights are as large as the centre likes."""
    encoder = {name: value.copy() for name, value in tensors(("encoder",)).items()}
    for name, value in encoder.items():
        if name.endswith(names):
            value[:] = size
    return encoder


@pytest.mark.parametrize("names", ["norm.weight", "mlp.fc2.weight", "patch_embed.proj.weight"])
def test_an_overflow_says_that_the_model_diverged_and_no_more(silent: Path, names: str) -> None:
    """Before: "18 of 18 scores are not finite", the exact number of slices of a split."""
    assert refusal(train(silent, huge(names, 3e38))) == Refusal.TENSORS
    assert refusal(train(silent, huge(names, 9e7))) == Refusal.NOT_OF_RUN
    reply = train(silent, huge(names, 9e7), **{"server-round": 2})
    assert not reply.has_error() or refusal(reply) == Refusal.DIVERGED
    for stage in ("initial", "final"):
        assert refusal(evaluate(silent, stage, encoder=huge(names, 9e7))) == Refusal.METRICS
    assert not any(digit in TEXTS[Refusal.DIVERGED].replace("fp32", "") for digit in "0123456789")


def gated(threshold: float) -> Tensors:
    """An encoder that is as near as it may be to overflowing on slices above a threshold of the centre's choice."""
    encoder = {name: value.copy() for name, value in tensors(("encoder",)).items()}
    name = "encoder.patch_embed.proj"
    encoder[f"{name}.weight"][0] = 9e7
    encoder[f"{name}.bias"][0] = -9e7 * min(threshold, 1.0)
    return encoder


@pytest.mark.parametrize("threshold", [0.5, 4.0, 8.0, 12.0, 15.0])
def test_a_threshold_in_the_encoder_counts_nothing(copied_hospitals: SmallHospitals, threshold: float) -> None:
    """Before: "7 of 18 scores are not finite" for each threshold, so that slices could be counted and searched for.

    The validation split, which a hospital that releases numbers scores in a round, gives one text too.
    """
    for policy in (SILENT, {"release": ["encoder"], "metrics": True, "min_patients": 1}):
        edit_site(copied_hospitals.files[NAME], policy=policy)
        reply = train(copied_hospitals.files[NAME], gated(threshold), **{"server-round": 2})
        assert not reply.has_error() or refusal(reply) == Refusal.DIVERGED


def test_a_silent_hospital_scores_no_validation_slice(silent: Path) -> None:
    """Validation slices that no model can score do not show in an answer."""
    cache = read_site(silent).cache
    rows = [line.split(",") for line in (cache / "index.csv").read_text().splitlines()]
    split = rows[0].index("split")
    slices = np.load(cache / "slices.npy", mmap_mode="r+")
    before = train_answer(train(silent))
    for number, row in enumerate(rows[1:]):
        if row[split] == "val":
            slices[number] = 32767
    slices.flush()
    assert train_answer(train(silent)) == before


def train_answer(reply: Message) -> dict[str, object]:
    assert not reply.has_error(), reply.error.reason
    return {
        name: {k: v.data if hasattr(v, "data") else v for k, v in record.items() if k != "audit"}
        for name, record in reply.content.items()
    }


def test_two_data_sets_give_one_answer_but_for_the_update(silent: Path) -> None:
    answers = []
    for _ in range(2):
        replies = [
            ask({"site": str(silent)}, "query.hello"),
            train(silent),
            ask(
                {"site": str(silent)},
                "query.heads",
                RecordDict({"config": ConfigRecord({"run": "test", "groups": "cls"})}),
            ),
            evaluate(silent, "initial"),
            evaluate(silent, "final"),
            train(silent, gated(5.0), run="other"),
        ]
        answers.append(
            [
                (r.error.code, r.error.reason)
                if r.has_error()
                else {k: v for k, v in train_answer(r).items() if k != "update"}
                for r in replies
            ]
        )
        cache = read_site(silent).cache
        slices, labels = np.load(cache / "slices.npy", mmap_mode="r+"), (cache / "index.csv").read_text()
        slices[:] = np.random.default_rng(1).permutation(slices, axis=1)
        slices.flush()
        (cache / "index.csv").write_text(labels.replace(",1.0,", ",0.0,").replace(",1,", ",0,"))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"loss.rec": 1e-10, "loss.cls": 0.0, "loss.seg": 0.0, "train.optimiser": "adamw"}, "loss.rec"),
        ({"loss.rec": 1e-10}, "loss.rec"),
        ({"train.clip_norm": 1e-9}, "train.clip_norm"),
        ({"train.learning_rate": 1e4}, "train.learning_rate"),
        ({"train.matrix_rate": 10.0}, "train.matrix_rate"),
        ({"train.learning_rate": 1e-12}, "train.learning_rate"),
        ({"train.batch": 2}, "train.batch"),
        ({"train.batch": 5000}, "train.batch"),
        ({"train.weight_decay": 5.0}, "train.weight_decay"),
        ({"loss.cls": 0.05, "loss.seg": 0.05, "loss.rec": 0.05}, "loss.cls"),
        ({"model.windows_hu": "30:31"}, "model.windows_hu"),
        ({"model.windows_hu": "0:80,0:80,0:80,0:80,0:80"}, "model.windows_hu"),
        ({"evaluation.replicates": 2000}, "evaluation.replicates"),
        ({"federation.rounds": 2000}, "federation.rounds"),
        ({"federation.strategy": "fedprox", "federation.proximal_mu": 50.0}, "federation.proximal_mu"),
        ({"federation.server_momentum": 1.0}, "federation.server_momentum"),
        ({"federation.server_learning_rate": 100.0}, "federation.server_learning_rate"),
    ],
)
def test_a_run_config_cannot_bare_the_gradient(copied_hospitals: SmallHospitals, change: dict, key: str) -> None:
    """Before, AdamW with loss.rec 1e-10 and a huge rate gave the exact gradient (cosine 1.0000 in 117 tensors)."""
    edit_site(copied_hospitals.files[NAME], policy={"release": ["encoder"]})
    reply = train(copied_hospitals.files[NAME], flat=small_config() | change)
    assert refusal(reply) == code_of_key(key)


def test_a_long_order_leaves_the_audit_chain_whole(silent: Path) -> None:
    """Before, an order of 1.2 MB broke the chain for ever: what followed was chained to the log's beginning."""
    long = {"note": "A" * 1_200_000}
    for content in (
        {},
        {"config": ConfigRecord(long)},
        {},
        {"config": ConfigRecord({"server-round": 1, "run": "test"} | long)},
    ):
        ask({"site": str(silent)}, "query.hello", RecordDict(content))
        ask({"site": str(silent)}, "train", RecordDict(content))
    many = {f"key-{number}": "A" * 500 for number in range(5000)}
    ask({"site": str(silent)}, "train", RecordDict({"config": ConfigRecord(many)}), small_config() | many)
    ask({"site": str(silent)}, "query.hello")
    state = silent.parent / "state"
    assert (verify(state).entries, verify(state).faults) == (10, ())
    assert max(map(len, (state / "audit.jsonl").read_bytes().splitlines())) < 600_000


FORGED = "\x1b[2J\x1b[31mALL FINE\x1b[0m\n2: 2026 released nothing\r\u202e\ud800"


def test_an_order_forges_no_line_of_the_log(silent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before, control characters of an order reached the screen of whoever looked at the audit log."""
    order = ConfigRecord(
        {"run": FORGED.encode("utf-8", "replace").decode(), "groups": FORGED[:40], "server-round": FORGED[:20]}
    )
    ask(
        {"site": str(silent)}, "query.heads", RecordDict({"config": order}), small_config() | {FORGED[:20]: FORGED[:30]}
    )
    shown = [*audit_lines(read_site(silent)), *capsys.readouterr()]
    assert len(shown) >= 3
    assert all(line.isascii() and line.replace("\n", "").isprintable() for line in shown)
    assert all("\n" not in line for line in shown[:-2])


TEXT = st.text(max_size=40) | st.sampled_from(["test", "initial", "final", "cls", "encoder,cls", "../../etc", ""])
VALUES = st.one_of(
    TEXT,
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=True, allow_infinity=True),
    st.binary(max_size=20),
    st.lists(st.integers(-5, 5), max_size=3),
)
KEYS = st.sampled_from(["run", "server-round", "proximal-mu", "stage", "groups", "split", "replicates"]) | st.text(
    max_size=12
)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["train", "evaluate", "query.heads", "query.hello"]),
    keys=st.dictionaries(KEYS, VALUES, max_size=5),
    arrays=st.sampled_from([None, "encoder", "heads", "wrong"]),
    name=st.sampled_from(["arrays", "heads-average", "config", "heads-", "pixels"]),
)
def test_any_order_gets_an_answer_from_the_closed_list(
    fuzzed: Path, kind: str, keys: dict, arrays: str | None, name: str
) -> None:
    content = {"config": ConfigRecord(keys)}
    if arrays:
        groups = {"encoder": ("encoder",), "heads": HEADS, "wrong": ("cls",)}[arrays]
        content |= {name: to_record(tensors(groups))}
    reply = ask({"site": str(fuzzed)}, kind, RecordDict(content))
    assert reply.has_error() is False or refusal(reply) in TEXTS
    assert verify(fuzzed.parent / "state").faults == ()


DEFAULTS = RunConfig().flat()


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), VALUES, max_size=3))
def test_any_run_config_gets_an_answer_from_the_closed_list(fuzzed: Path, changes: dict) -> None:
    flat = small_config() | {"train.batch": 9} | changes
    reply = ask(
        {"site": str(fuzzed)}, "query.heads", RecordDict({"config": ConfigRecord({"run": "x", "groups": "cls"})}), flat
    )
    assert refusal(reply) in (Refusal.RUN_CONFIG, Refusal.NOT_TRAINED) or reply.error.code >= FIRST_KEY


@pytest.fixture
def fuzzed(copied_hospitals: SmallHospitals) -> Path:
    """A hospital that may be asked anything; it holds no data, so that an order that is in order costs nothing."""
    file = copied_hospitals.files[NAME]
    index = read_site(file).cache / "index.csv"
    index.write_text(index.read_text().replace(",train,", ",test,"))
    return file


def test_no_text_that_leaves_holds_a_number_but_those_of_rates_and_precisions() -> None:
    for code, text in TEXTS.items():
        assert not any(character.isdigit() for character in text.replace("fp32", "")), code
        assert "{" not in text


def test_a_simulated_node_says_the_cause_and_a_deployed_one_the_fixed_text(copied_hospitals: SmallHospitals) -> None:
    flat = small_config(simulation__hospitals=str(copied_hospitals.root))
    order = train_order(run="a/b")
    told = ask({"partition-id": 0}, "train", order, flat)
    assert told.error.code == Refusal.ORDER
    assert "the run's name" in told.error.reason
    assert ask({"site": str(copied_hospitals.files[NAME])}, "train", order).error.reason == TEXTS[Refusal.ORDER]


def test_refusals_are_recorded_with_their_cause(silent: Path) -> None:
    train(silent, run="a/b")
    last = json.loads((silent.parent / "state" / "audit.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("refused", Refusal.ORDER)
    assert "run's name" in last["reason"]


def test_pixels_are_out_of_reach_of_tests(copied_hospitals: SmallHospitals) -> None:
    """Before, 371 requests read 369 of 576 pixels of a slice within .7 HU, and none was refused.

    Now of as many requests for chosen models none is answered, before training or after, whatever run they name.
    """
    file = copied_hospitals.files[NAME]
    edit_site(file, policy={"release": ["encoder"], "min_patients": 1})
    train_rounds(file, 1)
    answered = 0
    for number in range(40):
        encoder = gated(number / 4)
        heads = {name: value * number for name, value in tensors(HEADS).items()}
        for stage, run in (("initial", f"new-{number}"), ("final", "test"), ("final", f"new-{number}")):
            answered += not ask(
                {"site": str(file)}, "evaluate", evaluation_order(stage, encoder, heads, run)
            ).has_error()
    assert answered == 0
