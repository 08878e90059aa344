"""What coarse counts hide and what they keep."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.metrics import MetricsError, Scores, auc, count_scores, merge_counts, summarise
from shared.tally import STEP_EDGES, STEPS, joined, pooled, spread, tally_scores
from simulations.benchmarks.tally import differences, drawn_case, stored_cases


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def made(patients: int, slices: int = 6, seed: int = 0, masks: bool = True) -> Scores:
    draw = rng(seed)
    owner = np.repeat(np.arange(patients), slices)
    label = (draw.random(len(owner)) < 0.4).astype(float)
    dice = draw.random(len(owner)) if masks else np.full(len(owner), np.nan)
    return Scores(draw.normal(size=len(owner)) * 2 + 2 * label, label, dice, owner.astype(str))


def patients_of_cells(scores: Scores, edges: np.ndarray) -> list[int]:
    step = np.clip(np.searchsorted(STEP_EDGES, scores.logit, side="right") - 1, 0, STEPS - 1)
    known = ~np.isnan(scores.label)
    return [len(np.unique(scores.patient[known & (step >= a) & (step < b)])) for a, b in pairwise(edges)]


@pytest.mark.parametrize("patients", [10, 18, 60])
@pytest.mark.parametrize("least", [1, 5, 10])
def test_no_cell_holds_fewer_patients_than_the_policy_says(patients: int, least: int) -> None:
    """Before, 1000 cells of .02 held single slices."""
    scores = made(patients)
    tally = tally_scores(scores, least, 3, rng())
    assert min(patients_of_cells(scores, tally.edges)) >= least or least == 1
    assert tally.counts[0].sum() == len(scores.label)
    assert tally.counts.shape == (4, 2, len(tally.edges) - 1)


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-1e6, 1e6)), min_size=1, max_size=80), st.integers(1, 12))
def test_cells_of_any_scores_keep_the_rule(slices: list[tuple[int, float]], least: int) -> None:
    patient, logit = (np.array(column) for column in zip(*slices, strict=True))
    scores = Scores(logit.astype(float), (patient % 2).astype(float), np.full(len(logit), np.nan), patient.astype(str))
    tally = tally_scores(scores, least, 0, rng())
    if len(np.unique(patient)) < least:
        assert not tally.counts.any()
        assert tally.auc == 0.5
    elif least > 1:
        assert min(patients_of_cells(scores, tally.edges)) >= least


def test_of_too_few_patients_nothing_is_counted() -> None:
    few = made(4)
    tally = tally_scores(few, 5, 10, rng())
    assert not tally.counts.any()
    assert not tally.dice_sum.any()
    assert not tally.dice_slices.any()
    masked = made(9)
    masked.dice[6 * 4 :] = np.nan  # four patients with masks, nine with labels
    tally = tally_scores(masked, 5, 10, rng())
    assert tally.counts.any()
    assert not tally.dice_slices.any()


def test_joined_by_hand() -> None:
    present = np.zeros((3, STEPS), bool)
    present[0, 3] = present[1, 5] = present[2, 5] = present[0, 9] = True
    assert joined(present, 2).tolist() == [0, STEPS]
    present[1, 12] = True
    assert joined(present, 2).tolist() == [0, 6, STEPS]
    assert joined(present, 4).tolist() == [0, STEPS]


def test_sums_of_dice_are_rounded() -> None:
    """Exact sums of a bootstrap sample tell which patients it holds: each patient's share is a number of its own."""
    tally = tally_scores(made(12), 1, 50, rng())
    np.testing.assert_allclose(tally.dice_sum * 10, np.rint(tally.dice_sum * 10), atol=1e-9)
    assert round(tally.auc, 3) == tally.auc


def test_spreading_keeps_the_sums_and_the_hospitals_own_area() -> None:
    scores = made(14)
    tally = tally_scores(scores, 10, 20, rng())
    counts = spread(tally)
    np.testing.assert_allclose(counts.counts.sum(-1), tally.counts.sum(-1))
    np.testing.assert_allclose(np.add.reduceat(counts.counts, tally.edges[:-1], axis=-1), tally.counts)
    assert auc(counts.counts)[0] == pytest.approx(tally.auc, abs=1e-6)
    exact = auc(count_scores(scores, 0, rng()).counts)[0]
    assert tally.auc == pytest.approx(exact, abs=0.002)


