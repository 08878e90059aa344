"""One local round in a hospital: global encoder in, locally trained encoder out.

The procedure is ordinary PyTorch: Muon and AdamW, a learning rate that warms up and falls over the whole federation,
gradient clipping, bfloat16 where the machine is faster with it. Heads and the optimiser's state stay on the
hospital's own disk between rounds (LocalState); they never travel with a round.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from client.training.muon import build_muon
from shared.config import RunConfig
from shared.model.batches import Batch, Inputs, make_batch, make_inputs
from shared.model.losses import TaskBalance, slice_losses
from shared.model.sampling import make_sampler
from shared.model.scoring import build_model
from shared.model.swin import VARIANTS, MultiTaskSwin, autocast
from shared.refusals import Refusal, Refused
from shared.slices import SliceCache

# Where the network meets pixels and the logit: no rotation of their inputs is natural, so they are not Muon's.
_EDGES = ("encoder.patch_embed.", "cls.", "seg.output.", "rec.output.")


class TrainError(Refused):
    """A local round cannot be trained."""


@dataclass(frozen=True)
class RoundReport:
    """Result of a local round; sums over slices, so that sites' numbers merge by addition.

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


@dataclass(frozen=True)
class Optimisers:
    """Muon for matrices and AdamW for the rest, or AdamW alone, stepped as one.

    Attributes:
      parts: each group has the key "top", its rate at its highest.
    """

    parts: tuple[torch.optim.Optimizer, ...]

    def set_rate(self, share: float) -> None:
        """Every group's rate as a share of its highest."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["top"] * share

    def zero_grad(self) -> None:
        """Forget gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict]:
        """The parts' states."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """The inverse."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimisers(model: nn.Module, balance: TaskBalance, config: RunConfig) -> Optimisers:
    """The optimisers of a local round.

    Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the step of every matrix inside the network; the input
    projection, what ends in pixels or the logit, biases, norms and relative position tables are AdamW's. Weight decay is
    on matrices only.
    """
    settings = config.train
    matrices, plain, others = [], [], list(balance.parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "relative_position" in name:
            others.append(parameter)
        elif settings.optimiser == "muon" and parameter.ndim == 2 and not name.startswith(_EDGES):
            matrices.append(parameter)
        else:
            plain.append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [
        {"params": plain, "weight_decay": decay, "top": rate},
        {"params": others, "weight_decay": 0.0, "top": rate},
    ]
    parts = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)]
    if matrices:
        group = {"params": matrices, "top": settings.matrix_rate}
        device, momentum = matrices[0].device, 0.95
        parts.append(build_muon([group], device, lr=settings.matrix_rate, weight_decay=decay, momentum=momentum))
    return Optimisers(tuple(parts))


def rate_share(config: RunConfig, progress: float) -> float:
    """Share of the highest rate at `progress` in [0, 1] of the whole federation: linear warm-up, then half a cosine to 1 %."""
    warmup = config.train.warmup
    if progress < warmup:
        return 0.01 + 0.99 * progress / warmup
    fall = (progress - warmup) / max(1 - warmup, 1e-9)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall))


def round_seed(seed: int, site: str, round_number: int) -> int:
    """One seed per run, site and round; equal inputs give equal rounds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{site}/{round_number}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Learner:
    """Model, losses and optimisers of a hospital.

    Attributes:
      model: the global encoder and this site's heads, on its own device.
      balance: how the tasks are weighed.
      optimisers: over both.
    """

    model: MultiTaskSwin
    balance: TaskBalance
    optimisers: Optimisers


def build_learner(config: RunConfig, device: torch.device) -> Learner:
    """The run's model with its initial weights, and what trains it."""
    model = build_model(config.model, config.run.seed).to(device)
    balance = TaskBalance(config.loss).to(device)
    return Learner(model, balance, build_optimisers(model, balance, config))


def training_inputs(cache: SliceCache, config: RunConfig, site: str) -> Inputs:
    """A site's training slices.

    Raises:
      TrainError: there are not two of them.
    """
    rows = cache.rows("train")
    if len(rows) < 2:
        raise TrainError(
            f"site {site!r}: fewer than two training slices; see the split column of the cache's index.csv",
            Refusal.SITE,
        )
    return make_inputs(cache, rows, config.model.windows(), VARIANTS[config.model.variant].image_size)


