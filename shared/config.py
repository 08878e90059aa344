"""The run config: Flower's flat dictionary in, frozen dataclasses out, nothing unknown accepted.

The defaults stand here once; `[tool.flwr.app.config]` in pyproject.toml lists the same keys because Flower
refuses to override a key that it does not find there, and a test keeps the two equal. Whoever starts a run
can change any of it, so nothing here protects a hospital: that is site.yaml's part (client/boundary/policy.py).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from shared.config_values import ConfigError as ConfigError
from shared.config_values import Scalar as Scalar
from shared.config_values import checked_value

PLACES = ("run.id", "run.folder", "run.resume", "simulation.hospitals")  # keys that no result depends on
MOST_HU, MOST_WINDOWS = 32768.0, 8  # CT values are int16
SYNTHETIC = "synthetic"  # model.pretrained: the starting model that comes with hemafed
NAME_WORDS = "up to 64 letters, digits, '-', '_' or '.', a letter or digit first"


@dataclass(frozen=True)
class RunSettings:
    """Where results go, and the seed.

    Attributes:
      id: name of the run's folder; empty makes one from the date and the config.
      folder: where run folders are made, on the server.
      seed: seeds the initial model, the order of slices and the augmentation.
      resume: continue the run `id` after its last finished round.
    """

    id: str = ""
    folder: str = "runs"
    seed: int = 0
    resume: bool = False


@dataclass(frozen=True)
class ModelSettings:
    """The model to train.

    Attributes:
      variant: a key of shared.model.swin.VARIANTS.
      windows_hu: one input channel each, "low:high" in HU, separated by commas.
      pretrained: what the run begins with; empty for random weights, "synthetic" for the model of this variant that comes
        with hemafed (shared/model/starting.py), else a safetensors file with timm Swin weights on the server.
      head_norm: what normalises the classification head's features: the "batch", or the "frozen" statistics of the
        starting model, which no hospital's slices change (FixBN: Zhong et al. 2023, arXiv:2303.06530).
    """

    variant: str = "default"
    windows_hu: str = "0:80"
    pretrained: str = ""
    head_norm: str = "batch"

    @property
    def brought(self) -> bool:
        """Whether the initial encoder comes from a file of the centre's, which hospitals do not have."""
        return self.pretrained not in ("", SYNTHETIC)

    def windows(self) -> tuple[tuple[float, float], ...]:
        """The windows as (low, high) in HU."""
        try:
            edges = [window.split(":") for window in self.windows_hu.split(",")]
            pairs = [(float(low), float(high)) for low, high in edges]
        except ValueError:
            pairs = []
        sound = all(-MOST_HU <= low < high <= MOST_HU for low, high in pairs)
        if not sound or not 1 <= len(pairs) <= MOST_WINDOWS:
            raise ConfigError(
                f"model.windows_hu is {self.windows_hu[:60]!r}; expected 'low:high' in HU with low < high, up to {MOST_WINDOWS} "
                "separated by commas, such as '0:80' or '0:80,-20:180'"
            )
        return tuple(pairs)


@dataclass(frozen=True)
class LossSettings:
    """Weights of the three tasks.

    Attributes:
      cls, seg, rec: weights; the paper's are 0.3, 0.4, 0.4 (arXiv:2505.06185, equation 1). A task of weight 0 is left
        out, its decoder is not computed.
      weighting: "fixed" keeps them; "uncertainty" and "gradnorm" begin with them and learn on, see shared/model/losses.py.
    """

    cls: float = 0.3
    seg: float = 0.4
    rec: float = 0.4
    weighting: str = "fixed"


@dataclass(frozen=True)
class TrainSettings:
    """One hospital's part of a round.

    Attributes:
      epochs: passes over the hospital's training slices in one round.
      steps: optimiser steps of one round, however many slices the hospital has; 0 goes by epochs.
      batch: slices per step.
      sampling: "all" takes every training slice in an epoch; "telling" those alone that show blood or have a label;
        "balanced" these and as many of the others, drawn anew each time (shared/model/sampling.py).
      optimiser: "muon" steps matrices by Muon and the rest by AdamW, "adamw" all by AdamW.
      learning_rate: AdamW's at its highest, after the warm-up.
      matrix_rate: Muon's at its highest.
      weight_decay: on matrices only.
      warmup: share of the whole federation's training during which the rate rises.
      clip_norm: largest gradient norm of a step; 0 switches clipping off.
      augment: "none"; "pose" is random flips, rotation, scale and shift; "scanner" adds what scanners differ in:
        calibration, gain, noise, kernel and cupping.
      precision: "auto" takes bfloat16 where the machine is faster with it; "bf16" or "fp32" forces one.
    """

    epochs: int = 2
    steps: int = 0
    batch: int = 16
    sampling: str = "balanced"
    optimiser: str = "muon"
    learning_rate: float = 5e-4
    matrix_rate: float = 0.007
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip_norm: float = 1.0
    augment: str = "scanner"
    precision: str = "auto"


