"""A starting model: encoder and decoders trained on random heads, for every federation to begin with.

In: the shards of simulations/heads/pool.py. Out: a checkpoint after every stage of steps, a line of its losses and of Dice on
shards that were never trained on, and at the end a model file with its card (shared/model/starting.py). The classifier of
kinds is used here alone.

Shape suffixes: N slice, B batch, K kind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from client.training.round import Optimisers, build_optimisers
from shared.config import SYNTHETIC, RunConfig, parse_config
from shared.model.batches import Batch, Inputs, make_batch, make_inputs
from shared.model.losses import TaskBalance, dice_score, slice_losses
from shared.model.scoring import best_device, build_model
from shared.model.starting import load_starting, read_card, starting_file, write_model
from shared.model.swin import VARIANTS, MultiTaskSwin, Prediction, autocast
from shared.slices import SliceCache
from simulations.heads.bleeding import KINDS
from simulations.heads.pool import draw_pool

WINDOWS_HU = "0:80,-40:200"  # blood against brain, and blood against bone and calcium
DATA = "synthetic heads of hemafed (simulations/heads); no scan of any patient"
KIND_WEIGHT = 0.3  # of the kinds' loss beside the run config's weights


@dataclass(frozen=True)
class Recipe:
    """How a starting encoder is trained.

    Attributes:
      steps: in all; the learning rate follows their share.
      stage: steps between two checkpoints.
      config: model, loss and train sections count.
      begin: a model file to go on from; None for random weights.
    """

    steps: int
    stage: int
    config: RunConfig
    begin: Path | None = None


@dataclass(frozen=True)
class Heads:
    """Slices of random heads at the model's input size.

    Attributes:
      inputs: slices and masks.
      kinds: float32 (N, K), which bleedings a slice shows.
    """

    inputs: Inputs
    kinds: NDArray[np.float32]


class Pretrainer(nn.Module):
    """The model with a classifier of kinds on its pooled features."""

    def __init__(self, model: MultiTaskSwin):
        super().__init__()
        self.model = model
        self.kinds = nn.Linear(model.shape.channels * 8, len(KINDS))


def make_recipe(variant: str, steps: int, batch: int, seed: int, begin: str = "", rate: float = 1.0) -> Recipe:
    """The recipe of the models that come with hemafed.

    Args:
      variant: a key of VARIANTS.
      steps, batch, seed: of the training.
      begin: empty for random weights, "synthetic" for the model that comes with hemafed, or a model file.
      rate: what the run config's default rates are multiplied by.
    Raises:
      ConfigError: no such variant, or a number that no run config accepts.
      StartingModelError: no starting model of this variant.
    """
    default = RunConfig().train
    keys = {
        "model.variant": variant,
        "model.windows_hu": WINDOWS_HU,
        "train.batch": batch,
        "train.learning_rate": rate * default.learning_rate,
        "train.matrix_rate": rate * default.matrix_rate,
        "run.seed": seed,
    }
    config = parse_config(keys)
    file = starting_file(variant) if begin == SYNTHETIC else Path(begin) if begin else None
    return Recipe(steps, min(500, steps), config, file)


def pretrain_model(folder: Path, shards: int, recipe: Recipe, say: Callable[[str], None]) -> Path:
    """Draw a pool, train on it and write the model.

    Args:
      folder: keeps the pool, and in a folder of the variant the checkpoint, the curve and model.safetensors.
      shards: of the pool; one in twenty is held out, at least one.
      recipe: how.
      say: called with a line per shard and per stage.
    Returns:
      The model's file, as shared/model/starting.py reads it.
    Raises:
      StartingModelError: the model to go on from does not fit.
    """
    config, own = recipe.config, folder / recipe.config.model.variant
    facts = {"steps": recipe.steps, "batch": config.train.batch, "seed": config.run.seed} | _ancestor(recipe)
    files = draw_pool(
        folder / "pool",
        config.run.seed,
        shards,
        os.cpu_count() or 1,
        lambda done, total: say(f"shard {done} of {total}"),
    )
    held = max(len(files) // 20, 1)
    train, held_out = load_heads(files[held:], config), load_heads(files[:held], config)
    learner = pretrain(own, train, held_out, recipe, best_device(), say)
    facts |= {"slices": len(train.kinds), "held_out": len(held_out.kinds)}
    facts |= {name: round(value, 3) for name, value in measure(learner, held_out, config).items()}
    write_model(own / "model.safetensors", learner.model, config.model, {"data": DATA} | facts)
    return own / "model.safetensors"


def _ancestor(recipe: Recipe) -> dict[str, object]:
    """What the card says of the model that the training went on from."""
    if recipe.begin is None:
        return {}
    card, content = read_card(recipe.begin), recipe.begin.read_bytes()
    return {"begun_with": hashlib.sha256(content).hexdigest(), "begun_steps": card.facts.get("steps", "not told")}


def load_heads(files: Sequence[Path], config: RunConfig) -> Heads:
    """Read shards and bring them to the model's input size, one after the other."""
    size = VARIANTS[config.model.variant].image_size
    parts, kinds, markers = [], [], []
    for file in files:
        shard = np.load(file)
        count = len(shard["hu"])
        cache = SliceCache(
            hu=shard["hu"],
            masks=shard["mask"],
            patient=shard["patient"].astype(str),
            label=_label(shard["marker"]),
            has_mask=np.ones(count, np.bool_),
            split=np.full(count, "train"),
        )
        parts.append(make_inputs(cache, np.arange(count), config.model.windows(), size))
        kinds.append(shard["kinds"].astype(np.float32))
        markers.append(_label(shard["marker"]))
    hu, mask = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hu", "mask"))
    count = len(hu)
    inputs = Inputs(
        hu,
        mask,
        np.arange(count),
        np.concatenate(markers),
        np.ones(count, np.bool_),
        config.model.windows(),
    )
    return Heads(inputs, np.concatenate(kinds))