def test_one_class_alone_is_spread_without_an_area() -> None:
    scores = made(12)
    scores.label[:] = 0
    counts = spread(tally_scores(scores, 5, 4, rng()))
    assert np.isfinite(counts.counts).all()
    assert summarise(counts, 3)["auc"].value is None


def test_several_hospitals_add_up() -> None:
    one, two = tally_scores(made(14, seed=1), 5, 6, rng(1)), tally_scores(made(20, seed=2), 5, 6, rng(2))
    both = pooled([one, two])
    np.testing.assert_allclose(both.counts, merge_counts([spread(one), spread(two)]).counts)
    assert both.patients == 34
    assert summarise(both, 16)["auc"].n_slices == 34 * 6


def test_scores_that_are_not_finite_are_refused_without_a_number() -> None:
    """Before: "3 of 84 scores are not finite", a count of slices above a threshold of the centre's choice."""
    for count in (1, 5):
        scores = made(14)
        scores.logit[:count] = np.nan
        with pytest.raises(MetricsError) as caught:
            tally_scores(scores, 5, 0, rng())
        assert str(caught.value) == "scores are not finite; the model has diverged: train it again"


def test_fresh_draws_share_nothing() -> None:
    first, second = (tally_scores(made(14), 5, 10, np.random.default_rng()) for _ in range(2))
    assert np.array_equal(first.counts[0], second.counts[0])
    assert not np.array_equal(first.counts[1:], second.counts[1:])


@pytest.mark.parametrize("separation", [2.7, 1.2])
def test_areas_of_large_hospitals_are_within_two_thousandths(separation: float) -> None:
    found = differences([drawn_case(separation, 400, 7, seed) for seed in range(4)], least=10)
    assert np.abs(found["auc"]).max() < 0.002


@pytest.mark.parametrize(("least", "mean", "most"), [(5, 0.002, 0.012), (10, 0.005, 0.03)])
def test_areas_of_small_hospitals_stay_close(least: int, mean: float, most: float) -> None:
    """18 patients a hospital; the interval of the same area is .04 wide. Cells alone, without the hospitals' own areas, lose .06."""
    found = differences(stored_cases(every=8), least)
    assert abs(found["auc"].mean()) < mean
    assert np.abs(found["auc"]).max() < most


def marked(patients: int, bled: int, largest: float = 0.0) -> Scores:
    """Patients of two slices, the first `bled` of them with blood in one; nothing marked but in the last, `largest`."""
    count = 2 * patients
    blood = np.zeros(count, bool)
    blood[: 2 * bled : 2] = True
    area = np.zeros(count)
    area[-1] = largest
    dice = np.where(blood, 0.5, np.nan)
    owner = np.repeat(np.arange(patients), 2).astype(str)
    return Scores(np.zeros(count), np.full(count, np.nan), dice, owner, area, blood)


def test_a_cell_of_marked_areas_holds_enough_patients() -> None:
    tally = tally_scores(marked(20, 8, largest=500.0), 5, 10, np.random.default_rng(0))
    assert not tally.found.any()  # the one who stands out is joined with the others, and one cell says nothing
    assert tally.clear[0].tolist() == [32, 1, 5]
    scores = marked(20, 8)
    scores.marked_mm2[:12] = 200.0  # of six patients, in one or both of their slices
    scores.marked_mm2[38] = 5000.0
    tally = tally_scores(scores, 5, 10, np.random.default_rng(0))
    assert tally.found[0].sum(0).tolist() == [13, 7, 0, 0, 0]
    many = tally_scores(marked(20, 8, largest=500.0), 1, 10, np.random.default_rng(0))
    assert many.found[0].sum(0).tolist() == [19, 1, 0, 0, 0]  # in the place of the first cell that was joined


@pytest.mark.parametrize("bled", [3, 17])
def test_of_too_few_patients_with_or_without_blood_no_areas_leave(bled: int) -> None:
    scores = marked(20, bled)
    if bled == 17:  # only three patients have a slice without
        keep = np.ones(40, bool)
        keep[1 : 2 * bled : 2] = False
        scores = Scores(
            *(getattr(scores, n)[keep] for n in ("logit", "label", "dice", "patient", "marked_mm2", "blood"))
        )
    tally = tally_scores(scores, 5, 10, np.random.default_rng(0))
    assert not tally.found.any()
    assert tally.clear.any() == (bled == 3)
    assert tally.dice_slices.any() == (bled == 17)
