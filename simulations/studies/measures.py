"""Measures of a trained model; each is one function that returns plain numbers for a JSON file.

Patients here are synthetic, so scores of single slices may be stored: what is computed from them later (AUC, F1, Dice,
differences of methods with their intervals) is then the same numbers looked at in another way.

Shape suffixes: N slice, B batch, Y row, X column, D feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from shared.config import RunConfig
from shared.metrics import Scores
from shared.model.batches import Batch, read_batch
from shared.model.gradcam import grad_cam
from shared.model.losses import TASKS, slice_losses
from shared.model.scoring import build_model, score_slices
from shared.model.swin import MultiTaskSwin
from shared.slices import SliceCache
from shared.wire.records import Tensors
from simulations.studies.similarity import gradient_cosine, linear_cka, mean_cca

REGIONS = ("hematoma", "brain", "skull", "outside")
SKULL_HU = 200.0
_BATCH = 32
_MOST_CAM = 160  # slices whose Grad-CAM is drawn per group
_MOST_FEATURES = 240  # slices that two encoders are compared on


@dataclass(frozen=True)
class Voter:
    """One encoder with its sets of heads; a model is one or more of them, whose probabilities are averaged."""

    encoder: Tensors
    heads: tuple[Tensors, ...]


def load(voter: Voter, config: RunConfig, head: int = 0) -> MultiTaskSwin:
    """A voter as a model, with one of its sets of heads."""
    model = build_model(config.model, config.run.seed)
    model.load_state_dict(_tensors(voter.encoder | voter.heads[head]), strict=False)
    return model.eval()


def _tensors(arrays: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def score(voters: Sequence[Voter], cache: SliceCache, rows: NDArray[np.int64], config: RunConfig) -> Scores:
    """Scores of a model on slices; of several voters the mean probability, and no Dice."""
    parts = []
    for voter in voters:
        model = load(voter, config)
        heads = [_tensors(one) for one in voter.heads]
        parts.append(score_slices(model, heads, cache, rows, config.model, config.train.precision))
    if len(parts) == 1:
        return parts[0]
    probability = np.mean([1 / (1 + np.exp(-part.logit)) for part in parts], axis=0)
    logit = np.log(probability / (1 - probability))
    return Scores(logit, parts[0].label, np.full(len(logit), np.nan), parts[0].patient)


def scores_as_json(scores: Scores) -> dict:
    """Scores as small lists: two decimals, labels as a string of 1, 0 and -, blood of 1 and 0, patients by number."""
    _, patient = np.unique(scores.patient, return_inverse=True)
    marked = {}
    if scores.marked_mm2 is not None and scores.blood is not None:
        marked["marked_mm2"] = [None if np.isnan(v) else round(float(v)) for v in scores.marked_mm2]
        marked["blood"] = "".join(str(int(v)) for v in scores.blood)
    return marked | {
        "patient": patient.tolist(),
        "label": "".join("-" if np.isnan(v) else str(int(v)) for v in scores.label),
        "logit": [round(float(v), 2) for v in scores.logit],
        "dice": [None if np.isnan(v) else round(float(v), 3) for v in scores.dice],
    }


def scores_from_json(content: Mapping) -> Scores:
    """The inverse of scores_as_json."""
    return Scores(
        logit=np.array(content["logit"], np.float64),
        label=np.array([np.nan if v == "-" else float(v) for v in content["label"]]),
        dice=_known(content["dice"]),
        patient=np.array([f"{number:04d}" for number in content["patient"]]),
        marked_mm2=_known(content["marked_mm2"]) if "marked_mm2" in content else None,
        blood=np.array([v == "1" for v in content["blood"]]) if "blood" in content else None,
    )


def _known(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if v is None else v for v in values], np.float64)


def attention(voter: Voter, caches: Mapping[str, SliceCache], config: RunConfig) -> dict[str, float]:
    """Share of Grad-CAM's evidence for the marker that lies in each of REGIONS, and each region's share of the picture.

    Of positive slices, evenly over hospitals. Regions: the true hematoma; the rest of what the skull encloses; bone
    above 200 HU; everything else (scalp, holder, air).
    """
    model = load(voter, config)
    energy, area = np.zeros(len(REGIONS)), np.zeros(len(REGIONS))
    for cache, rows in _positive(caches):
        for start in range(0, len(rows), _BATCH):
            chosen = rows[start : start + _BATCH]
            batch = read_batch(cache, chosen, config.model.windows(), model.shape.image_size)
            cam_BYX = grad_cam(model, batch.image)[:, None]
            side = cache.hu.shape[-1]
            cam_BYX = torch.nn.functional.interpolate(cam_BYX, (side, side), mode="bilinear")[:, 0].numpy()
            for cam_YX, row in zip(cam_BYX, chosen, strict=True):
                regions = _regions(cache.hu[row], cache.masks[row])
                area += [region.mean() for region in regions]
                if cam_YX.sum() > 0:
                    energy += [cam_YX[region].sum() / cam_YX.sum() for region in regions]
    shares = energy / max(energy.sum(), 1e-12)
    result = {f"cam_{name}": float(v) for name, v in zip(REGIONS, shares, strict=True)}
    return result | {f"area_{name}": float(v) for name, v in zip(REGIONS, area / area.sum(), strict=True)}


def _positive(caches: Mapping[str, SliceCache]) -> list[tuple[SliceCache, NDArray[np.int64]]]:
    """Each hospital's first positive slices of its test split."""
    most = max(1, _MOST_CAM // len(caches))
    return [(c, np.nonzero((c.label == 1) & (c.split == "test"))[0][:most]) for c in caches.values()]


def _regions(hu_YX: NDArray[np.int16], mask_YX: NDArray[np.uint8]) -> list[NDArray[np.bool_]]:
    """REGIONS of a slice; together they are all of it."""
    hematoma_YX = mask_YX > 0
    bone_YX = (hu_YX > SKULL_HU) & ~hematoma_YX
    labels, count = ndimage.label(bone_YX)
    ring_YX = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]) if count else bone_YX
    inside_YX = ndimage.binary_fill_holes(ndimage.binary_closing(ring_YX, iterations=3)) & ~ring_YX & ~hematoma_YX
    return [hematoma_YX, inside_YX, ring_YX, ~(hematoma_YX | inside_YX | ring_YX)]