def _label(marker: NDArray[np.int8]) -> NDArray[np.float32]:
    """1, 0 and NaN for unknown, float32."""
    return np.where(marker < 0, np.nan, marker).astype(np.float32)


def pretrain(
    folder: Path,
    train: Heads,
    held_out: Heads,
    recipe: Recipe,
    device: torch.device,
    progress: Callable[[str], None] = lambda line: None,
) -> Pretrainer:
    """Train, or go on from the last checkpoint.

    Args:
      folder: of checkpoint.pt and curve.jsonl.
      train, held_out: heads to train on, and others for the curve.
      recipe: how.
      device: where.
      progress: called with a line per stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = recipe.config
    torch.manual_seed(config.run.seed)
    learner = Pretrainer(build_model(config.model, config.run.seed)).to(device)
    if recipe.begin is not None:
        load_starting(learner.model, recipe.begin, config.model)
    balance = TaskBalance(config.loss).to(device)
    optimisers = build_optimisers(learner, balance, config)
    step = _resume(folder, learner, optimisers)
    while step < recipe.steps:
        started, sums = time.perf_counter(), torch.zeros(4)
        generator = torch.Generator().manual_seed(1_000_003 * config.run.seed + step)
        torch.manual_seed(config.run.seed + step)
        learner.train()
        end = min(step + recipe.stage, recipe.steps)
        stage = end - step
        while step < end:
            optimisers.set_rate(_rate_share(step / recipe.steps, config.train.warmup))
            chosen = np.sort(torch.randint(len(train.kinds), (config.train.batch,), generator=generator).numpy())
            batch = make_batch(train.inputs, chosen, config.train.augment, generator).to(device)
            kinds_BK = torch.from_numpy(train.kinds[chosen]).to(device)
            sums += _step(learner, balance, optimisers, batch, kinds_BK, config)
            step += 1
        line = dict(zip(("cls", "seg", "rec", "kinds"), (sums / stage).tolist(), strict=True))
        line |= {"step": step, **measure(learner, held_out, config), "seconds": time.perf_counter() - started}
        _keep(folder, learner, optimisers, step, line)
        progress(json.dumps({k: round(v, 4) for k, v in line.items()}))
    return learner


def _step(
    learner: Pretrainer,
    balance: TaskBalance,
    optimisers: Optimisers,
    batch: Batch,
    kinds_BK: Tensor,
    config: RunConfig,
) -> Tensor:
    """One optimiser step; returns the losses of the three tasks and of the kinds."""
    model = learner.model
    with autocast(config.train.precision, batch.image.device):
        stages = model.encode(batch.image)
        prediction = Prediction(model.classify(stages), model.seg(stages)[:, 0], model.rec(stages))
        logits_BK = learner.kinds(model.pool(stages)).float()
    losses = slice_losses(prediction, batch)
    kinds = functional.binary_cross_entropy_with_logits(logits_BK, kinds_BK)
    total = balance.total(losses) + KIND_WEIGHT * kinds
    optimisers.zero_grad()
    total.backward()
    nn.utils.clip_grad_norm_(learner.parameters(), config.train.clip_norm or math.inf)
    optimisers.step()
    return torch.cat([losses.means(), kinds[None]]).detach().cpu()


def _rate_share(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to 1 %."""
    if progress < warmup:
        return 0.01 + 0.99 * progress / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def measure(learner: Pretrainer, heads: Heads, config: RunConfig, threshold: float = 0.5) -> dict[str, float]:
    """Dice of slices with a bleeding, share of slices without one where nothing is marked, AUC of the marker.

    The area is .5 where all labelled slices are of one class.
    """
    learner.eval()
    dice, clean, logits, labels = [], [], [], []
    device = next(learner.parameters()).device
    for chosen in np.array_split(np.arange(len(heads.kinds)), -(-len(heads.kinds) // 64)):
        batch = make_batch(heads.inputs, chosen).to(device)
        with autocast(config.train.precision, device):
            prediction = learner.model(batch.image, reconstruct=False)
        marked = prediction.hematoma.sigmoid() > threshold
        bleeds = batch.mask.flatten(1).any(1)
        dice += dice_score(marked.float(), batch.mask)[bleeds].tolist()
        clean += (~marked.flatten(1).any(1))[~bleeds].tolist()
        known = ~torch.isnan(batch.label)
        logits += prediction.hypodensity[known].tolist()
        labels += batch.label[known].tolist()
    area = float(roc_auc_score(labels, logits)) if len(set(labels)) > 1 else 0.5
    return {"dice": float(np.mean(dice)), "clean": float(np.mean(clean)), "marker": area}


def _keep(folder: Path, learner: Pretrainer, optimisers: Optimisers, step: int, line: dict[str, float]) -> None:
    """Write the checkpoint in one step, then the curve's line."""
    content = {"step": step, "learner": learner.state_dict(), "optimisers": optimisers.state_dict()}
    torch.save(content, folder / "checkpoint.partial")
    (folder / "checkpoint.partial").replace(folder / "checkpoint.pt")
    with open(folder / "curve.jsonl", "a", encoding="utf-8") as curve:
        curve.write(json.dumps(line) + "\n")


def _resume(folder: Path, learner: Pretrainer, optimisers: Optimisers) -> int:
    """Put the last checkpoint in; returns its step."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return 0
    content = torch.load(path, weights_only=True)
    learner.load_state_dict(content["learner"])
    optimisers.load_state_dict(content["optimisers"])
    return content["step"]
