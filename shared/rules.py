"""The policy section of site.yaml: what may leave the hospital, and what may run in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from pathlib import Path
from typing import Any

from shared.config import RunConfig, Scalar
from shared.groups import TENSOR_GROUPS
from shared.site_file import SiteError, section, typed


@dataclass(frozen=True)
class Bound:
    """The values of one run config key that a hospital accepts.

    Attributes:
      low, high: of a number; either end may be open (None).
      choices: of anything; () where low and high decide.
      or_zero: whether 0, which switches the thing off, is accepted below `low`.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[Scalar, ...] = ()
    or_zero: bool = False

    def admits(self, value: Scalar) -> bool:
        """Whether a value lies within."""
        if self.choices:
            return value in self.choices
        if self.or_zero and value == 0:
            return True
        if isinstance(value, str):
            return self.low is None and self.high is None
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def text(self) -> str:
        """For the sentence "the site accepts ..."."""
        if self.choices:
            return "only " + ", ".join(map(repr, self.choices))
        ends = [] if self.low is None else [f"at least {self.low:g}" + " or 0" * self.or_zero]
        return " and ".join(ends + ([] if self.high is None else [f"at most {self.high:g}"]))


# Bounds that hold where policy.accept does not name the key. AdamW divides a gradient by its size plus 1e-8: with a loss or
# a clipped norm that is tiny, the update would be the gradient itself. Rounds and epochs would hold a machine for months.
LEAST_WEIGHT = 0.02
ACCEPT = (
    ("evaluation.replicates", Bound(high=1000)),
    ("federation.proximal_mu", Bound(high=1)),
    ("federation.rounds", Bound(high=1000)),
    ("federation.server_learning_rate", Bound(high=2)),
    ("federation.server_momentum", Bound(high=0.99)),
    ("loss.cls", Bound(LEAST_WEIGHT, 10, or_zero=True)),
    ("loss.rec", Bound(LEAST_WEIGHT, 10, or_zero=True)),
    ("loss.seg", Bound(LEAST_WEIGHT, 10, or_zero=True)),
    ("train.batch", Bound(8, 128)),
    ("train.clip_norm", Bound(0.1, 100, or_zero=True)),
    ("train.epochs", Bound(high=50)),
    ("train.learning_rate", Bound(1e-6, 0.01)),
    ("train.matrix_rate", Bound(1e-5, 0.05)),
    ("train.steps", Bound(high=20_000)),
    ("train.warmup", Bound(high=0.5)),
    ("train.weight_decay", Bound(high=0.5)),
)
LEAST_LOSS = 0.2  # the least sum of the losses' weights
MOST_CHANNELS, NARROWEST_HU, LOWEST_HU, HIGHEST_HU = 4, 20.0, -1100.0, 4000.0


def unsound_key(config: RunConfig, named: frozenset[str]) -> str:
    """Return the key of a run config that no single bound could refuse; empty if there is none.

    Args:
      config: of the run.
      named: keys that the hospital's own policy.accept names, which are not looked at here.
    """
    loss = config.loss
    if "loss.cls" not in named and loss.cls + loss.seg + loss.rec < LEAST_LOSS:
        return "loss.cls"
    windows = config.model.windows()
    narrow = any(high - low < NARROWEST_HU or low < LOWEST_HU or high > HIGHEST_HU for low, high in windows)
    if "model.windows_hu" not in named and (narrow or len(windows) > MOST_CHANNELS):
        return "model.windows_hu"
    return ""


_KEYS = {
    "release",
    "metrics",
    "min_patients",
    "accept",
    "hours",
    "app",
    "evaluations_per_run",
    "evaluations_per_month",
    "round_counts_per_month",
}
MOST_TESTS = 10_000  # of a limit a month
INSTALLED = "installed"  # policy.app: the code that the hospital installed


@dataclass(frozen=True)
class Policy:
    """What may leave the hospital, and what may run in it.

    Attributes:
      release: tensor groups, of TENSOR_GROUPS.
      metrics: whether counts and losses may leave.
      min_patients: no number leaves that covers fewer patients.
      accept: run config keys and the values that are accepted; a run with another is refused. Defaults are ACCEPT's.
      named: keys that policy.accept of site.yaml names.
      hours: from and to, the hospital's local time, between which it works for a run, past midnight too; None is always.
      app: INSTALLED, or the hash of the code that the hospital reviewed (`hemafed-client app` shows it): then what is
        installed must have it. A run that brings other client code than what is installed is refused in any case.
      evaluations_per_run: how many of a run's two models, the initial and the final one, may be tested here.
      evaluations_per_month: the same over all runs of 30 days; None is no limit.
      round_counts_per_month: with how many rounds of 30 days counts and losses leave, over all runs; None is no limit. The
        others train without.
    """

    release: tuple[str, ...] = ("encoder",)
    metrics: bool = True
    min_patients: int = 10
    accept: tuple[tuple[str, Bound], ...] = ACCEPT
    hours: tuple[time, time] | None = None
    app: str = INSTALLED
    named: frozenset[str] = frozenset()
    evaluations_per_run: int = 2
    evaluations_per_month: int | None = 24
    round_counts_per_month: int | None = 400  # two runs of 200 rounds, or six of 60


