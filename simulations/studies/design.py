"""Experiments: one file each, many trainings, all of it resumable and in small pieces.

In: simulations/experiments/NAME.toml. Out: simulations/results/NAME/ARM.SEED.json, one per arm and seed, with the config,
the commit, the machine and what was measured. Drawn hospitals and trained models are kept in a store that is safe to
delete: what is needed again is made again, bit by bit the same on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from shared.config import ConfigError, RunConfig, parse_config
from simulations.phantom.render import DRAWING
from simulations.studies.consortia import consortium
from simulations.studies.training import ATTACKS, MODES, StudyError

ROOT = Path(__file__).resolve().parents[2]
FOLDER, RESULTS = ROOT / "simulations" / "experiments", ROOT / "simulations" / "results"
RECIPE = ROOT / "simulations" / "study.toml"
STORE = ROOT / ".studies"
HEADS = ("average", "ensemble", "probe")
ADAPTATIONS = ("none", "calibration", "reconstruction")
MEASURES = ("attention", "reliance", "similarity", "cosines", "ceiling")
# Run config keys that came after results were stored, each with the value that computes what was computed without it.
# With that value a key is no part of a recipe, so that those results stay valid.
LATER_KEYS: dict[str, object] = {"federation.weights": "equal"}


@dataclass(frozen=True)
class Arm:
    """One way of doing it.

    Attributes:
      name: in tables and file names.
      mode: federated, pooled or alone.
      config: dotted run config keys.
      steps: optimiser steps of each site.
      consortium: of simulations/studies/consortia.py.
      hospitals: of the training hospitals, by number; () is all. With mode "alone" each makes a model of its own.
      heads: average, ensemble or probe.
      last: share of the rounds, from the end, whose global tensors are averaged (stochastic weight averaging); 0 is none.
      adjust: whether sites' weights follow their generalisation gaps (FedDG-GA).
      attack: what the last training hospital does with its update, one of ATTACKS; "" is nothing.
      adapt: what an unseen hospital does without labels: one of ADAPTATIONS.
      against: arm that encoders are compared with, for the measure "similarity".
      measures: of MEASURES; scores are always kept.
    """

    name: str
    mode: str = "pooled"
    config: dict[str, object] = field(default_factory=dict)
    steps: int = 1000
    consortium: str = "hospitals"
    hospitals: tuple[int, ...] = ()
    heads: str = "average"
    last: float = 0.0
    adjust: bool = False
    attack: str = ""
    adapt: str = "none"
    against: str = ""
    measures: tuple[str, ...] = ()

    def run_config(self, seed: int) -> RunConfig:
        """The run config of one seed, but for the number of rounds, which follows from the steps."""
        flat = {
            f"{section}.{key}": v
            for section, keys in tomllib.loads(RECIPE.read_text()).items()
            for key, v in keys.items()
        }
        return parse_config(flat | self.config | {"run.seed": seed})


@dataclass(frozen=True)
class Experiment:
    """One file of simulations/experiments.

    Attributes:
      name: the file's.
      title, question, expected: for readers.
      reference: arm that the others are compared with.
      seeds: each draws new patients and initial weights.
      arms: what is compared.
      table: what EXPERIMENTS.md shows, see simulations/studies/tables.py.
      finding: what was found, in words; written by who looked at the numbers.
    """

    name: str
    title: str
    question: str
    expected: str
    reference: str
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    table: str = "scores"
    finding: str = ""

    def arm(self, name: str) -> Arm:
        """An arm by name."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    experiment: Experiment
    arm: Arm
    seed: int

    @property
    def result(self) -> Path:
        """Path of its result."""
        return RESULTS / self.experiment.name / f"{self.arm.name.replace(' ', '-').replace('/', '-')}.{self.seed}.json"

    def recipe(self) -> dict:
        """All that decides the result."""
        against = [asdict(self.experiment.arm(self.arm.against))] if self.arm.against else []
        hospitals = consortium(self.arm.consortium)
        decisive = {"arm": asdict(self.arm), "against": against, "seed": self.seed, "phantom": DRAWING}
        flat = self.arm.run_config(self.seed).flat()
        decisive["config"] = {k: v for k, v in flat.items() if k not in LATER_KEYS or v != LATER_KEYS[k]}
        decisive["training"] = [asdict(h) for h in hospitals.training]
        decisive["tests"] = {group: [asdict(h) for h in sites] for group, sites in hospitals.tests.items()}
        return decisive

    def digest(self) -> str:
        """12 hexadecimal digits of the recipe."""
        return _digest(self.recipe())

    def done(self) -> bool:
        """Whether a result of this very recipe is stored."""
        try:
            return json.loads(self.result.read_text())["recipe"] == self.digest()
        except (OSError, ValueError, KeyError):
            return False


