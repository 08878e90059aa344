"""One local round in a hospital: global encoder in, locally trained encoder out.

The procedure is ordinary PyTorch: AdamW, a learning rate that warms up and falls over the whole federation,
gradient clipping, bfloat16 where the machine is faster with it. Heads and the optimiser's state stay on the
hospital's own disk between rounds (LocalState); they never travel with a round.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn

from shared.batches import epoch_batches, make_batch
from shared.config import RunConfig
from shared.losses import slice_losses
from shared.model import MultiTaskSwin, autocast
from shared.slices import SliceCache


class TrainError(RuntimeError):
    """A local round cannot be trained; the message holds no patient data and may reach the server."""


@dataclass(frozen=True)
class RoundReport:
    """What one local round did; sums over slices, so that sites' numbers merge by addition.

    Attributes:
      steps: optimiser steps.
      slices: slices seen, each epoch counted.
      cls, seg, rec, total: loss sums over those slices.
      seconds: wall clock of the training loop.
    """

    steps: int
    slices: int
    cls: float
    seg: float
    rec: float
    total: float
    seconds: float


def build_optimiser(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on biases, norms or relative position tables."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "relative_position" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "relative_position" in name]
    groups = [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.train.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(config: RunConfig, progress: float) -> float:
    """Rate at `progress` in [0, 1] of the whole federation: linear warm-up, then half a cosine to 1 % of the top."""
    top, warmup = config.train.learning_rate, config.train.warmup
    if progress < warmup:
        return top * (0.01 + 0.99 * progress / warmup)
    fall = (progress - warmup) / max(1 - warmup, 1e-9)
    return top * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))


def round_seed(seed: int, site: str, round_number: int) -> int:
    """One seed per run, site and round; equal inputs give equal rounds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{site}/{round_number}".encode()).digest()[:7], "big")


def train_round(
    model: MultiTaskSwin,
    optimiser: torch.optim.Optimizer,
    cache: SliceCache,
    config: RunConfig,
    *,
    site: str,
    round_number: int,
    proximal_mu: float = 0.0,
    progress: Callable[[str], None] = lambda line: None,
) -> RoundReport:
    """Train in place for one round.

    Args:
      model: holds the global encoder and this site's heads; changed in place, on its own device.
      optimiser: over the model's parameters; its state goes on from the last round.
      cache: the site's slices; only the split "train" is used.
      config: the run config.
      site, round_number: with the run's seed they decide the order of slices and the augmentation; on a CPU equal
        inputs give equal bits. Rounds count from 1.
      proximal_mu: FedProx (Li et al. 2020, arXiv:1812.06127, equation 2); 0 is FedAvg.
      progress: told one line an epoch; no patient data.
    Returns:
      What was done; the caller's policy decides whether it may leave.
    Raises:
      TrainError: no training slices, or a loss that is not finite.
    """
    rows = cache.rows("train")
    if not len(rows):
        raise TrainError(f"site {site!r}: no training slices; see the split column of the cache's index.csv")
    device = next(model.parameters()).device
    seed = round_seed(config.run.seed, site, round_number)
    generator = torch.Generator().manual_seed(seed)
    windows = config.model.windows()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()} if proximal_mu else {}
    steps_total = config.train.epochs * math.ceil(len(rows) / config.train.batch)
    sums, steps, started = np.zeros(4), 0, time.perf_counter()
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # stochastic depth
        for epoch in range(config.train.epochs):
            for chosen in epoch_batches(rows, config.train.batch, generator):
                batch = make_batch(
                    cache, chosen, windows, model.shape.image_size, generator if config.train.augment else None
                ).to(device)
                done = (round_number - 1 + steps / steps_total) / config.federation.rounds
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(config, done)
                with autocast(config.train.precision, device):
                    prediction = model(batch.image)
                losses = slice_losses(prediction, batch)
                total = losses.total(config.loss)
                if not torch.isfinite(total):
                    raise TrainError(
                        f"site {site!r}: loss is {total.item()} in round {round_number}, step {steps}; "
                        "expected a finite number: lower train.learning_rate or set train.precision to 'fp32'"
                    )
                optimiser.zero_grad(set_to_none=True)
                (total + proximal_term(model, anchor, proximal_mu)).backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm or math.inf)
                if not torch.isfinite(norm):  # before it reaches the weights and the optimiser's state
                    raise TrainError(
                        f"site {site!r}: the gradient's norm is {norm.item()} in round {round_number}, step {steps}; expected a "
                        "finite number: lower train.learning_rate or set train.precision to 'fp32'"
                    )
                optimiser.step()
                sums += [float(v.detach().sum()) for v in (losses.cls, losses.seg, losses.rec)] + [
                    float(total.detach()) * len(chosen)
                ]
                steps += 1
            progress(f"site {site!r} round {round_number}: epoch {epoch + 1} of {config.train.epochs}")
    cls, seg, rec, total_sum = (float(v) for v in sums)
    slices = config.train.epochs * len(rows)
    return RoundReport(steps, slices, cls, seg, rec, total_sum, time.perf_counter() - started)


