"""The policy section of site.yaml: what may leave the hospital, and what may run in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from pathlib import Path
from typing import Any

from shared.config import RunConfig, Scalar
from shared.site_file import SiteError, section, typed

TENSOR_GROUPS = ("encoder", "cls", "seg", "rec")


@dataclass(frozen=True)
class Bound:
    """The values of one run config key that a hospital accepts.

    Attributes:
      low, high: of a number; either end may be open (None).
      choices: of anything; () where low and high decide.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[Scalar, ...] = ()

    def admits(self, value: Scalar) -> bool:
        """Whether a value lies within."""
        if self.choices:
            return value in self.choices
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def text(self) -> str:
        """For the sentence "the site accepts ..."."""
        if self.choices:
            return "only " + ", ".join(map(repr, self.choices))
        ends = [] if self.low is None else [f"at least {self.low:g}"]
        return " and ".join(ends + ([] if self.high is None else [f"at most {self.high:g}"]))


# What no hospital accepts that says nothing about it: a run that would hold its machine for months.
ACCEPT = (("federation.rounds", Bound(high=1000)), ("train.epochs", Bound(high=50)))
INSTALLED = "installed"  # policy.app: the code that the hospital installed


@dataclass(frozen=True)
class Policy:
    """What may leave the hospital, and what may run in it.

    Attributes:
      release: tensor groups, of TENSOR_GROUPS.
      metrics: whether counts and losses may leave.
      min_patients: no number leaves that stands for fewer patients.
      accept: run config keys and the values that are accepted; a run with another is refused. Defaults are ACCEPT's.
      hours: from and to, the hospital's local time, between which training may run, past midnight too; None is always.
      app: INSTALLED, or the hash of the code that the hospital reviewed (`hemafed-client app` shows it): then what is
        installed must have it. A run that brings other client code than what is installed is refused in any case.
    """

    release: tuple[str, ...] = ("encoder",)
    metrics: bool = True
    min_patients: int = 10
    accept: tuple[tuple[str, Bound], ...] = ACCEPT
    hours: tuple[time, time] | None = None
    app: str = INSTALLED


def read_policy(path: Path, rules: Mapping[str, Any]) -> Policy:
    """The policy section."""
    default = Policy()
    release = typed(path, "policy.release", rules.get("release", list(default.release)), list)
    unknown = [group for group in release if group not in TENSOR_GROUPS]
    if unknown:
        raise SiteError(f"{path}: policy.release names {unknown}, expected some of {', '.join(TENSOR_GROUPS)}")
    min_patients = typed(path, "policy.min_patients", rules.get("min_patients", default.min_patients), int)
    if min_patients < 1:
        raise SiteError(f"{path}: policy.min_patients is {min_patients}, expected at least 1")
    return Policy(
        release=tuple(release),
        metrics=typed(path, "policy.metrics", rules.get("metrics", default.metrics), bool),
        min_patients=min_patients,
        accept=tuple(sorted((dict(ACCEPT) | _accept(path, rules.get("accept"))).items())),
        hours=_hours(path, rules.get("hours")),
        app=_app(path, rules.get("app", default.app)),
    )


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
