from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from shared.metrics import (
    AREAS,
    AREAS_MM2,
    BINS,
    Counts,
    Estimate,
    MetricsError,
    Scores,
    auc,
    best_threshold,
    count_scores,
    f1,
    merge_counts,
    roc_points,
    summarise,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def made_scores(seed: int, slices: int = 300, patients: int = 30, spread: float = 1.0) -> Scores:
    """Scores that say something about the label; some labels and some masks are missing."""
    draw = rng(seed)
    label = (draw.random(slices) < 0.4).astype(float)
    logit = spread * draw.normal(size=slices) + label
    dice = draw.random(slices)
    label[draw.random(slices) < 0.1] = np.nan
    dice[draw.random(slices) < 0.2] = np.nan
    return Scores(logit, label, dice, np.array([f"p{i}" for i in draw.integers(0, patients, slices)]))


def expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One (2, BINS) count as labels and bins, one per slice."""
    label, bins = np.nonzero(counts)
    times = counts[label, bins]
    return label.repeat(times), bins.repeat(times)


def repeated(scores: Scores, times: int) -> Scores:
    return Scores(*(np.repeat(v, times) for v in (scores.logit, scores.label, scores.dice, scores.patient)))


def test_where_scores_are_counted() -> None:
    logit = np.array([0.0, 0.019, 0.021, -50.0, 50.0, -0.001, 3.0])
    label = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, np.nan])
    nothing = np.full(7, np.nan)
    tally = count_scores(Scores(logit, label, nothing, np.array(["a"] * 7)), 0, rng())
    # 1000 bins of 0.02 from -10: logit 0 opens bin 500, what lies outside falls into the end bins.
    expected = np.zeros((1, 2, BINS), int)
    expected[0, 1, [500, 999]] = [2, 1]
    expected[0, 0, [501, 0, 499]] = 1
    assert np.array_equal(tally.counts, expected)
    assert (tally.dice_sum.tolist(), tally.dice_slices.tolist(), tally.patients) == ([0.0], [0], 1)


def test_a_score_that_is_no_number_is_refused() -> None:
    scores = Scores(np.array([0.0, np.nan]), np.array([1.0, 0.0]), np.full(2, np.nan), np.array(["a", "b"]))
    with pytest.raises(MetricsError):
        count_scores(scores, 0, rng())


@pytest.mark.parametrize(("seed", "spread"), [(0, 1.0), (1, 0.2), (2, 0.05), (3, 8.0)])
def test_auc_and_f1_are_scikit_learns(seed: int, spread: float) -> None:
    tally = count_scores(made_scores(seed, spread=spread), 5, rng(seed))
    for row in range(6):
        label, bins = expand(tally.counts[row])
        assert len(np.unique(bins)) < len(bins)  # there are ties
        assert auc(tally.counts)[row] == pytest.approx(roc_auc_score(label, bins), abs=1e-12)
        for threshold in (0, 490, 520, 570, 999):
            expected = f1_score(label, bins >= threshold)
            assert f1(tally.counts, threshold)[row] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_bins_cost_less_than_a_thousandth_of_auc(seed: int) -> None:
    scores = made_scores(seed)
    known = ~np.isnan(scores.label)
    exact = roc_auc_score(scores.label[known], scores.logit[known])
    assert auc(count_scores(scores, 0, rng()).counts)[0] == pytest.approx(exact, abs=1e-3)


def test_auc_by_hand() -> None:
    counts = np.zeros((2, BINS), int)
    counts[0, [10, 20]] = [2, 1]
    counts[1, [20, 30]] = [1, 1]
    # Six pairs: the positive in bin 30 wins three, that in bin 20 wins two and ties one.
    assert auc(counts) == pytest.approx(5.5 / 6)


@pytest.mark.parametrize("label", [0, 1])
def test_auc_of_one_class_is_not_defined(label: int) -> None:
    counts = np.zeros((3, 2, BINS), int)
    counts[:, label, 100] = 4
    assert np.isnan(auc(counts)).all()


def test_f1_is_not_defined_without_positives() -> None:
    counts = np.zeros((2, 2, BINS), int)
    counts[:, 0, 300] = 3
    counts[1, 1, 100] = 1
    assert np.isnan(f1(counts, 200)[0])
    assert f1(counts, 200)[1] == 0


def test_two_hospitals_together() -> None:
    one, two = made_scores(0), made_scores(1)
    both = Scores(
        np.concatenate([one.logit, two.logit]),
        np.concatenate([one.label, two.label]),
        np.concatenate([one.dice, two.dice]),
        np.concatenate([np.char.add("a/", one.patient), np.char.add("b/", two.patient)]),
    )
    merged = merge_counts([count_scores(one, 20, rng(0)), count_scores(two, 20, rng(1))])
    expected = count_scores(both, 20, rng(2))
    assert np.array_equal(merged.counts[0], expected.counts[0])
    assert merged.dice_sum[0] == pytest.approx(expected.dice_sum[0])
    assert merged.dice_slices[0] == expected.dice_slices[0]
    assert merged.patients == expected.patients
    assert merged.counts.shape == (21, 2, BINS)


def test_tallies_that_cannot_be_merged() -> None:
    with pytest.raises(MetricsError, match="at least one"):
        merge_counts([])
    with pytest.raises(MetricsError, match=r"evaluation\.replicates"):
        merge_counts([count_scores(made_scores(0), 10, rng()), count_scores(made_scores(0), 20, rng())])


def test_a_hospital_without_slices_can_be_merged() -> None:
    nobody = Scores(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.str_))
    empty, other = count_scores(nobody, 10, rng()), count_scores(made_scores(0), 10, rng())
    merged = merge_counts([empty, other])
    assert empty.patients == 0
    assert np.array_equal(merged.counts, other.counts)
    assert np.array_equal(merged.dice_sum, other.dice_sum)


def test_one_patient_is_drawn_again_and_again() -> None:
    tally = count_scores(made_scores(0, patients=1), 50, rng())
    assert (tally.counts == tally.counts[0]).all()
    np.testing.assert_allclose(tally.dice_sum, tally.dice_sum[0])
    assert (tally.dice_slices == tally.dice_slices[0]).all()


def test_more_slices_of_the_same_patients_make_no_interval_narrower() -> None:
    scores = made_scores(0, slices=40, patients=40)
    once, often = count_scores(scores, 200, rng(7)), count_scores(repeated(scores, 25), 200, rng(7))
    assert np.array_equal(often.counts, once.counts * 25)
    np.testing.assert_allclose(often.dice_sum, once.dice_sum * 25)
    np.testing.assert_allclose(auc(often.counts), auc(once.counts))


def test_two_patients_are_two_patients_however_many_slices() -> None:
    n = 500
    dice = np.repeat([0.0, 1.0], n)
    tally = count_scores(Scores(np.zeros(2 * n), np.full(2 * n, np.nan), dice, np.repeat(["a", "b"], n)), 200, rng())
    estimate = summarise(tally, 200)["dice"]
    assert estimate == Estimate(0.5, 0.0, 1.0, n_slices=1000, n_patients=2)
    assert set((tally.dice_sum / tally.dice_slices).tolist()) == {0.0, 0.5, 1.0}


def test_each_bootstrap_sample_has_as_many_patients() -> None:
    scores = made_scores(0, slices=30, patients=30)
    alone = Scores(scores.logit, np.ones(30), scores.dice, np.arange(30).astype(str))
    tally = count_scores(alone, 100, rng())
    assert (tally.counts.sum((1, 2)) == 30).all()
    assert len(np.unique(tally.counts[1:].max((1, 2)))) > 1


def test_the_draw_repeats() -> None:
    first, again, other = (count_scores(made_scores(0), 10, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.counts, again.counts)
    assert not np.array_equal(first.counts[1:], other.counts[1:])


def test_mean_dice_leaves_out_slices_without_mask() -> None:
    dice = np.array([0.2, np.nan, 0.6, 1.0, np.nan])
    scores = Scores(
        np.zeros(5), np.array([np.nan, np.nan, 1.0, 0.0, np.nan]), dice, np.array(["a", "a", "a", "b", "c"])
    )
    tally = count_scores(scores, 0, rng())
    # (0.2 + 0.6 + 1.0) / 3; patient c has neither label nor mask.
    assert summarise(tally, 200)["dice"] == Estimate(pytest.approx(0.6), None, None, n_slices=3, n_patients=2)
    assert summarise(tally, 200)["auc"].n_slices == 2


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_that_of_brute_force(seed: int) -> None:
    counts = count_scores(made_scores(seed), 0, rng()).counts[0]
    label, bins = expand(counts)
    values = []
    for threshold in range(BINS):
        called = bins >= threshold
        hits = int((called & (label == 1)).sum())
        values.append(2 * hits / (2 * hits + int((called & (label == 0)).sum()) + int((~called & (label == 1)).sum())))
    assert best_threshold(counts) == values.index(max(values))


def test_the_lowest_of_equal_thresholds() -> None:
    counts = np.zeros((2, BINS), int)
    counts[0, 100], counts[1, 300] = 5, 5
    assert best_threshold(counts) == 101


def test_no_threshold_without_positives() -> None:
    counts = np.zeros((2, BINS), int)
    counts[0, 100] = 5
    with pytest.raises(MetricsError, match=r"no positive validation slice.*more patients"):
        best_threshold(counts)


def test_the_curve_encloses_the_auc() -> None:
    counts = count_scores(made_scores(0), 0, rng()).counts[0]
    false_positive, true_positive = roc_points(counts)
    assert (false_positive[0], true_positive[0], false_positive[-1], true_positive[-1]) == (0, 0, 1, 1)
    area = ((true_positive[1:] + true_positive[:-1]) / 2 * np.diff(false_positive)).sum()
    assert area == pytest.approx(auc(counts))


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_their_value(seed: int) -> None:
    tally = count_scores(made_scores(seed, patients=60), 400, rng(seed))
    estimates = summarise(tally, best_threshold(tally.counts[0]))
    for name in ("auc", "f1", "dice"):
        estimate = estimates[name]
        assert 0 <= estimate.low < estimate.value < estimate.high <= 1, name
        assert estimate.high - estimate.low < 0.25, name
        assert estimate.n_patients == 60


def no_marks(rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rows, 3), int), np.zeros((rows, 2, AREAS), int)


def marked_scores() -> Scores:
    """Patients a and b without blood, b marked in one of two slices; c and d with, d found and c missed."""
    nothing = np.full(8, np.nan)
    return Scores(
        logit=np.zeros(8),
        label=nothing,
        dice=np.array([np.nan, np.nan, np.nan, np.nan, np.nan, 0.0, np.nan, 0.8]),
        patient=np.array(list("aabbccdd")),
        marked_mm2=np.array([0.0, 12.0, 0.0, 250.0, 20.0, 0.0, 0.0, 1500.0]),
        blood=np.array([False] * 5 + [True, False, True]),
    )


def test_what_is_marked_where_there_is_no_blood_is_counted_by_slice_and_by_patient() -> None:
    counts = count_scores(marked_scores(), 50, rng())
    assert counts.clear[0].tolist() == [6, 1, 3]
    assert counts.found[0].tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert counts.patients == 4
    estimates = summarise(counts, None)
    assert estimates["alarms"].value == pytest.approx(1 / 6)
    assert estimates["false_mm2"].value == pytest.approx(50)
    largest, bled = [12, 250, 20, 1500], [0, 0, 1, 1]
    cells = np.searchsorted(AREAS_MM2, largest, side="right")
    assert estimates["detection"].value == pytest.approx(roc_auc_score(bled, cells))
    assert estimates["dice"].value == pytest.approx(0.4)
    two = merge_counts([counts, counts])
    assert two.clear[0].tolist() == [12, 2, 6]
    assert summarise(two, None)["detection"].value == estimates["detection"].value


def test_a_bootstrap_sample_draws_a_patient_with_all_that_was_marked() -> None:
    counts = count_scores(marked_scores(), 200, rng())
    assert (counts.found.sum((1, 2)) == 4).all()
    assert (counts.clear[:, 1] == counts.found[:, 0, 2]).all()  # b's alarm comes and goes with b


def test_the_interval_is_the_middle_of_the_bootstrap() -> None:
    dice = np.concatenate([[0.5], np.arange(101) / 100])
    tally = Counts(np.zeros((102, 2, BINS), int), dice * 4, np.full(102, 4), *no_marks(102), 9)
    # 2.5th and 97.5th percentile of 0, 0.01, ... 1; row 0 is not among them.
    assert summarise(tally, 200)["dice"] == Estimate(0.5, pytest.approx(0.025), pytest.approx(0.975), 4, 9)


def test_samples_without_a_positive_are_left_out_of_the_interval() -> None:
    counts = np.zeros((4, 2, BINS), int)
    counts[:, 0, 100] = 3
    counts[[0, 1, 3], 1, 300] = 1
    estimate = summarise(Counts(counts, np.zeros(4), np.zeros(4, int), *no_marks(4), 4), 200)["auc"]
    assert estimate == Estimate(1.0, 1.0, 1.0, n_slices=4, n_patients=4)


def test_what_is_not_defined_is_none() -> None:
    slices = 6
    scores = Scores(np.arange(6.0), np.zeros(slices), np.full(slices, np.nan), np.array(list("abcdef")))
    for estimate in summarise(count_scores(scores, 20, rng()), 200).values():
        assert (estimate.value, estimate.low, estimate.high) == (None, None, None)