@dataclass(frozen=True)
class FederationSettings:
    """How hospitals train together.

    Attributes:
      rounds: number of rounds.
      strategy: fedavg, fedprox, fedavgm or fedadam.
      weights: what hospitals count in a mean: "equal", or by "patients", from a third to three times their median.
      rule: how a round's updates become one: "mean", or one that a hospital gone wrong cannot move at will: "median",
        "trimmed-mean" or "krum"; these count each hospital once, whatever its weight.
      faulty: of how many hospitals at a time the trimmed mean and Krum may be wrong.
      norm_bound: an update longer than this many times the round's median is shortened to it; 0 is no bound.
      share: "encoder" sends tensors under `encoder.` only, "all" the heads too.
      codec: how tensors travel: "fp32" whole; "fp16", "int8", "int4", "int2" as differences (shared/wire/codecs.py).
      heads: what the global model uses as heads: average, ensemble or probe.
      quorum: fewest good updates for a round; below it the run waits, and asks for the round again.
      wait_s: how long it waits for a quorum of hospitals, and goes on asking for a round, before it stops with an error.
      round_deadline_s: a hospital that has not answered by then is left out of the round, and asked again once it answered.
      proximal_mu: FedProx's mu.
      server_learning_rate: FedAvgM's and FedAdam's step on the server; FedAdam moves every value by about this much a round.
      server_momentum: FedAvgM's momentum, FedAdam's beta 1.
      development_site: site.yaml of the data on which heads = "probe" is fitted, on the server.
    """

    rounds: int = 12
    strategy: str = "fedavg"
    weights: str = "equal"
    rule: str = "mean"
    faulty: int = 1
    norm_bound: float = 0.0
    share: str = "encoder"
    codec: str = "fp32"
    heads: str = "average"
    quorum: int = 2
    wait_s: float = 120.0
    round_deadline_s: float = 3600.0
    proximal_mu: float = 0.01
    server_learning_rate: float = 1.0
    server_momentum: float = 0.9
    development_site: str = ""


@dataclass(frozen=True)
class EvaluationSettings:
    """Attributes:
    replicates: bootstrap samples of patients behind each interval.
    """

    replicates: int = 1000


@dataclass(frozen=True)
class SimulationSettings:
    """Attributes:
    hospitals: folder of simulated hospitals; read only by a simulated node, which has no site.yaml of its own.
    """

    hospitals: str = "hospitals"


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    simulation: SimulationSettings = field(default_factory=SimulationSettings)

    def flat(self) -> dict[str, Scalar]:
        """Dotted keys and values, as Flower passes them."""
        return {f"{section}.{key}": value for section, values in asdict(self).items() for key, value in values.items()}

    def hash(self) -> str:
        """12 hexadecimal digits of what decides the result: all but names and places of folders."""
        decisive = {key: value for key, value in self.flat().items() if key not in PLACES}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def config_digest(config: RunConfig) -> str:
    """SHA-256 of the whole run config, 64 hexadecimal digits; what the centre signs with each instruction."""
    return hashlib.sha256(json.dumps(config.flat(), sort_keys=True).encode()).hexdigest()


def is_name(text: object) -> bool:
    """Whether a text can be a site's or a run's name, and so a file name."""
    return isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text) is not None


def parse_config(flat: dict[str, Any]) -> RunConfig:
    """Turn Flower's flat run config into a RunConfig.

    Args:
      flat: dotted key -> value; keys that are missing keep their default.
    Returns:
      The config, every value of its declared type and range.
    Raises:
      ConfigError: an unknown key (with the closest valid one), a wrong type or a value out of range.
    """
    defaults = RunConfig().flat()
    values = {}
    for key, value in flat.items():
        if key not in defaults:
            near = difflib.get_close_matches(str(key)[:60], defaults, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown config key {ascii(key)[:60]}; did you mean {near!r}? (shared/config.py lists all keys)"
            )
        values[key] = checked_value(key, value, type(defaults[key]))
    merged = defaults | values
    sections = {
        name: kind(**{key.name: merged[f"{name}.{key.name}"] for key in fields(kind)})
        for name, kind in get_type_hints(RunConfig).items()
    }
    config = RunConfig(**sections)
    if config.run.id == "latest" or not (config.run.id == "" or is_name(config.run.id)):
        raise ConfigError(f"run.id is {config.run.id!r}; expected {NAME_WORDS}, and not 'latest'")
    config.model.windows()
    if config.model.head_norm == "frozen" and config.model.pretrained != SYNTHETIC:
        raise ConfigError(
            "model.head_norm is 'frozen'; expected model.pretrained = 'synthetic', whose statistics it takes"
        )
    if not any((config.loss.cls, config.loss.seg, config.loss.rec)):
        raise ConfigError("loss.cls, loss.seg and loss.rec are all 0; expected at least one task to train")
    _check_rule(config.federation)
    return config


def _check_rule(settings: FederationSettings) -> None:
    """A rule that compares hospitals needs enough of them in every round."""
    # What each rule can be computed with: Yin et al. 2018 (arXiv:1803.01498), definition 2; Flower's Krum, which looks at n - f - 2
    # neighbours. Krum's guarantee asks for more, n >= 2 f + 3 (Blanchard et al. 2017, arXiv:1703.02757, section 4).
    least = {"median": 3, "trimmed-mean": 2 * settings.faulty + 1, "krum": settings.faulty + 3}.get(settings.rule, 1)
    if settings.quorum < least:
        raise ConfigError(
            f"federation.rule is {settings.rule!r} with federation.faulty = {settings.faulty} and federation.quorum = "
            f"{settings.quorum}; expected a quorum of at least {least}, or another rule"
        )
