from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from shared.config import ConfigError, RunConfig, parse_config
from shared.model.swin import VARIANTS

ROOT = Path(__file__).resolve().parents[2]


def flatten(table: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def test_flower_sees_exactly_the_defaults() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert flatten(table) == RunConfig().flat()


def test_every_preset_key_is_known() -> None:
    preset = flatten(tomllib.loads((ROOT / "simulations" / "demo.toml").read_text()))
    assert parse_config(preset).flat().items() >= preset.items()


def test_variants_that_can_be_chosen_exist() -> None:
    for variant in VARIANTS:
        assert parse_config({"model.variant": variant}).model.variant == variant


def test_a_whole_number_is_a_float_where_one_is_expected() -> None:
    value = parse_config({"train.learning_rate": 1}).train.learning_rate
    assert (value, type(value)) == (1.0, float)


def test_the_hash_ignores_places_and_nothing_else() -> None:
    assert parse_config({"run.folder": "/x", "run.id": "a"}).hash() == RunConfig().hash()
    assert parse_config({"run.seed": 1}).hash() != RunConfig().hash()


@pytest.mark.parametrize(
    ("flat", "text"),
    [
        ({"train.epoch": 3}, "did you mean 'train.epochs'"),
        ({"train.epochs": 0}, "at least 1"),
        ({"train.epochs": 1.5}, "expected int"),
        ({"train.epochs": True}, "expected int"),
        ({"train.learning_rate": 0.0}, "more than 0"),
        ({"train.learning_rate": float("nan")}, "a finite number"),
        ({"train.learning_rate": float("inf")}, "a finite number"),
        ({"train.learning_rate": 10**400}, "a finite number"),
        ({"run.seed": -1}, "at least 0"),
        ({"run.seed": 2**63}, "at most"),
        ({"federation.rounds": 10**9}, "at most"),
        ({"evaluation.replicates": 10**6}, "at most 2000"),
        ({"run.folder": "x" * 2000}, "up to 1000 printable"),
        ({"run.folder": "a\x1b[2J"}, "printable"),
        ({"model.windows_hu": "nan:80"}, "low < high"),
        ({"model.windows_hu": "0:inf"}, "low < high"),
        ({"model.windows_hu": ",".join(["0:80"] * 9)}, "up to 8"),
        ({"train.matrix_rate": 0}, "more than 0"),
        ({"train.augment": True}, "expected str"),
        ({"train.augment": "flip"}, "none, pose, scanner"),
        ({"train.optimiser": "sgd"}, "muon, adamw"),
        ({"loss.weighting": "learned"}, "fixed, uncertainty, gradnorm"),
        ({"loss.seg": -0.1}, "at least 0"),
        ({"federation.heads": "mean"}, "average, ensemble, probe"),
        ({"model.windows_hu": "80:0"}, "low < high"),
        ({"model.windows_hu": "brain"}, "low < high"),
        ({"model.head_norm": "none"}, "batch, frozen"),
        ({"model.head_norm": "frozen"}, r"expected model\.pretrained = 'synthetic'"),
        ({"federation.codec": "int1"}, "fp32, fp16, int8, int4, int2"),
    ],
)
def test_a_wrong_key_or_value_is_named(flat: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        parse_config(flat)
    assert next(iter(flat)) in str(caught.value)


def test_several_windows() -> None:
    assert parse_config({"model.windows_hu": "0:80,-20:180"}).model.windows() == ((0, 80), (-20, 180))


def test_three_tasks_of_weight_0_are_refused() -> None:
    with pytest.raises(ConfigError, match="all 0; expected at least one task"):
        parse_config({"loss.cls": 0.0, "loss.seg": 0.0, "loss.rec": 0.0})


@pytest.mark.parametrize(
    ("rule", "faulty", "quorum", "least"),
    [("median", 1, 2, 3), ("trimmed-mean", 1, 2, 3), ("trimmed-mean", 2, 4, 5), ("krum", 1, 3, 4), ("krum", 2, 4, 5)],
)
def test_a_rule_that_compares_hospitals_needs_enough_of_them(rule: str, faulty: int, quorum: int, least: int) -> None:
    flat = {"federation.rule": rule, "federation.faulty": faulty}
    told = f"federation.rule is '{rule}' with federation.faulty = {faulty} and federation.quorum = {quorum}; "
    with pytest.raises(ConfigError, match=f"{told}expected a quorum of at least {least}, or another rule"):
        parse_config(flat | {"federation.quorum": quorum})
    assert parse_config(flat | {"federation.quorum": least}).federation.rule == rule


def test_the_mean_takes_any_quorum_and_the_median_whatever_may_be_faulty() -> None:
    assert parse_config({"federation.quorum": 1, "federation.faulty": 5}).federation.rule == "mean"
    median = {"federation.rule": "median", "federation.quorum": 3, "federation.faulty": 5}
    assert parse_config(median).federation.quorum == 3


@pytest.mark.parametrize(
    ("flat", "text"),
    [
        ({"federation.rule": "average"}, "expected one of mean, median, trimmed-mean, krum"),
        ({"federation.faulty": -1}, "expected at least 0"),
        ({"federation.norm_bound": -0.5}, "expected at least 0"),
        ({"federation.norm_bound": float("nan")}, "expected a finite number"),
    ],
)
def test_a_rule_that_is_none_is_refused(flat: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(flat))} is .*; {text}"):
        parse_config(flat)