@dataclass(frozen=True)
class Training:
    """One model to train; several arms may share it.

    Attributes:
      consortium, mode, hospitals, config, steps, last, adjust, attack, seed: as in Arm.
      cosines: whether the tasks' gradients are compared on the way.
    """

    consortium: str
    mode: str
    hospitals: tuple[int, ...]
    config: dict[str, object]
    steps: int
    last: float
    adjust: bool
    attack: str
    seed: int
    cosines: bool

    def folder(self, store: Path) -> Path:
        """Path of the trained model."""
        decisive = asdict(self)  # by whom it is trained on, not by the consortium's name
        decisive["consortium"] = [asdict(h) for h in consortium(self.consortium).training if h.number in self.hospitals]
        return store / "models" / _digest([decisive, DRAWING])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def trainings(job: Job) -> list[Training]:
    """The models that a job needs, its own first."""
    needed = []
    for arm in [job.arm] + ([job.experiment.arm(job.arm.against)] if job.arm.against else []):
        every = arm.hospitals or tuple(h.number for h in consortium(arm.consortium).training)
        parts = [(number,) for number in every] if arm.mode == "alone" else [every]
        flat = arm.run_config(job.seed).flat()
        for key in ("federation.heads", "run.id", "run.folder", "simulation.hospitals", "evaluation.replicates"):
            del flat[key]
        for part in parts:
            cosines = "cosines" in arm.measures
            how = (arm.steps, arm.last, arm.adjust, arm.attack)
            needed.append(Training(arm.consortium, arm.mode, part, flat, *how, job.seed, cosines))
    return needed


def read_experiment(name: str) -> Experiment:
    """One experiment's file, checked.

    Raises:
      StudyError: no such experiment, an unknown key, or a value that cannot be; names it and what was expected.
    """
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise StudyError(f"no experiment {name!r}; there are: {known}")
    try:
        content = tomllib.loads(path.read_text())
        common = content.pop("all", {})
        arms = tuple(_read_arm(name, common, entry) for entry in content.pop("arms"))
        experiment = Experiment(
            name=name, arms=arms, **{k: tuple(v) if k == "seeds" else v for k, v in content.items()}
        )
    except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise StudyError(
            f"experiment {path.name}: {error}; expected title, question, expected, reference, seeds, arms"
        ) from error
    names = [arm.name for arm in experiment.arms]
    if len(set(names)) != len(names) or experiment.reference not in names:
        raise StudyError(
            f"experiment {name!r}: arms {names}, reference {experiment.reference!r}; expected each name once"
        )
    for arm in experiment.arms:
        if arm.against and arm.against not in names:
            raise StudyError(
                f"experiment {name!r}, arm {arm.name!r}: against is {arm.against!r}, expected one of {names}"
            )
    return experiment


def _read_arm(experiment: str, common: dict, entry: dict) -> Arm:
    """One arm, with what all arms of the file share."""
    values = common | entry | {"config": common.get("config", {}) | entry.get("config", {})}
    unknown = values.keys() - {f.name for f in fields(Arm)}
    if unknown:
        raise StudyError(f"experiment {experiment!r}: unknown key {sorted(unknown)[0]!r} of an arm")
    arm = Arm(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    for key, choices in (
        ("mode", MODES),
        ("heads", HEADS),
        ("adapt", ADAPTATIONS),
        ("attack", tuple(ATTACKS)),
    ):
        if getattr(arm, key) not in choices:
            raise StudyError(
                f"experiment {experiment!r}, arm {arm.name!r}: {key} is {getattr(arm, key)!r}, expected one of {choices}"
            )
    if not set(arm.measures) <= set(MEASURES):
        raise StudyError(
            f"experiment {experiment!r}, arm {arm.name!r}: measures {arm.measures}, expected of {MEASURES}"
        )
    try:
        consortium(arm.consortium)
        arm.run_config(0)
    except (KeyError, ConfigError) as error:
        raise StudyError(f"experiment {experiment!r}, arm {arm.name!r}: {error}") from error
    return arm


def all_experiments() -> list[Experiment]:
    """Every experiment, by file name."""
    return [read_experiment(path.stem) for path in sorted(FOLDER.glob("*.toml"))]


def jobs(experiment: Experiment) -> Iterator[Job]:
    """Its arms, seed by seed, so that an unfinished experiment has whole seeds."""
    for seed in experiment.seeds:
        for arm in experiment.arms:
            yield Job(experiment, arm, seed)
