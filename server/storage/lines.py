"""What a run writes about itself: a line of rounds.jsonl, status.json and summary.json.

JSON's keys are the fields' names; a field that is None or empty where that is its default has no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Line:
    """A dataclass that writes itself as JSON's dict, and reads itself from one; keys that it does not know are left out.

    Attributes:
      SITE: kind of the lines by name in the field `sites`; None where there are none.
    """

    SITE: ClassVar[type[Line] | None] = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their default, and those without one."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != _default(f)}
        if self.SITE:
            content["sites"] = {name: site.to_json() for name, site in content["sites"].items()}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what to_json wrote.

        Raises:
          ValueError: a field without a default is missing.
        """
        if cls.SITE:
            sites = {name: cls.SITE.from_json(site) for name, site in content.get("sites", {}).items()}
            content = {**content, "sites": sites}
        try:
            return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
        except TypeError as error:
            raise ValueError(f"{cls.__name__} without {error}") from error


def _default(one: Any) -> object:
    """A field's default; of one without, an object that equals nothing."""
    if one.default_factory is not MISSING:
        return one.default_factory()
    return object() if one.default is MISSING else one.default


@dataclass(frozen=True)
class SiteLine(Line):
    """One hospital in a round.

    Attributes:
      weight: of its update in the mean.
      bytes_up: what it sent.
      norm: length of its update, to six digits.
      audit: newest hash of its audit log before it sent this.
      shrunk: what its update was multiplied by, where it was longer than federation.norm_bound.
      withheld: why the numbers below are missing.
      seconds: wall clock of its training.
      cls, seg, rec, total: mean losses over its slices.
      val_auc_before, val_dice_before: of the encoder that the round began with, with its own heads, on its validation split.
    """

    weight: float
    bytes_up: int
    norm: float
    audit: str
    shrunk: float | None = None
    withheld: str = ""
    seconds: float | None = None
    cls: float | None = None
    seg: float | None = None
    rec: float | None = None
    total: float | None = None
    val_auc_before: float | None = None
    val_dice_before: float | None = None


@dataclass(frozen=True)
class RoundLine(Line):
    """One round.

    Attributes:
      round: from 1.
      time: when it ended, seconds of the epoch.
      seconds: wall clock of the whole round.
      bytes_down, bytes_up: sent to all hospitals, and by all.
      sites: name -> what came of a hospital whose update counts.
      refused: name -> why a hospital's update does not.
      agreement: length of the mean update, in mean lengths of the updates: 1 where all point the same way, 1 over the root
        of their number where they have nothing in common; None where nothing moved.
    """

    SITE = SiteLine

    round: int
    time: float
    seconds: float
    bytes_down: int
    bytes_up: int
    sites: dict[str, SiteLine]
    refused: dict[str, str]
    agreement: float | None = None


@dataclass(frozen=True)
class RunStatus(Line):
    """Status of a run.

    Attributes:
      state: "running", "waiting", "finished", "failed" or "crashed"; "" before it said anything.
      time: when it said so, seconds of the epoch.
      what: what it does or waits for.
      sites: who has not answered yet.
      error: why it failed.
    """

    state: str = ""
    time: float = 0.0
    what: str = ""
    sites: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class SiteSummary(Line):
    """One hospital of a run.

    Attributes:
      role: train or held-out.
      weight: of its updates in the mean; None for one that was tested only.
      patients, slices, positives: of the whole hospital; None where its policy keeps them.
    """

    role: str
    weight: float | None = None
    patients: int | None = None
    slices: int | None = None
    positives: int | None = None


@dataclass(frozen=True)
class Summary(Line):
    """A run's result, in summary.json.

    Attributes:
      config_hash: of the run config.
      rounds: done.
      sites: name -> hospital.
      bytes_up_per_round: sent by all hospitals, mean over rounds; None before the end.
      seconds_per_round: wall clock, mean over rounds; None before the end.
      evaluation, evaluation_before_training: of the final and the initial model, as
        server/evaluation/evaluate.py computes it: "seen", "unseen" and "per_site", each with auc, f1 and dice.
    """

    SITE = SiteSummary

    config_hash: str
    rounds: int
    sites: dict[str, SiteSummary]
    bytes_up_per_round: float | None = None
    seconds_per_round: float | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluation_before_training: dict[str, Any] = field(default_factory=dict)