def read_policy(path: Path, content: Any) -> Policy:
    """Read the policy section; None is one without a key.

    Raises:
      SiteError: an unknown key or a wrong value.
    """
    rules, default = section(path, "policy.", {} if content is None else content, _KEYS, set()), Policy()
    release = typed(path, "policy.release", rules.get("release", list(default.release)), list)
    unknown = [group for group in release if group not in list(TENSOR_GROUPS)]
    if unknown:
        raise SiteError(f"{path}: policy.release names {unknown}, expected some of {', '.join(TENSOR_GROUPS)}")
    min_patients = typed(path, "policy.min_patients", rules.get("min_patients", default.min_patients), int)
    if min_patients < 1:
        raise SiteError(f"{path}: policy.min_patients is {min_patients}, expected at least 1")
    accepted = _accept(path, rules.get("accept"))
    return Policy(
        release=tuple(release),
        metrics=typed(path, "policy.metrics", rules.get("metrics", default.metrics), bool),
        min_patients=min_patients,
        accept=tuple(sorted((dict(ACCEPT) | accepted).items())),
        named=frozenset(accepted),
        hours=_hours(path, rules.get("hours")),
        app=_app(path, rules.get("app", default.app)),
        evaluations_per_run=_limit(path, "evaluations_per_run", rules.get("evaluations_per_run", 2), 2),
        evaluations_per_month=_monthly(path, "evaluations_per_month", rules, default.evaluations_per_month),
        round_counts_per_month=_monthly(path, "round_counts_per_month", rules, default.round_counts_per_month),
    )


def _monthly(path: Path, key: str, rules: Mapping[str, Any], default: int | None) -> int | None:
    """Read a limit a month; null is none."""
    value = rules.get(key, default)
    return None if value is None else _limit(path, key, value, MOST_TESTS)


def _limit(path: Path, key: str, value: Any, most: int) -> int:
    """Read a number of tests."""
    limit = typed(path, f"policy.{key}", value, int)
    if not 0 <= limit <= most:
        raise SiteError(f"{path}: policy.{key} is {limit}, expected 0 to {most}")
    return limit


def _accept(path: Path, value: Any) -> dict[str, Bound]:
    """policy.accept: run config key -> {min, max} or a list of values."""
    known = RunConfig().flat()
    content = section(path, "policy.accept.", {} if value is None else value, set(known), set())
    bounds = {}
    for key, rule in content.items():
        what, numbers = f"policy.accept.{key}", isinstance(known[key], int | float) and not isinstance(known[key], bool)
        if isinstance(rule, Mapping) and numbers:
            ends = section(path, f"{what}.", rule, {"min", "max"}, set())
            low, high = (
                None if ends.get(end) is None else float(typed(path, f"{what}.{end}", ends[end], (int, float)))
                for end in ("min", "max")
            )
            bounds[key] = Bound(low, high)
        else:
            kinds = (int, float) if numbers else type(known[key])
            choices = typed(path, what, rule, list)
            bounds[key] = Bound(choices=tuple(typed(path, what, one, kinds) for one in choices))
        if bounds[key] == Bound():
            raise SiteError(f"{path}: {what} is {rule!r}, expected values, such as [1, 2], or {{min: 1, max: 5}}")
    return bounds


def _hours(path: Path, value: Any) -> tuple[time, time] | None:
    """policy.hours: "19:00-06:30"."""
    if value is None:
        return None
    try:
        start, end = (time.fromisoformat(part.strip()) for part in typed(path, "policy.hours", value, str).split("-"))
    except ValueError as error:
        raise SiteError(f"{path}: policy.hours is {value!r}, expected such as '19:00-06:30'") from error
    return start, end


def _app(path: Path, value: Any) -> str:
    """policy.app: "installed" or 64 hexadecimal digits."""
    app = typed(path, "policy.app", value, str)
    if app != INSTALLED and not re.fullmatch(r"[0-9a-f]{64}", app):
        raise SiteError(
            f"{path}: policy.app is {app!r}, expected 'installed' or the 64 digits that `hemafed-client app` shows"
        )
    return app
