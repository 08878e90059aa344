"""site.yaml: what a hospital says about itself, its data and its own policy.

The file belongs to the hospital; no run config and no message changes it. Paths are absolute or relative to the
file. Unknown keys and wrong types are errors, because a misspelt policy would be no policy.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import time
from pathlib import Path
from typing import Any

import yaml

from shared.config import NAME_WORDS, RunConfig, Scalar, is_name

ROLES = ("train", "held-out", "development")
TENSOR_GROUPS = ("encoder", "cls", "seg", "rec")


class SiteError(ValueError):
    """A site.yaml cannot be used; names the key, the value and what was expected."""


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


@dataclass(frozen=True)
class Site:
    """One hospital.

    Attributes:
      name: public name; it is in every message.
      role: train takes part in training; held-out is tested on, all of it; development may be used by the server
        to fit and choose, never to report.
      weight: public weight in the mean of updates, > 0; it need not tell how many patients there are.
      images, masks, labels: DICOM folder, mask folder and label table; masks and labels may be None.
      segments: which segments of the masks are the hematoma: labels, codes as "SCT:35566002", or numbers; () where each
        mask holds one.
      accept_lossy: whether lossy compressed images are taken, and marked.
      cache: slice cache, written by ingest, safe to delete.
      state: keys and local heads; not safe to delete while a run goes on.
      policy: what may leave.
      lent_key: a key to use in place of the one in `state`, for a look that writes nothing.
    """

    name: str
    role: str
    weight: float
    images: Path
    masks: Path | None
    labels: Path | None
    cache: Path
    state: Path
    segments: tuple[str | int, ...] = ()
    accept_lossy: bool = False
    policy: Policy = field(default_factory=Policy)
    lent_key: bytes | None = field(default=None, repr=False)

    def key(self) -> bytes:
        """The hospital's secret of 32 bytes, made at first use; patients' hashes depend on it. Never leaves."""
        if self.lent_key is not None:
            return self.lent_key
        path = self.state / "key"
        if not path.is_file():
            self.state.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.touch(mode=0o600)
            partial.write_bytes(secrets.token_bytes(32))
            try:
                os.link(partial, path)  # fails if another process was first, and then its key counts
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        key = path.read_bytes()
        if len(key) != 32:
            raise SiteError(f"site {self.name!r}: {path} has {len(key)} bytes, expected 32; restore it from a backup")
        return key


def read_site(path: Path) -> Site:
    """Read and check a site.yaml.

    Args:
      path: the YAML file.
    Raises:
      SiteError: no such file, not YAML, an unknown or missing key, a wrong value, or a folder that does not exist.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise SiteError(f"no site file {path}; expected a YAML file that describes one hospital (see README, 'Join')")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SiteError(f"{path} is not YAML in UTF-8: {error}") from error
    top = _section(path, "", content, {"site", "data", "cache", "state", "role", "weight", "policy"}, {"site", "data"})
    data = _section(path, "data.", top["data"], {"images", "masks", "labels", "segment", "accept_lossy"}, {"images"})
    rules = _section(
        path,
        "policy.",
        {} if top.get("policy") is None else top["policy"],
        {"release", "metrics", "min_patients", "accept", "hours", "app"},
        set(),
    )

    def place(key: str, value: Any) -> Path:
        return (path.parent / _typed(path, key, value, str)).resolve()

    site = Site(
        name=_name(path, top["site"]),
        role=_typed(path, "role", top.get("role", "train"), str),
        weight=float(_typed(path, "weight", top.get("weight", 1.0), (int, float))),
        images=place("data.images", data["images"]),
        masks=None if data.get("masks") is None else place("data.masks", data["masks"]),
        labels=None if data.get("labels") is None else place("data.labels", data["labels"]),
        cache=place("cache", top.get("cache", "cache")),
        state=place("state", top.get("state", "state")),
        segments=_segments(path, data.get("segment")),
        accept_lossy=_typed(path, "data.accept_lossy", data.get("accept_lossy", False), bool),
        policy=_policy(path, rules),
    )
    if site.role not in ROLES:
        raise SiteError(f"{path}: role is {site.role!r}, expected one of {', '.join(ROLES)}")
    if not 0 < site.weight <= 1e6:
        raise SiteError(f"{path}: weight is {site.weight!r}, expected more than 0 and at most 1e6")
    for kept in (path, site.images, site.masks, site.labels, site.state):
        if kept is not None and kept.is_relative_to(site.cache):
            raise SiteError(
                f"{path}: cache is {site.cache}, which holds {kept.name}; ingest deletes it: name a folder of its own"
            )
    for key, folder in (("data.images", site.images), ("data.masks", site.masks)):
        if folder is not None and not folder.is_dir():
            raise SiteError(f"{path}: {key} is {folder}, and there is no such folder; correct the path or mount it")
    if site.labels is not None and not site.labels.is_file():
        raise SiteError(f"{path}: data.labels is {site.labels}, and there is no such file; correct the path")
    return site