def train_round(
    learner: Learner,
    inputs: Inputs,
    config: RunConfig,
    *,
    site: str,
    round_number: int,
    proximal_mu: float = 0.0,
    progress: Callable[[str], None] = lambda line: None,
) -> RoundReport:
    """Train in place for one round.

    Args:
      learner: changed in place; its optimisers' state goes on from the last round.
      inputs: the site's training slices.
      config: the run config.
      site, round_number: with the run's seed they decide the order of slices and the augmentation; on a CPU equal
        inputs give equal bits. Rounds count from 1.
      proximal_mu: FedProx (Li et al. 2020, arXiv:1812.06127, equation 2); 0 is FedAvg.
      progress: called with one line per epoch; no patient data.
    Returns:
      What was done; the caller's policy decides whether it may leave.
    Raises:
      TrainError: a loss or gradient that is not finite.
    """
    model, optimisers = learner.model, learner.optimisers
    device = next(model.parameters()).device
    seed = round_seed(config.run.seed, site, round_number)
    generator = torch.Generator().manual_seed(seed)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()} if proximal_mu else {}
    sampler = make_sampler(inputs.label, inputs.mask[inputs.place], config.train.sampling)
    settings = config.train
    steps_total = sampler.round_steps(settings.batch, settings.epochs, settings.steps)
    sums, slices, started = torch.zeros(4, dtype=torch.float64), 0, time.perf_counter()
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # stochastic depth
        batches = sampler.round(settings.batch, settings.epochs, settings.steps, generator)
        for step, chosen in enumerate(batches):
            batch = make_batch(inputs, chosen, settings.augment, generator).to(device)
            optimisers.set_rate(rate_share(config, (round_number - 1 + step / steps_total) / config.federation.rounds))
            means, total, norm = train_step(learner, batch, config, anchor, proximal_mu)
            if not torch.isfinite(total + norm):  # the step was not taken
                raise TrainError(
                    f"site {site!r}: loss is {total.item()} and the gradient's norm {norm.item()} in round {round_number}, "
                    f"step {step}; expected finite numbers: lower train.learning_rate and train.matrix_rate, or set "
                    "train.precision to 'fp32'",
                    Refusal.DIVERGED,
                )
            sums += torch.cat([means, total[None]]).double().cpu() * len(chosen)
            slices += len(chosen)
            if (step + 1) % sampler.steps(settings.batch) == 0:
                progress(f"site {site!r} round {round_number}: step {step + 1} of {steps_total}")
    return RoundReport(steps_total, slices, *sums.tolist(), time.perf_counter() - started)


def train_step(
    learner: Learner,
    batch: Batch,
    config: RunConfig,
    anchor: Mapping[str, Tensor] = MappingProxyType({}),
    proximal_mu: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimiser step, unless the loss or the gradient is not finite.

    Args:
      learner: changed in place.
      batch: on the learner's device.
      config: the run config.
      anchor, proximal_mu: parameters that the round began with, and FedProx's mu.
    Returns:
      The tasks' mean losses (3,), their weighed sum and the gradient's norm; detached.
    """
    model, balance = learner.model, learner.balance
    with autocast(config.train.precision, batch.image.device):
        prediction = model(batch.image, segment=config.loss.seg > 0, reconstruct=config.loss.rec > 0)
    losses = slice_losses(prediction, batch)
    total = balance.total(losses)
    learner.optimisers.zero_grad()
    balance.prepare(losses, model.last_shared())
    (total + proximal_term(model, anchor, proximal_mu)).backward()
    for name, parameter in model.named_parameters():  # weight decay and FedProx leave heads without a task unchanged
        if getattr(config.loss, name.partition(".")[0], 1) == 0:
            parameter.grad = None
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm or math.inf)
    if torch.isfinite(total + norm):  # else it would reach the weights and the optimisers' state
        learner.optimisers.step()
        balance.settle()
    return losses.means().detach(), total.detach(), norm


def proximal_term(model: nn.Module, anchor: Mapping[str, Tensor], mu: float) -> Tensor | float:
    """FedProx's mu / 2 times the squared distance from where the round began; 0 without anchor."""
    if not anchor:
        return 0.0
    distance = sum((p - anchor[name]).square().sum() for name, p in model.named_parameters())
    return 0.5 * mu * distance
