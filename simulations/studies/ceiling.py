"""Upper reference for an AUC: the task solved with more knowledge than a network has.

In: slices and hematoma masks as in a slice cache (shared/slices.py). Out: two references, both of which are given where
the hematoma is. The oracle reads slices rendered without noise by the marker's definition, a hypodense region inside
the hematoma without connection to its surface (Boulouis et al. 2016, JAMA Neurology). Radiomics read ordinary slices:
statistics inside the true mask and a simple classifier. The last three of FEATURES are the marker's definition once
more; the others are what contrast, texture and shape alone give. Neither is an upper bound in the mathematical sense.

Shape suffixes: N slice, Y row, X column, F feature.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PowerTransformer

from shared.errors import HemafedError
from shared.slices import PIXEL_MM

PIXEL_MM2 = PIXEL_MM**2

# A clot's texture has a standard deviation of about 3.5 HU: this far below its brighter part lies one of them below its
# mean. Pockets of texture that are darker weigh little, for the score counts depth beyond it; a hypodensity
# (drop_hu in simulations/phantom/patient.py) is about three times as deep or deeper.
DROP_HU = 6.0
# The clot's level is this percentile of the mask's inside: above a hypodensity and the border's partial volume.
CLOT_PERCENTILE = 75
# Steps in which darkness is lowered until a region comes loose from the border; slices are stored in whole HU.
LEVEL_HU = 1.0
# Noise is smoothed over this standard deviation before regions are sought: a hypodensity is 6 mm wide or more.
SMOOTH_MM = 1.5
# Width of the ring outside of the hematoma to which it is compared: brain and edema.
RING_MM = 5.0
# Width of the border that carries the surrounding's partial volume.
BORDER_MM = 2.0

FEATURES = (
    "mean_hu",
    "deviation_hu",
    "skewness",
    "kurtosis",
    "percentile_5_hu",
    "percentile_25_hu",
    "percentile_50_hu",
    "percentile_75_hu",
    "percentile_95_hu",
    "core_deviation_hu",
    "core_drop_hu",
    "core_dark_share",
    "area_mm2",
    "compactness",
    "contrast_hu",
    "enclosed_area_mm2",
    "enclosed_depth_hu",
    "enclosed_score_mm2_hu",
)


class CeilingError(HemafedError, ValueError):
    """Slices, masks, features or labels that do not belong together; names what was found and expected."""


def oracle_scores(noiseless_hu_NYX: NDArray[np.int16], masks_NYX: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Score of a reader who sees the slice without noise and knows the hematoma: size of its enclosed hypodensity.

    Args:
      noiseless_hu_NYX: (N, Y, X) HU at 1 mm per pixel, rendered without noise.
      masks_NYX: same shape, not 0 in the hematoma.
    Returns:
      float64 (N,), mm2 x HU, >= 0: enclosed area times its depth beyond DROP_HU below the clot; 0 without a mask.
    Raises:
      CeilingError: the shapes differ or are not (N, Y, X).
    """
    _check_slices(noiseless_hu_NYX, masks_NYX)
    scores = np.zeros(len(masks_NYX))
    for index, (hu_YX, mask_YX) in enumerate(zip(noiseless_hu_NYX, masks_NYX, strict=True)):
        if mask_YX.any():
            hu_YX, mask_YX = _around_mask(hu_YX, mask_YX)
            scores[index] = _enclosed_depth(hu_YX, mask_YX).sum() * PIXEL_MM2
    return scores


def radiomics(hu_NYX: NDArray[np.int16], masks_NYX: NDArray[np.uint8]) -> NDArray[np.float64]:
    """First-order, shape and enclosed-region statistics of the hematoma, one column for each of FEATURES.

    Args:
      hu_NYX: (N, Y, X) HU at 1 mm per pixel.
      masks_NYX: same shape, not 0 in the hematoma.
    Returns:
      float64 (N, F), finite; a row of zeros where there is no mask.
    Raises:
      CeilingError: the shapes differ or are not (N, Y, X).
    """
    _check_slices(hu_NYX, masks_NYX)
    features_NF = np.zeros((len(masks_NYX), len(FEATURES)))
    for index, (hu_YX, mask_YX) in enumerate(zip(hu_NYX, masks_NYX, strict=True)):
        if mask_YX.any():
            features_NF[index] = _slice_features(*_around_mask(hu_YX, mask_YX))
    return features_NF


def fit_radiomics(features_NF: NDArray[np.float64], labels_N: NDArray[np.float64], seed: int) -> Pipeline:
    """Fit the radiomics classifier: features made normal, then logistic regression.

    Args:
      features_NF: from `radiomics`.
      labels_N: 1 with hypodensity, 0 without; unknown ones are to be left out.
      seed: of the solver.
    Raises:
      CeilingError: other than one label of 0 or 1 per row, both occurring, or features that are not finite.
    """
    _check_features(features_NF)
    labels_N = np.asarray(labels_N, dtype=np.float64)
    if labels_N.shape != (len(features_NF),) or set(np.unique(labels_N)) != {0.0, 1.0}:
        raise CeilingError(
            f"labels of shape {labels_N.shape} with values {np.unique(labels_N)[:5].tolist()}, expected shape "
            f"{(len(features_NF),)} and both 0 and 1; leave out slices without a known label"
        )
    return make_pipeline(PowerTransformer(), LogisticRegression(C=0.3, max_iter=2000, random_state=seed)).fit(
        features_NF, labels_N
    )