def proximal_term(model: nn.Module, anchor: dict[str, Tensor], mu: float) -> Tensor | float:
    """FedProx's mu / 2 times the squared distance from where the round began; 0 without anchor."""
    if not anchor:
        return 0.0
    distance = sum((p - anchor[name]).square().sum() for name, p in model.named_parameters())
    return 0.5 * mu * distance


@dataclass(frozen=True)
class LocalState:
    """A run's heads and optimiser state on the hospital's disk; nothing of it leaves.

    One file per round, written beside its place and moved there in one step; the last two are kept, so that a round
    which the server asks for again, after a crash, begins where it began. Flower's context state would lose all this on
    a restart of the node, and silently above 400 MB.

    Attributes:
      folder: of one run, in the site's state folder.
    """

    folder: Path

    def save(self, model: MultiTaskSwin, optimiser: torch.optim.Optimizer, round_number: int) -> None:
        """Write heads and optimiser state after `round_number`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        heads = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}
        partial = self.folder / f"{os.getpid()}.partial"
        torch.save({"heads": heads, "optimiser": optimiser.state_dict()}, partial)
        os.replace(partial, self._path(round_number))
        for number in self._rounds():
            if not round_number - 1 <= number <= round_number:
                self._path(number).unlink()

    def restore(
        self, model: MultiTaskSwin, optimiser: torch.optim.Optimizer | None = None, before: int | None = None
    ) -> int:
        """Load what the last round left.

        Args:
          model: its heads are replaced.
          optimiser: its state is replaced.
          before: only what was saved before this round counts; by default the newest.
        Returns:
          The round it was saved after; 0 if there is none, and then the model keeps its initial heads.
        Raises:
          TrainError: the file does not fit the model.
        """
        rounds = [number for number in self._rounds() if before is None or number < before]
        if not rounds:
            return 0
        device = next(model.parameters()).device
        try:
            saved = torch.load(self._path(rounds[-1]), weights_only=True, map_location=device)
            if saved["heads"].keys() != {name for name in model.state_dict() if not name.startswith("encoder.")}:
                raise KeyError("other heads")
            model.load_state_dict(saved["heads"], strict=False)
            if optimiser is not None:
                optimiser.load_state_dict(saved["optimiser"])
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            EOFError,
            OSError,
            UnpicklingError,
        ) as error:
            raise TrainError(
                f"the site's state of run {self.folder.name!r} is damaged or does not fit the model ({type(error).__name__}); "
                "start the run under a new run.id, or delete the run's folder in the site's state folder"
            ) from error
        return rounds[-1]

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:05d}.pt"

    def _rounds(self) -> list[int]:
        """Rounds whose state is there, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.pt"))
