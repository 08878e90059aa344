"""The values that a key of the run config may have: its type, its range, its choices."""

from __future__ import annotations

import math
from typing import Any, cast

from shared.errors import HemafedError

Scalar = bool | int | float | str
LONGEST_TEXT = 1000  # of a value; the longest are paths

_CHOICES: dict[str, tuple[str, ...]] = {
    "model.variant": ("default", "tiny", "small", "demo", "demo-deep"),
    "model.head_norm": ("batch", "frozen"),
    "loss.weighting": ("fixed", "uncertainty", "gradnorm"),
    "train.optimiser": ("muon", "adamw"),
    "train.sampling": ("balanced", "all", "telling"),
    "train.augment": ("none", "pose", "scanner"),
    "train.precision": ("auto", "bf16", "fp32"),
    "federation.strategy": ("fedavg", "fedprox", "fedavgm", "fedadam"),
    "federation.weights": ("equal", "patients"),
    "federation.rule": ("mean", "median", "trimmed-mean", "krum"),
    "federation.share": ("encoder", "all"),
    "federation.codec": ("fp32", "fp16", "int8", "int4", "int2"),
    "federation.heads": ("average", "ensemble", "probe"),
}
_LEAST: dict[str, float] = {
    "run.seed": 0,
    "train.epochs": 1,
    "train.steps": 0,
    "train.batch": 2,
    "train.weight_decay": 0,
    "train.warmup": 0,
    "train.clip_norm": 0,
    "loss.cls": 0,
    "loss.seg": 0,
    "loss.rec": 0,
    "federation.rounds": 1,
    "federation.quorum": 1,
    "federation.faulty": 0,
    "federation.norm_bound": 0,
    "federation.wait_s": 0,
    "federation.proximal_mu": 0,
    "federation.server_momentum": 0,
    "evaluation.replicates": 100,
}
# Absurd values; what a hospital accepts is narrower (shared/rules.py).
_MOST: dict[str, float] = {
    "run.seed": 2**63 - 1,
    "train.epochs": 10_000,
    "train.steps": 1_000_000,
    "train.batch": 10_000,
    "train.warmup": 1,
    "federation.rounds": 1_000_000,
    "federation.quorum": 10_000,
    "federation.faulty": 10_000,
    "federation.server_momentum": 1,
    "evaluation.replicates": 2000,  # 1 MB of counts
}
_MOST_NUMBER = 1e9  # of any other key
_ABOVE_ZERO = (
    "train.learning_rate",
    "train.matrix_rate",
    "federation.round_deadline_s",
    "federation.server_learning_rate",
)


class ConfigError(HemafedError, ValueError):
    """A key or value of the run config is not usable; names it and what was expected."""


def checked_value(key: str, value: Any, expected: type) -> Scalar:
    """One value, of its type and in its range."""
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= _MOST_NUMBER else math.inf
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ConfigError(f"{key} is {ascii(value)[:60]} ({type(value).__name__}); expected {expected.__name__}")
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or not value.isprintable()):
        raise ConfigError(f"{key} is {value[:40]!a}; expected up to {LONGEST_TEXT} printable characters")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value!r}; expected a finite number")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ConfigError(f"{key} is {value!r}; expected one of {', '.join(_CHOICES[key])}")
    if isinstance(value, str):
        return value
    number = cast(int | float, value)
    least, most = _LEAST.get(key, -math.inf), _MOST.get(key, _MOST_NUMBER)
    if not number >= least:
        raise ConfigError(f"{key} is {value!r}; expected at least {least:g}")
    if not number <= most:
        raise ConfigError(f"{key} is {value!r}; expected at most {most:g}")
    if key in _ABOVE_ZERO and not number > 0:
        raise ConfigError(f"{key} is {value!r}; expected more than 0")
    return number
