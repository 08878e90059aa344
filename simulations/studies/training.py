"""Trainings of a study: the hospital's own local round and the server's own aggregation, called in a loop.

No Flower process takes part, and none is missed: a test holds a training here against the same one through Flower, bit by
bit. A training ends as a folder with the encoder and every set of heads.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from client.training.round import Learner, build_learner, train_round, training_inputs
from server.federation.aggregate import WeightedSum, fold, mean
from server.federation.robust import combine, is_plain
from server.federation.server_step import server_step
from server.storage.checkpoint import Moments, read_tensors, write_tensors
from shared.config import FederationSettings, RunConfig
from shared.errors import HemafedError
from shared.groups import groups_shared
from shared.model.batches import Batch, read_batch
from shared.model.losses import slice_losses
from shared.model.sampling import make_sampler
from shared.model.scoring import best_device
from shared.model.swin import VARIANTS, MultiTaskSwin
from shared.slices import SliceCache
from shared.wire.codecs import PLAIN, encode, encode_update, minus, plus
from shared.wire.records import Tensors, to_arrays

MODES = ("federated", "pooled", "alone")
ADJUSTMENT = 0.1  # FedDG-GA's largest step of a site's weight in the first round; it falls to 0 with the rounds
# What the last site sends in place of its update: the update times this.
ATTACKS = {"": 1.0, "flipped sign": -1.0, "hundredfold": 100.0}
POOL = "pool"  # the name of the one site that pooled hospitals make


class StudyError(HemafedError, ValueError):
    """A study cannot be run as it is described; names the key and what was expected."""


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
      encoder: tensors under `encoder.`.
      heads: site -> tensors of its heads; one entry where the heads were shared or the hospitals pooled.
      trace: one entry per round: losses per slice, averaged over sites, and the balance's weights of the first.
      seconds: wall clock.
      images: slices that went through a step.
      cosines: comparisons of the tasks' gradients on the way, where they were asked for.
    """

    encoder: Tensors
    heads: dict[str, Tensors]
    trace: list[dict[str, float]]
    seconds: float
    images: int
    cosines: tuple[dict[str, float], ...] = ()

    def average(self) -> Tensors:
        """The mean of the heads."""
        total = WeightedSum({})
        for name in sorted(self.heads):
            total = fold(total, self.heads[name], 1.0)
        return mean(total)


AfterRound = Callable[[int, Tensors, MultiTaskSwin], None]


def train(
    caches: Mapping[str, SliceCache],
    config: RunConfig,
    mode: str,
    adjust: bool = False,
    attack: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    after_round: AfterRound = lambda number, arrays, model: None,
) -> Trained:
    """Train one model.

    Args:
      caches: of the training hospitals; with mode "alone" of one.
      config: the run config; its federation section counts in every mode, a lonely or pooled hospital is a federation
        of one.
      mode: one of MODES.
      adjust: whether sites' weights in the mean follow their generalisation gaps (FedDG-GA).
      attack: what the last site, by name, does with its update before it sends it; one of ATTACKS.
      progress: called with rounds done and rounds in all.
      after_round: given the round, the global tensors after it, and the first site's model as it trained it.
    Raises:
      TrainError: a hospital cannot train, or the training diverged.
    """
    if mode == "alone" and len(caches) != 1:
        raise StudyError(f"mode 'alone' with {len(caches)} hospitals, expected one")
    if mode == "pooled":
        caches = {POOL: pool(caches)}
    started = time.perf_counter()
    settings = config.federation
    names = sorted(caches)
    learners = {name: build_learner(config, best_device()) for name in names}
    inputs = {name: training_inputs(caches[name], config, name) for name in names}
    moments = Moments()
    shared = groups_shared(settings.share)
    arrays = to_arrays(learners[names[0]].model.state_dict(), shared)
    coded, sent, residuals = settings.codec != PLAIN, arrays, {}
    trace, images = [], 0
    held = {name: _validation(caches[name], config) for name in names} if adjust else {}
    weights, after = dict.fromkeys(names, 1 / len(names) if adjust else 1.0), {}
    for number in range(1, settings.rounds + 1):
        updates, reports = {}, []
        sent = encode(arrays, sent, settings.codec).received if coded else arrays
        for name in names:
            learners[name].model.load_state_dict(
                {n: torch.from_numpy(np.asarray(v)) for n, v in sent.items()}, strict=False
            )
        if adjust and number > 1:
            gaps = {name: _loss(learners[name], held[name], config) - after[name] for name in names}
            weights = adjust_weights(weights, gaps, ADJUSTMENT * (1 - (number - 1) / settings.rounds))
        for name in names:
            model = learners[name].model
            report = train_round(
                learners[name],
                inputs[name],
                config,
                site=name,
                round_number=number,
                proximal_mu=settings.proximal_mu if settings.strategy == "fedprox" else 0.0,
            )
            after[name] = _loss(learners[name], held[name], config) if adjust else 0.0
            updates[name] = to_arrays(model.state_dict(), shared)
            if coded:
                message, residuals[name] = encode_update(updates[name], sent, residuals.get(name), settings.codec)
                updates[name] = message.received
            reports.append(report)
        if attack:
            updates[names[-1]] = _attacked(updates[names[-1]], sent, ATTACKS[attack])
        average = _average(updates, weights, sent, settings)
        stepped, moments = server_step(settings, moments, number, sent, average)
        arrays = plus(stepped, minus(arrays, sent)) if coded else stepped
        images += sum(report.slices for report in reports)
        losses = {k: float(np.mean([getattr(r, k) / r.slices for r in reports])) for k in ("cls", "seg", "rec")}
        trace.append(losses | {f"weight_{k}": v for k, v in learners[names[0]].balance.weights().items()})
        after_round(number, arrays, learners[names[0]].model)
        progress(number, settings.rounds)
    if settings.share == "all":
        heads = {"all": {n: v for n, v in arrays.items() if not n.startswith("encoder.")}}
    else:
        heads = {name: to_arrays(learners[name].model.state_dict(), ("cls", "seg", "rec")) for name in names}
    encoder = {n: v for n, v in arrays.items() if n.startswith("encoder.")}
    return Trained(encoder, heads, trace, time.perf_counter() - started, images)


