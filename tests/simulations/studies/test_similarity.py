from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from simulations.studies.similarity import SimilarityError, gradient_cosine, linear_cka, mean_cca

RNG = np.random.default_rng(3)
A = RNG.normal(size=(200, 6)) @ np.diag([4.0, 3.0, 2.0, 1.5, 1.0, 0.8])
ROTATION = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
LINEAR = RNG.normal(size=(6, 6)) + 3 * np.eye(6)

# Two centred columns, orthogonal to each other; a third orthogonal to both.
FIRST = np.array([1.0, 1.0, -1.0, -1.0])
SECOND = np.array([1.0, -1.0, 1.0, -1.0])
THIRD = np.array([1.0, -1.0, -1.0, 1.0])


@pytest.mark.parametrize("measure", [linear_cka, mean_cca])
def test_a_representation_equals_itself_however_rotated_scaled_or_shifted(measure) -> None:
    assert measure(A, A) == pytest.approx(1.0)
    assert measure(A, 7.5 * A @ ROTATION + 100) == pytest.approx(1.0)
    assert measure(A.astype(np.float32), A) == pytest.approx(1.0, abs=1e-5)


def test_cca_ignores_any_invertible_map_where_cka_does_not() -> None:
    assert mean_cca(A, A @ LINEAR, variance=1.0) == pytest.approx(1.0)
    assert linear_cka(A, A @ LINEAR) < 0.99


@pytest.mark.parametrize("measure", [linear_cka, mean_cca])
def test_measures_are_symmetric(measure) -> None:
    other = A[:, :4] + RNG.normal(size=(200, 4))
    assert measure(A, other) == pytest.approx(measure(other, A))
    assert 0.2 < measure(A, other) < 0.99


@pytest.mark.parametrize("measure", [linear_cka, mean_cca])
def test_independent_gaussians_are_unlike_when_inputs_are_many(measure) -> None:
    rng = np.random.default_rng(0)
    assert measure(rng.normal(size=(5000, 8)), rng.normal(size=(5000, 5))) < 0.05


def test_cka_of_two_columns_by_hand() -> None:
    a = np.column_stack([FIRST, 2 * SECOND])  # a'a = diag(4, 16), norm sqrt(272)
    b = np.column_stack([FIRST, THIRD])  # b'b = diag(4, 4), norm sqrt(32); b'a has one entry 4, squared 16
    assert linear_cka(a, b) == pytest.approx(16 / math.sqrt(272 * 32))


def test_cca_of_two_columns_by_hand() -> None:
    a = np.column_stack([FIRST, 2 * SECOND])
    b = np.column_stack([FIRST, THIRD])
    assert mean_cca(a, b) == pytest.approx(0.5)  # one direction shared, the other orthogonal
    slanted = np.column_stack([FIRST + SECOND + THIRD])  # cosines 1/sqrt(3) to each, sqrt(2/3) to their plane
    assert mean_cca(a, slanted) == pytest.approx(math.sqrt(2 / 3))


def test_cca_keeps_as_many_components_as_the_variance_asks_for() -> None:
    a = np.column_stack([FIRST, 2 * SECOND])  # shares 0.2 and 0.8
    assert mean_cca(a, SECOND[:, None], variance=0.8 - 1e-9) == pytest.approx(1.0)
    assert mean_cca(a, FIRST[:, None], variance=0.8 - 1e-9) == pytest.approx(0.0, abs=1e-9)
    assert mean_cca(a, FIRST[:, None], variance=0.99) == pytest.approx(1.0)


def test_cca_does_not_count_directions_without_variance() -> None:
    doubled = np.column_stack([A, A[:, 0], np.full(200, 3.0)])
    assert mean_cca(doubled, A, variance=1.0) == pytest.approx(1.0)


def test_cka_is_the_same_with_more_features_than_inputs() -> None:
    wide = RNG.normal(size=(5, 40))
    centred, few = wide - wide.mean(axis=0), A[:5] - A[:5].mean(axis=0)
    expected = np.linalg.norm(few.T @ centred) ** 2 / (
        np.linalg.norm(few.T @ few) * np.linalg.norm(centred.T @ centred)
    )
    assert linear_cka(A[:5], wide) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [linear_cka, mean_cca])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (A, A[:100], r"\(200, 6\) and \(100, 6\), expected equal N"),
        (A[:1], A[:1], "at least 2 rows"),
        (A, np.full((200, 3), 0.1), "representation b: all 3 features are constant"),
        (A[:, 0], A, r"expected \(N, D\)"),
        (np.where(np.arange(200)[:, None] == 4, np.nan, A), A, "representation a: 6 values are not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(measure, a, b, message) -> None:
    with pytest.raises(SimilarityError, match=message):
        measure(a, b)


@pytest.mark.parametrize("variance", [0.0, 1.01, math.nan])
def test_a_share_of_variance_out_of_range_is_refused(variance) -> None:
    with pytest.raises(SimilarityError, match="above 0 and at most 1"):
        mean_cca(A, A, variance=variance)


def test_gradient_cosine_runs_over_all_tensors_by_hand() -> None:
    a = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]  # length 5
    b = [torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])]  # length 3, product 3 + 8
    assert gradient_cosine(a, b) == pytest.approx(11 / 15)
    assert gradient_cosine(a, [-2 * part for part in a]) == pytest.approx(-1.0)
    assert gradient_cosine(a, [torch.tensor([[0.0, 9.0]]), torch.tensor([0.0])]) == 0.0


def test_gradient_cosine_of_gradients_that_autograd_made() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    one = torch.autograd.grad((weight * torch.tensor([1.0, 0.0])).sum(), weight)
    other = torch.autograd.grad((weight * torch.tensor([1.0, 1.0])).sum(), weight)
    assert gradient_cosine(one, other) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "0 and 0 tensors"),
        ([torch.ones(2)], [torch.ones(2), torch.ones(1)], "1 and 2 tensors, expected equal shapes"),
        ([torch.ones(2)], [torch.ones(3)], r"first difference \(\(2,\), \(3,\)\)"),
        ([torch.ones(2)], [torch.zeros(2)], "length 1.41421 and 0"),
        ([torch.tensor([math.inf])], [torch.ones(1)], "length inf and 1"),
    ],
)
def test_gradients_that_cannot_be_compared_are_refused(a, b, message) -> None:
    with pytest.raises(SimilarityError, match=message):
        gradient_cosine(a, b)
