"""Similarity of two encoders: of their features on the same slices, and of the directions of their updates.

In: representations of the same N inputs by two encoders, or gradients of two sites at the same parameters. Out: one
number. Simulated hospitals only; representations of patients never leave a hospital.

Shape suffixes: N input, D feature of an encoder, K principal component.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import HemafedError

# Singular values below this share of the largest are rounding, not variance: a direction without variance has no
# correlation with anything. float32 representations carry about 7 digits.
RANK_TOLERANCE = 1e-6


class SimilarityError(HemafedError, ValueError):
    """Two representations or gradients that cannot be compared; names what was found and expected."""


def linear_cka(a_ND: NDArray[np.floating], b_ND: NDArray[np.floating]) -> float:
    """Linear centred kernel alignment of two representations of the same inputs.

    Invariant to rotation, reflection and scaling of either, not to any linear map. With few inputs for the number of
    features, unrelated representations score high as well; give many more inputs than features.

    Args:
      a_ND, b_ND: float (N, D), row n of both for the same input; D may differ.
    Returns:
      0 (no linear relation) to 1 (equal up to rotation and scale).
    Raises:
      SimilarityError: different N, fewer than 2 rows, values not finite, or features that are all constant.
    Source: Kornblith et al. 2019, section 3 (arXiv:1905.00414): |B'A|^2 / (|A'A| |B'B|), Frobenius norms, centred.
    """
    a_ND, b_ND = _centred_pair(a_ND, b_ND)
    if max(a_ND.shape[1], b_ND.shape[1]) > len(a_ND):
        # The same number from N x N Gram matrices, smaller than D x D here: |B'A|^2 = trace(AA'BB').
        a_NN, b_NN = a_ND @ a_ND.T, b_ND @ b_ND.T
        return float(np.sum(a_NN * b_NN) / (np.linalg.norm(a_NN) * np.linalg.norm(b_NN)))
    cross = np.linalg.norm(b_ND.T @ a_ND) ** 2
    return float(cross / (np.linalg.norm(a_ND.T @ a_ND) * np.linalg.norm(b_ND.T @ b_ND)))


def mean_cca(a_ND: NDArray[np.floating], b_ND: NDArray[np.floating], variance: float = 0.99) -> float:
    """Mean canonical correlation of the principal components of two representations (SVCCA).

    Components that carry `variance` of each are kept; the mean is over the smaller number of them. With
    `variance` 1 it is invariant to any invertible linear map of either. Needs more inputs than components: with as
    few, any two representations correlate perfectly.

    Args:
      a_ND, b_ND: float (N, D), row n of both for the same input; D may differ.
      variance: share to keep, in (0, 1].
    Returns:
      0 to 1.
    Raises:
      SimilarityError: as for `linear_cka`, or `variance` out of range.
    Source: Raghu et al. 2017, section 2 (arXiv:1706.05806); correlations as singular values of the product of
      orthonormal bases: Bjorck and Golub 1973, Mathematics of Computation 27.
    """
    if not 0 < variance <= 1:
        raise SimilarityError(f"variance {variance}, expected above 0 and at most 1; 0.99 is usual")
    a_ND, b_ND = _centred_pair(a_ND, b_ND)
    a_NK, b_NK = _component_basis(a_ND, variance), _component_basis(b_ND, variance)
    # The bases are orthonormal, so that the singular values are cosines; rounding may leave them above 1.
    return float(np.clip(np.linalg.svd(a_NK.T @ b_NK, compute_uv=False), 0, 1).mean())


def gradient_cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Cosine of the angle between two gradients, each given as its tensors in the same order.

    Args:
      a, b: one tensor per parameter; equal shapes.
    Returns:
      -1 (opposite) to 1 (same direction).
    Raises:
      SimilarityError: none given, different shapes, values not finite, or a gradient of length zero.
    """
    a_shapes, b_shapes = [tuple(part.shape) for part in a], [tuple(part.shape) for part in b]
    if not a_shapes or a_shapes != b_shapes:
        wrong = next((pair for pair in zip(a_shapes, b_shapes, strict=False) if pair[0] != pair[1]), None)
        raise SimilarityError(
            f"gradients of {len(a_shapes)} and {len(b_shapes)} tensors{f', first difference {wrong}' if wrong else ''}, "
            "expected equal shapes and at least one; take both from the same parameters in the same order"
        )
    # float64: squares of millions of small float32 gradients lose digits.
    a_flat, b_flat = (torch.cat([part.detach().double().flatten().cpu() for part in parts]) for parts in (a, b))
    lengths = a_flat.norm().item(), b_flat.norm().item()
    if not (np.isfinite(lengths).all() and min(lengths) > 0):
        raise SimilarityError(
            f"gradients of length {lengths[0]:g} and {lengths[1]:g}, expected finite and above 0; "
            "check that the loss reaches these parameters"
        )
    cosine = torch.dot(a_flat / lengths[0], b_flat / lengths[1]).item()
    return min(max(cosine, -1.0), 1.0)  # rounding may leave it outside


def _centred_pair(a_ND: NDArray, b_ND: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both with mean 0 over inputs and Frobenius norm 1, checked."""
    pair = np.asarray(a_ND, dtype=np.float64), np.asarray(b_ND, dtype=np.float64)
    shapes = f"representations of shapes {pair[0].shape} and {pair[1].shape}"
    if any(part.ndim != 2 for part in pair):
        raise SimilarityError(f"{shapes}, expected (N, D) for both; average or flatten tokens first")
    if len(pair[0]) != len(pair[1]):
        raise SimilarityError(f"{shapes}, expected equal N; encode the same slices in the same order")
    if len(pair[0]) < 2:
        raise SimilarityError(f"{shapes}, expected at least 2 rows; encode more slices")
    centred = []
    for name, part in zip("ab", pair, strict=True):
        if not np.isfinite(part).all():
            bad = np.count_nonzero(~np.isfinite(part))
            raise SimilarityError(f"representation {name}: {bad} values are not finite; the encoder has diverged")
        spread = part - part.mean(axis=0)
        length = np.linalg.norm(spread)
        if length <= RANK_TOLERANCE * np.linalg.norm(part):
            raise SimilarityError(
                f"representation {name}: all {part.shape[1]} features are constant over {len(part)} inputs, expected "
                "some that vary; the encoder has collapsed, or the inputs are one"
            )
        centred.append(spread / length)
    return centred[0], centred[1]


def _component_basis(centred_ND: NDArray[np.float64], variance: float) -> NDArray[np.float64]:
    """Orthonormal basis (N, K) of the first principal components that carry `variance` of a centred matrix."""
    basis_NK, singular, _ = np.linalg.svd(centred_ND, full_matrices=False)
    real = int(np.count_nonzero(singular > RANK_TOLERANCE * singular[0]))
    carried = np.cumsum(singular**2) / np.sum(singular**2)
    enough = int(np.searchsorted(carried, variance)) + 1
    return basis_NK[:, : min(real, enough)]