def adjust_weights(weights: dict[str, float], gaps: dict[str, float], step: float) -> dict[str, float]:
    """Give more weight in the mean to sites on which the global model is worse than the site's own.

    Args:
      weights: site -> weight; they sum to 1.
      gaps: site -> loss of the global model minus loss of the site's own, on the same slices.
      step: largest change of a weight, unitless; it should fall over the rounds.
    Returns:
      New weights that sum to 1; a site's is never below a tenth of its even share, so that none is left out.
    Source: FedDG-GA, Zhang et al. 2023 (CVPR, "Federated Domain Generalization with Generalization Adjustment"), eq. 8.
    """
    centre = sum(gaps.values()) / len(gaps)
    widest = max(abs(gap - centre) for gap in gaps.values())
    if not widest:
        return dict(weights)
    least = 0.1 / len(weights)
    moved = {site: max(weights[site] + step * (gaps[site] - centre) / widest, least) for site in weights}
    whole = sum(moved.values())
    return {site: value / whole for site, value in moved.items()}


def _attacked(update: Tensors, start: Tensors, factor: float) -> Tensors:
    """Return a faulty hospital's update: scaled or reversed."""
    return {n: (start[n] + factor * (v - start[n])).astype(np.float32) for n, v in update.items()}


def _average(
    updates: dict[str, Tensors], weights: dict[str, float], start: Tensors, settings: FederationSettings
) -> Tensors:
    """A round's updates as one, as server/federation/strategy.py combines what arrives."""
    if not is_plain(settings):
        return combine(updates, weights, start, settings).arrays
    total = WeightedSum({})
    for name in sorted(updates):
        total = fold(total, updates[name], weights[name])
    return mean(total)


def _validation(cache: SliceCache, config: RunConfig) -> Batch:
    """A site's validation slices as one batch."""
    return read_batch(cache, cache.rows("val"), config.model.windows(), VARIANTS[config.model.variant].image_size)


@torch.no_grad()
def _loss(learner: Learner, batch: Batch, config: RunConfig) -> float:
    """A site's weighed loss, without augmentation."""
    prediction = learner.model.eval()(batch.image, segment=config.loss.seg > 0, reconstruct=config.loss.rec > 0)
    return float(learner.balance.total(slice_losses(prediction, batch)))


def pool(caches: Mapping[str, SliceCache]) -> SliceCache:
    """Hospitals as one: what nobody may do with patients' scans, and what a federation is measured against."""
    parts = [caches[name] for name in sorted(caches)]
    fields = ("hu", "masks", "patient", "label", "has_mask", "split")
    return SliceCache(**{field: np.concatenate([getattr(part, field) for part in parts]) for field in fields})


def save_trained(folder: Path, trained: Trained) -> None:
    """Write a training beside its place, and move it there whole."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial / "encoder.safetensors", trained.encoder, {})
    for name, tensors in trained.heads.items():
        write_tensors(partial / f"heads-{name}.safetensors", tensors, {})
    facts = {key: getattr(trained, key) for key in ("seconds", "images", "trace", "cosines")}
    (partial / "trained.json").write_text(json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def read_trained(folder: Path) -> Trained:
    """The inverse of save_trained."""
    encoder, _ = read_tensors(folder / "encoder.safetensors")
    heads = {}
    for path in sorted(folder.glob("heads-*.safetensors")):
        heads[path.stem.removeprefix("heads-")], _ = read_tensors(path)
    return Trained(encoder=encoder, heads=heads, **json.loads((folder / "trained.json").read_text()))


def with_steps(config: RunConfig, caches: Mapping[str, SliceCache], steps: int) -> RunConfig:
    """The config with as many rounds as give every site about `steps` steps."""
    settings = config.train
    steps_of = []
    for cache in caches.values():
        rows = cache.rows("train")
        sampler = make_sampler(cache.label[rows], cache.masks[rows], settings.sampling)
        steps_of.append(sampler.round_steps(settings.batch, settings.epochs, settings.steps))
    rounds = max(1, round(steps / float(np.mean(steps_of))))
    return replace(config, federation=replace(config.federation, rounds=rounds))