def reliance(voter: Voter, on: SliceCache, off: SliceCache, config: RunConfig) -> dict[str, float]:
    """Measure how much the planted feature alone moves the model: the same slices, noise included, with and without it.

    Returns:
      shift: mean of logit(on) - logit(off) over labelled test slices, in standard deviations of logit(off);
      flips: share of slices whose call at logit 0 changes.
    """
    rows = np.nonzero((on.split == "test") & ~np.isnan(on.label))[0]
    with_it, without = (score([voter], cache, rows, config).logit for cache in (on, off))
    spread = max(float(without.std()), 1e-6)
    return {
        "shift": float((with_it - without).mean() / spread),
        "flips": float(((with_it > 0) != (without > 0)).mean()),
    }


def similarity(a: Voter, b: Voter, caches: Mapping[str, SliceCache], config: RunConfig) -> dict[str, list[float]]:
    """Linear CKA and mean CCA of two encoders, per stage, on the same test slices, each stage averaged over its tokens."""
    stages = [_stages(voter, caches, config) for voter in (a, b)]
    return {
        "cka": [linear_cka(x, y) for x, y in zip(*stages, strict=True)],
        "cca": [mean_cca(x, y) for x, y in zip(*stages, strict=True)],
    }


@torch.no_grad()
def _stages(voter: Voter, caches: Mapping[str, SliceCache], config: RunConfig) -> list[NDArray[np.float64]]:
    """Each stage's features (N, D): mean over tokens."""
    model = load(voter, config)
    parts: list[list[NDArray]] = []
    most = max(1, _MOST_FEATURES // len(caches))
    for cache in caches.values():
        rows = np.nonzero(cache.split == "test")[0][:most]
        batch = read_batch(cache, rows, config.model.windows(), model.shape.image_size)
        parts.append([stage.mean((1, 2)).double().numpy() for stage in model.encode(batch.image)])
    return [np.concatenate(stage) for stage in zip(*parts, strict=True)]


def task_cosines(model: MultiTaskSwin, batch: Batch) -> dict[str, float]:
    """Cosines between the tasks' gradients at the encoder, and their lengths, on one batch.

    Source: Yu et al. 2020 (arXiv:2001.06782), definition 1.
    """
    parameters = [p for name, p in model.named_parameters() if name.startswith("encoder.")]
    means = slice_losses(model.eval()(batch.image), batch).means()
    gradients = []
    for task in range(len(TASKS)):
        parts = torch.autograd.grad(means[task], parameters, retain_graph=True, allow_unused=True)
        # The last stage's norm serves the classification alone.
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)])
    result = {f"norm_{name}": float(_norm(g)) for name, g in zip(TASKS, gradients, strict=True)}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        result[f"{TASKS[i]}-{TASKS[j]}"] = gradient_cosine(gradients[i], gradients[j])
    return result


def _norm(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts]).norm()