def _section(path: Path, prefix: str, content: Any, known: set[str], needed: set[str]) -> Mapping[str, Any]:
    """A mapping with known keys only and all needed ones."""
    if not isinstance(content, Mapping):
        raise SiteError(
            f"{path}: {prefix.rstrip('.') or 'the file'} is a {type(content).__name__}, expected a mapping of keys"
        )
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise SiteError(f"{path}: unknown key '{prefix}{key}'; did you mean '{prefix}{near}'?")
    for key in sorted(needed):
        if content.get(key) is None:
            raise SiteError(f"{path}: '{prefix}{key}' is missing; expected keys: {', '.join(sorted(known))}")
    return content


def _typed(path: Path, key: str, value: Any, expected: type | tuple[type, ...]) -> Any:
    """A value of one type; True is no number."""
    wanted = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise SiteError(f"{path}: '{key}' is {value!r} ({type(value).__name__}), expected {names}")
    return value


def _name(path: Path, value: Any) -> str:
    """A site's public name: it stands in messages, tables and file names."""
    name = _typed(path, "site", value, str)
    if not is_name(name):
        raise SiteError(f"{path}: site is {name!r}, expected {NAME_WORDS}")
    return name


def _segments(path: Path, value: Any) -> tuple[str | int, ...]:
    """The segments that are the hematoma: one or a list."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_typed(path, "data.segment", one, (str, int)) for one in values)


def _policy(path: Path, rules: Mapping[str, Any]) -> Policy:
    """The policy section."""
    default = Policy()
    release = _typed(path, "policy.release", rules.get("release", list(default.release)), list)
    unknown = [group for group in release if group not in TENSOR_GROUPS]
    if unknown:
        raise SiteError(f"{path}: policy.release names {unknown}, expected some of {', '.join(TENSOR_GROUPS)}")
    min_patients = _typed(path, "policy.min_patients", rules.get("min_patients", default.min_patients), int)
    if min_patients < 1:
        raise SiteError(f"{path}: policy.min_patients is {min_patients}, expected at least 1")
    return Policy(
        release=tuple(release),
        metrics=_typed(path, "policy.metrics", rules.get("metrics", default.metrics), bool),
        min_patients=min_patients,
        accept=tuple(sorted((dict(ACCEPT) | _accept(path, rules.get("accept"))).items())),
        hours=_hours(path, rules.get("hours")),
        app=_app(path, rules.get("app", default.app)),
    )


def _accept(path: Path, value: Any) -> dict[str, Bound]:
    """policy.accept: run config key -> {min, max} or a list of values."""
    known = RunConfig().flat()
    content = _section(path, "policy.accept.", {} if value is None else value, set(known), set())
    bounds = {}
    for key, rule in content.items():
        what, numbers = f"policy.accept.{key}", isinstance(known[key], int | float) and not isinstance(known[key], bool)
        if isinstance(rule, Mapping) and numbers:
            ends = _section(path, f"{what}.", rule, {"min", "max"}, set())
            low, high = (
                None if ends.get(end) is None else float(_typed(path, f"{what}.{end}", ends[end], (int, float)))
                for end in ("min", "max")
            )
            bounds[key] = Bound(low, high)
        else:
            kinds = (int, float) if numbers else type(known[key])
            choices = _typed(path, what, rule, list)
            bounds[key] = Bound(choices=tuple(_typed(path, what, one, kinds) for one in choices))
        if bounds[key] == Bound():
            raise SiteError(f"{path}: {what} is {rule!r}, expected values, such as [1, 2], or {{min: 1, max: 5}}")
    return bounds


def _hours(path: Path, value: Any) -> tuple[time, time] | None:
    """policy.hours: "19:00-06:30"."""
    if value is None:
        return None
    try:
        start, end = (time.fromisoformat(part.strip()) for part in _typed(path, "policy.hours", value, str).split("-"))
    except ValueError as error:
        raise SiteError(f"{path}: policy.hours is {value!r}, expected such as '19:00-06:30'") from error
    return start, end


def _app(path: Path, value: Any) -> str:
    """policy.app: "installed" or 64 hexadecimal digits."""
    app = _typed(path, "policy.app", value, str)
    if app != INSTALLED and not re.fullmatch(r"[0-9a-f]{64}", app):
        raise SiteError(
            f"{path}: policy.app is {app!r}, expected 'installed' or the 64 digits that `hemafed-client app` shows"
        )
    return app
