"""Numbers of a hospital that cannot be true are refused; each changes one thing of numbers that can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from server.federation.plausible import check_counts, check_metrics, check_tally
from server.federation.weights import MOST, site_weights
from shared.metrics import Scores, Tally
from shared.tally import tally_scores
from shared.wire.records import UpdateError

COUNTS = {"patients": 20, "slices": 60, "positives": 30}


def honest(replicates: int = 50) -> Tally:
    draw = np.random.default_rng(3)
    label = (np.arange(60) % 2).astype(float)
    patient = np.array([f"p{n // 3}" for n in range(60)])
    blood = np.arange(60) % 4 > 0
    dice = np.where(blood, draw.random(60), np.nan)
    area = np.where(np.arange(60) < 30, 0.0, 400.0)  # of ten patients each
    return tally_scores(Scores(draw.normal(size=60), label, dice, patient, area, blood), 5, replicates, draw)


def changed(row: int, place: tuple[int, int], value: int) -> Tally:
    tally = honest()
    tally.counts[row][place] = value
    return tally


def test_what_an_honest_hospital_counts_is_taken_whatever_it_withholds() -> None:
    check_tally(honest(), COUNTS)
    check_tally(honest(0), COUNTS)
    check_tally(honest(), {"patients": 20, "slices": 60})
    for counts in (COUNTS, {}, {"patients": 20}):
        check_metrics({"slices": 240.0, "steps": 4.0, "total": 3.5, "seconds": 0.1, "patients": 14.0}, counts)
    assert check_counts({key: float(value) for key, value in COUNTS.items()}) == COUNTS


@pytest.mark.parametrize(
    ("tally", "told"),
    [
        (replace(honest(), patients=2_000_000_018), "counts of 2e.09 patients, and at 'hello' it had 20"),
        (replace(honest(), patients=21), "counts of 21 patients"),
        (replace(honest(), dice_sum=np.full(51, 4.6e297)), "a sum of Dice that is larger"),
        (replace(honest(), dice_sum=honest().dice_slices + 0.01), "a sum of Dice that is larger"),
        (replace(honest(), dice_slices=honest().dice_slices * 100), "slices, and at 'hello' it had 60"),
        (changed(0, (1, 0), 61), "slices, and at 'hello' it had 60"),
        (changed(7, (1, 0), 10**4), "a bootstrap sample with scores that no patient has"),
        (changed(7, (1, int(honest().counts[0, 1].argmax())), 10**6), "a bootstrap sample with scores that no"),
        (replace(honest(), dice_slices=honest().dice_slices + np.eye(51, dtype=int)[9] * 10**6), "with masks that no"),
        (replace(honest(), clear=honest().clear * 5), "slices, and at 'hello' it had 60"),
        (replace(honest(), clear=honest().clear * [1, 1, 10**5]), "more area marked than its slices have"),
        (replace(honest(), found=honest().found * 2), "patients by marked area whom the hospital does not have"),
        (replace(honest(), found=honest().found + np.eye(51, dtype=int)[9][:, None, None] * 10**5), "by marked area"),
    ],
)
def test_a_tally_that_cannot_be_is_refused(tally: Tally, told: str) -> None:
    """Before: 2,000,000,018 patients and a Dice of 4.6e297 stood in summary.json."""
    with pytest.raises(UpdateError, match=told):
        check_tally(tally, COUNTS)


def test_more_positives_or_patients_than_slices_are_refused_whatever_was_said_before() -> None:
    with pytest.raises(UpdateError, match="positives, and at 'hello' it had 29"):
        check_tally(honest(), COUNTS | {"positives": 29})
    with pytest.raises(UpdateError, match="counts of 1000 patients in 120 slices"):
        check_tally(replace(honest(), patients=1000), {"patients": 1000, "slices": 1000})


@pytest.mark.parametrize(
    "counts", [{"patients": -1.0}, {"slices": 1e9}, {"slices": 0.5}, {"cls": 1.0}, {"positives": 2.0, "slices": 1.0}]
)
def test_counts_at_hello_that_cannot_be_are_refused(counts: dict[str, float]) -> None:
    with pytest.raises(UpdateError, match="says that"):
        check_counts(counts)


@pytest.mark.parametrize(
    "metrics", [{"slices": 5e-324}, {"slices": 0.0}, {"steps": 1e9}, {"cls": -0.1}, {"patients": 21.0}, {"steps": 1.5}]
)
def test_numbers_of_a_round_that_cannot_be_are_refused(metrics: dict[str, float]) -> None:
    """A loss over 5e-324 slices was infinite, and no JSON."""
    with pytest.raises(UpdateError):
        check_metrics(metrics, COUNTS)


def test_weights_are_the_centres() -> None:
    patients = {"a": 10, "b": 20, "c": 1000, "d": 1, "e": None}
    assert site_weights(patients, "equal") == dict.fromkeys("abcde", 1.0)
    assert site_weights(patients, "patients") == {"a": 10 / 15, "b": 20 / 15, "c": MOST, "d": 1 / MOST, "e": 1.0}
    assert site_weights({"a": None, "b": 0}, "patients") == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("counts", [{}, {"patients": 20}, {"slices": 60}, {"positives": 3}])
def test_a_tally_without_counts_at_hello_is_refused(counts: dict[str, int]) -> None:
    """Before: who withheld them was taken with ten million patients, an AUC of 1 and a Dice of 1."""
    with pytest.raises(UpdateError, match="at 'hello' it withheld"):
        check_tally(honest(), counts)