def radiomics_scores(estimator: Pipeline, features_NF: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logit of the marker for each row of features, float64 (N,).

    Raises:
      CeilingError: other than F columns, or features that are not finite.
    """
    _check_features(features_NF)
    return estimator.decision_function(features_NF)


def _check_slices(hu_NYX: NDArray, masks_NYX: NDArray) -> None:
    if hu_NYX.ndim != 3 or hu_NYX.shape != masks_NYX.shape:
        raise CeilingError(
            f"slices {hu_NYX.shape} and masks {masks_NYX.shape}, expected the same shape (N, Y, X) for both; "
            "take both from one slice cache"
        )


def _check_features(features_NF: NDArray[np.float64]) -> None:
    if features_NF.ndim != 2 or features_NF.shape[1] != len(FEATURES) or not np.isfinite(features_NF).all():
        raise CeilingError(
            f"features of shape {features_NF.shape}, {np.count_nonzero(~np.isfinite(features_NF))} not finite, "
            f"expected finite (N, {len(FEATURES)}); make them with simulations.studies.ceiling.radiomics"
        )


def _around_mask(hu_YX: NDArray, mask_YX: NDArray) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The part of a slice that holds the hematoma and its ring, as float and bool."""
    margin = int(np.ceil(RING_MM / PIXEL_MM)) + 1
    window = tuple(slice(max(places.min() - margin, 0), places.max() + margin + 1) for places in np.nonzero(mask_YX))
    return np.asarray(hu_YX[window], dtype=np.float64), np.asarray(mask_YX[window]) != 0


def _enclosed_depth(hu_YX: NDArray[np.float64], mask_YX: NDArray[np.bool_]) -> NDArray[np.float64]:
    """HU by which each pixel lies, enclosed, below DROP_HU under the clot; 0 outside and in open regions.

    At each level, regions darker than it are connected by their sides and those that reach the mask's outermost
    pixels are left out. A hypodensity close to the dark border is one with it at the first level and comes loose at a
    lower one; a notch stays open at all of them. For a uniform region the result is its drop less DROP_HU.
    """
    edge_YX = mask_YX & ~ndimage.binary_erosion(mask_YX)
    depth_YX = np.zeros(hu_YX.shape)
    first = np.percentile(hu_YX[mask_YX], CLOT_PERCENTILE) - DROP_HU
    for level in np.arange(first, hu_YX[mask_YX].min(), -LEVEL_HU):
        regions_YX, count = ndimage.label(mask_YX & (hu_YX < level))
        enclosed = np.ones(count + 1, dtype=bool)
        enclosed[0] = False
        enclosed[regions_YX[edge_YX]] = False
        depth_YX += LEVEL_HU * enclosed[regions_YX]
    return depth_YX


def _smooth_inside(hu_YX: NDArray[np.float64], mask_YX: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Gaussian mean over the mask's pixels only, so that the brain does not darken the border; 0 outside."""
    sigma_px = SMOOTH_MM / PIXEL_MM
    weight_YX = ndimage.gaussian_filter(mask_YX.astype(np.float64), sigma_px, mode="constant")
    total_YX = ndimage.gaussian_filter(np.where(mask_YX, hu_YX, 0.0), sigma_px, mode="constant")
    return np.divide(total_YX, weight_YX, out=np.zeros_like(total_YX), where=mask_YX)


def _slice_features(hu_YX: NDArray[np.float64], mask_YX: NDArray[np.bool_]) -> list[float]:
    """The values of FEATURES for one slice with a mask."""
    inside = hu_YX[mask_YX]
    mean, deviation = inside.mean(), inside.std()
    standard = (inside - mean) / deviation if deviation > 0 else np.zeros_like(inside)
    percentiles = np.percentile(inside, [5, 25, 50, 75, 95])

    smooth_YX = _smooth_inside(hu_YX, mask_YX)
    core_YX = ndimage.binary_erosion(mask_YX, iterations=round(BORDER_MM / PIXEL_MM))
    core = smooth_YX[core_YX if core_YX.any() else mask_YX]
    clot_hu = np.percentile(smooth_YX[mask_YX], CLOT_PERCENTILE)
    enclosed_YX = _enclosed_depth(smooth_YX, mask_YX)

    edge = np.count_nonzero(mask_YX & ~ndimage.binary_erosion(mask_YX))
    ring_YX = ndimage.binary_dilation(mask_YX, iterations=round(RING_MM / PIXEL_MM)) & ~mask_YX
    ring_hu = np.median(hu_YX[ring_YX]) if ring_YX.any() else mean  # median: the ring may reach into the skull
    return [
        mean,
        deviation,
        np.mean(standard**3),
        np.mean(standard**4) - 3 if deviation > 0 else 0.0,
        *percentiles,
        core.std(),
        clot_hu - core.min(),
        np.mean(core < clot_hu - DROP_HU),
        len(inside) * PIXEL_MM2,
        edge**2 / len(inside),
        mean - ring_hu,
        np.count_nonzero(enclosed_YX) * PIXEL_MM2,
        enclosed_YX.max(),
        enclosed_YX.sum() * PIXEL_MM2,
    ]
