"""How easily a small classifier tells drawn slices from real ones, patch by patch.

In: a folder with real head CT. Patches of both kinds that hold mostly soft tissue are described by quantiles of their values
and gradients and by the power in bands of their spectrum; a random forest is trained on some slices and tested on others.
Out: the area under its ROC curve; .5 would mean that it cannot tell, 1 that it always can.

Shape suffixes: N patch, Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from client.check.check import pseudonyms_of
from client.dicom.headers import CtSlice
from client.dicom.pixels import AIR_HU, clamp_hu, read_hu
from client.ingest.resample import head_centre, resample
from client.ingest.scan import read_records, walk
from client.ingest.workers import WorkerPool
from shared.errors import HemafedError
from shared.site import Site
from simulations.heads.scanner import Scanner
from simulations.phantom.draw_caches import ct_slice
from simulations.phantom.patient import Cohort, sample_case
from simulations.phantom.render import render_slice

PATCH_PX, STEP_PX = 24, 12  # side of a patch of 1 mm pixels, and distance of two
_SOFT_HU = (-20.0, 100.0)
_SOFT_SHARE = 0.6  # of a patch that must be soft tissue
_QUANTILES = np.linspace(0.02, 0.98, 9)
_BANDS = 6
LOWEST_MM, HIGHEST_MM = -52.0, 62.0  # of drawn slices, from the centre of the head


class RealismError(HemafedError, ValueError):
    """Too few real slices to compare with."""


@dataclass(frozen=True)
class Realism:
    """Result.

    Attributes:
      auc: of the classifier on slices that it did not train on.
      real_slices, real_patches, drawn_slices, drawn_patches: how many were compared.
    """

    auc: float
    real_slices: int
    real_patches: int
    drawn_slices: int
    drawn_patches: int


def compare(folder: Path, drawn: int, seed: int) -> Realism:
    """Compare real slices with drawn ones of a scanner that varies as real ones do.

    Args:
      folder: with DICOM of real heads; other bodies are left out by hand.
      drawn: slices to draw.
      seed: draws them.
    Raises:
      RealismError: fewer than two parts of real slices hold soft tissue.
    """
    real = [_patches(hu_YX) for hu_YX in read_slices(folder)]
    fake = [_patches(hu_YX) for hu_YX in draw_slices(drawn, seed)]
    return classify([one for one in real if len(one)], [one for one in fake if len(one)])


def classify(real: list[NDArray[np.float32]], fake: list[NDArray[np.float32]]) -> Realism:
    """Train and test the classifier on patches (N, Y, X) of each slice; slices stay whole in one part of four."""
    # A real slice is divided in the middle, since there are few of them; its halves are groups of their own.
    halves = [half for one in real for half in np.array_split(one, 2) if len(half)]
    if len(halves) < 2:
        raise RealismError(
            f"{len(halves)} parts of real slices hold soft tissue, expected at least 2: give more real heads"
        )
    groups = [*halves, *fake]
    features = np.concatenate([_features(one) for one in groups])
    owner = np.repeat(np.arange(len(groups)), [len(one) for one in groups])
    label = (owner < len(halves)).astype(int)
    forest = RandomForestClassifier(300, min_samples_leaf=3, class_weight="balanced", random_state=0)
    folds = StratifiedGroupKFold(min(4, len(halves)), shuffle=True, random_state=0)
    score = cross_val_predict(forest, features, label, groups=owner, cv=folds, method="predict_proba")[:, 1]
    count = int(label.sum())
    return Realism(float(roc_auc_score(label, score)), len(real), count, len(fake), len(label) - count)


def read_slices(folder: Path) -> list[NDArray[np.float32]]:
    """Every CT image of a folder on the cache's grid, float32 (224, 224)."""
    folder = folder.resolve()
    nowhere = folder / ".hemafed"
    site = Site("real", "held-out", folder, None, None, nowhere, nowhere, accept_lossy=True)
    pseudonyms, _ = pseudonyms_of(site)
    with WorkerPool(1) as crew:
        pairs = read_records(site, pseudonyms, walk(site, pseudonyms), {}, crew, nameless=True)
    return [_on_grid(image, read_hu(image)) for _, record in pairs for image in record.images]


def draw_slices(count: int, seed: int) -> list[NDArray[np.float32]]:
    """Slices at any height of heads in scanners of every kernel, dose and thickness, float32 (224, 224)."""
    slices = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        scanner = Scanner(
            dose=float(rng.uniform(0.6, 1.4)),
            sharpness=float(rng.uniform(-1, 1)),
            thickness_mm=float(rng.choice([2.5, 5.0, 5.0, 10.0])),
        )
        z_mm = float(rng.uniform(LOWEST_MM, HIGHEST_MM))
        drawn = render_slice(sample_case(rng, Cohort()).patient, scanner, z_mm, rng)
        slices.append(_on_grid(ct_slice(scanner, z_mm), drawn.hu_YX.astype(np.float32)))
    return slices


def _on_grid(image: CtSlice, hu_YX: NDArray[np.float32]) -> NDArray[np.float32]:
    stored = clamp_hu(hu_YX)
    return resample(stored, image, head_centre([(image, stored)]), fill=AIR_HU)


def _patches(hu_YX: NDArray[np.float32]) -> NDArray[np.float32]:
    """Patches of mostly soft tissue, (N, 24, 24), from left to right."""
    windows = np.lib.stride_tricks.sliding_window_view(hu_YX, (PATCH_PX, PATCH_PX))[::STEP_PX, ::STEP_PX]
    patches = windows.swapaxes(0, 1).reshape(-1, PATCH_PX, PATCH_PX)
    soft = ((patches > _SOFT_HU[0]) & (patches < _SOFT_HU[1])).mean(axis=(1, 2))
    return patches[soft > _SOFT_SHARE]


def _features(patches: NDArray[np.float32]) -> NDArray[np.float64]:
    """Numbers that describe each patch, (N, F)."""
    flat = patches.reshape(len(patches), -1)
    gradient = np.hypot(*np.gradient(patches, axis=(1, 2))).reshape(len(patches), -1)
    power = np.abs(fft.fft2(patches - patches.mean(axis=(1, 2), keepdims=True))) ** 2
    f = np.hypot(*np.meshgrid(fft.fftfreq(PATCH_PX), fft.fftfreq(PATCH_PX), indexing="ij"))
    bands = [
        np.log1p(power[:, (f > low) & (f <= low + 0.5 / _BANDS)].mean(axis=1))
        for low in np.arange(_BANDS) * 0.5 / _BANDS
    ]
    return np.column_stack(
        [np.quantile(flat, _QUANTILES, axis=1).T, np.quantile(gradient, _QUANTILES, axis=1).T, *bands]
    )
