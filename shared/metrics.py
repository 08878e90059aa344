"""Metrics as sums that merge: counts of scores in, AUC, F1, Dice and false alarms with intervals out.

Scores are counted: how many slices with and without the marker fell into each score bin, the sum of Dice over slices with
blood, what was marked where there is none, and how much was marked in each patient, once for the patients as they are
(row 0) and once for each bootstrap sample of them (rows 1 to R). Counts of several hospitals add up, and every pooled
metric follows from the sums; averages of averages appear nowhere. No hospital sends these fine counts: what leaves is
coarser (shared/tally.py).

Intervals are percentile bootstraps over patients, drawn within each hospital (Efron and Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from shared.errors import HemafedError

# Score bins are equal steps of the logit, so that confident scores stay apart; beyond the ends they share a bin.
LOGIT_LIMIT = 10.0
BINS = 1000
# What a model marks in a slice counts from the first of these on; a patient's largest marked area falls between two of them.
AREAS_MM2 = (30.0, 100.0, 300.0, 1000.0)
AREAS = len(AREAS_MM2) + 1

Counted = NDArray[np.int64] | NDArray[np.float64]  # whole slices, or fractions where a coarser count was spread


class MetricsError(HemafedError, ValueError):
    """Counts that do not belong together."""


@dataclass(frozen=True)
class Scores:
    """A model's output on slices; stays where the slices are.

    Attributes:
      logit: float (N,), hypodensity.
      label: float (N,), 1, 0 or NaN for unknown.
      dice: float (N,), of the predicted hematoma; NaN where there is no mask, or an empty one.
      patient: str (N,), keyed hash.
      marked_mm2: float (N,), area that the model marked; NaN where there is no mask. None where nothing was segmented.
      blood: bool (N,), whether the mask shows any; None with marked_mm2.
    """

    logit: NDArray[np.float64]
    label: NDArray[np.float64]
    dice: NDArray[np.float64]
    patient: NDArray[np.str_]
    marked_mm2: NDArray[np.float64] | None = None
    blood: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Tally:
    """Coarse counts over the slices of one hospital; leaves the hospital when its policy allows metrics.

    Attributes:
      edges: int64 (K + 1,), which of the steps of shared/tally.py each of the K cells begins with; the last is their end.
      counts: int64 (R + 1, 2, K), slices without and with the marker per cell; row 0 the patients as they are, rows 1 to
        R bootstrap samples.
      auc: float, area under the hospital's own ROC curve, rounded; 0.5 where one class is missing.
      dice_sum: float64 (R + 1,), sum of Dice over slices with blood in their mask, rounded.
      dice_slices: int64 (R + 1,), their number.
      clear: int64 (R + 1, 3), slices whose mask is empty; those of them where the model marked AREAS_MM2[0] or more; the
        area that it marked in all of them, whole cm2: exact sums would tell which patients a bootstrap sample holds.
      found: int64 (R + 1, 2, AREAS), patients with masks, without and with blood in them, by the largest area that the model
        marked in a slice of theirs.
      patients: number of patients with a label or a mask.
    """

    edges: NDArray[np.int64]
    counts: NDArray[np.int64]
    auc: float
    dice_sum: NDArray[np.float64]
    dice_slices: NDArray[np.int64]
    clear: NDArray[np.int64]
    found: NDArray[np.int64]
    patients: int


@dataclass(frozen=True)
class Counts:
    """Counts over slices, of one hospital or of several together.

    Attributes:
      counts: int64 or float64 (R + 1, 2, BINS), slices without and with the marker per score bin; row 0 the patients as
        they are, rows 1 to R bootstrap samples. Fractions where a coarser count was spread over the bins.
      dice_sum: float64 (R + 1,), sum of Dice over slices with blood in their mask.
      dice_slices: int64 (R + 1,), their number.
      clear: int64 (R + 1, 3), as in Tally.
      found: int64 (R + 1, 2, AREAS), as in Tally.
      patients: number of patients with a label or a mask.
    """

    counts: Counted
    dice_sum: NDArray[np.float64]
    dice_slices: NDArray[np.int64]
    clear: NDArray[np.int64]
    found: NDArray[np.int64]
    patients: int


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval; all None where it is not defined (one class only, or no such slice)."""

    value: float | None
    low: float | None
    high: float | None
    n_slices: int
    n_patients: int


def count_scores(scores: Scores, replicates: int, rng: np.random.Generator) -> Counts:
    """Count scores, for the patients as they are and for bootstrap samples of them.

    Args:
      scores: of slices of one hospital.
      replicates: number R of bootstrap samples; 0 for none.
      rng: draws them.
    Raises:
      MetricsError: a score is not finite; binned, it would pass for a confident one.
    """
    check_finite(scores)
    place = (scores.logit + LOGIT_LIMIT) / (2 * LOGIT_LIMIT) * BINS
    bins = np.clip(np.floor(place), 0, BINS - 1).astype(np.int64)
    per_patient = per_patient_counts(scores, bins, BINS)
    return per_patient.drawn(draw_patients(len(per_patient.labels), replicates, rng))


def check_finite(scores: Scores) -> None:
    """Refuse scores that are not finite; how many are is not in the text.

    Raises:
      MetricsError: there is one; binned, it would pass for a confident score.
    """
    if not (np.isfinite(scores.logit).all() and not np.isinf(scores.dice).any()):
        raise MetricsError("scores are not finite; the model has diverged: train it again")


@dataclass(frozen=True)
class PatientCounts:
    """Counts for each patient; stays where the slices are.

    Attributes:
      labels: float64 (P, 2, BINS), slices without and with the marker per bin.
      dice_sum: float64 (P,).
      dice_slices: int64 (P,).
      clear: float64 (P, 3), found: float64 (P, 2, AREAS); as in Tally.
    """

    labels: NDArray[np.float64]
    dice_sum: NDArray[np.float64]
    dice_slices: NDArray[np.int64]
    clear: NDArray[np.float64]
    found: NDArray[np.float64]

    def drawn(self, times: NDArray[np.float64]) -> Counts:
        """Sum the patients, each as often as it was drawn: (R + 1, P)."""
        flat = times @ self.labels.reshape(len(self.labels), 2 * self.labels.shape[-1])
        return Counts(
            counts=np.rint(flat).astype(np.int64).reshape(len(times), *self.labels.shape[1:]),
            dice_sum=times @ self.dice_sum,
            dice_slices=np.rint(times @ self.dice_slices).astype(np.int64),
            clear=np.rint(times @ self.clear).astype(np.int64),
            found=np.rint(times @ self.found.reshape(len(self.found), 2 * AREAS))
            .astype(np.int64)
            .reshape(-1, 2, AREAS),
            patients=int(((self.labels.sum((1, 2)) + self.dice_slices + self.clear[:, 0]) > 0).sum()),
        )


def per_patient_counts(scores: Scores, bins: NDArray[np.int64], size: int) -> PatientCounts:
    """Count each patient's slices.

    Args:
      scores: of slices of one hospital.
      bins: int64 (N,), each slice's bin.
      size: number of bins.
    """
    patients, owner = np.unique(scores.patient, return_inverse=True)
    known, masked = ~np.isnan(scores.label), ~np.isnan(scores.dice)
    labels = np.zeros((len(patients), 2, size))
    np.add.at(labels, (owner[known], scores.label[known].astype(np.int64), bins[known]), 1)
    return PatientCounts(
        labels,
        np.bincount(owner[masked], weights=scores.dice[masked], minlength=len(patients)).astype(np.float64),
        np.bincount(owner[masked], minlength=len(patients)).astype(np.int64),
        *_marked_counts(scores, owner, len(patients)),
    )


def _marked_counts(
    scores: Scores, owner: NDArray[np.int64], patients: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per patient, what was marked where there is no blood (P, 3), and the cell of the largest marked area (P, 2, AREAS)."""
    clear, found = np.zeros((patients, 3)), np.zeros((patients, 2, AREAS))
    if scores.marked_mm2 is None or scores.blood is None:
        return clear, found
    masked = ~np.isnan(scores.marked_mm2)
    without = masked & ~scores.blood
    area_mm2 = np.where(masked, scores.marked_mm2, 0.0)
    for column, weight in enumerate((np.ones(len(owner)), area_mm2 >= AREAS_MM2[0], area_mm2 / 100)):
        np.add.at(clear[:, column], owner[without], weight[without])
    largest, bled = np.zeros(patients), np.zeros(patients, dtype=np.int64)
    np.maximum.at(largest, owner[masked], area_mm2[masked])
    bled[owner[masked & scores.blood]] = 1
    looked = np.unique(owner[masked])
    cell = np.searchsorted(AREAS_MM2, largest, side="right")
    found[looked, bled[looked], cell[looked]] = 1
    return clear, found


def draw_patients(patients: int, replicates: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each patient is drawn, float64 (R + 1, P): once in row 0, multinomially in the others."""
    if not patients:
        return np.ones((replicates + 1, 0))
    drawn = rng.multinomial(patients, np.full(patients, 1 / patients), size=replicates)
    return np.vstack([np.ones((1, patients)), drawn])


def merge_counts(tallies: Iterable[Counts]) -> Counts:
    """Counts of several hospitals together.

    Raises:
      MetricsError: none given, or different numbers of bootstrap samples.
    """
    parts = list(tallies)
    if not parts or len({part.counts.shape for part in parts}) != 1:
        raise MetricsError(
            f"tallies of shapes {[part.counts.shape for part in parts]} cannot be merged; expected at least one and "
            "the same evaluation.replicates at every site"
        )
    return Counts(
        counts=np.sum([part.counts for part in parts], axis=0),
        dice_sum=np.sum([part.dice_sum for part in parts], axis=0),
        dice_slices=np.sum([part.dice_slices for part in parts], axis=0),
        clear=np.sum([part.clear for part in parts], axis=0),
        found=np.sum([part.found for part in parts], axis=0),
        patients=sum(part.patients for part in parts),
    )


def auc(counts: Counted) -> NDArray[np.float64]:
    """Area under the ROC curve of each (..., 2, BINS) count: the probability that a positive scores higher.

    Equal to sklearn.metrics.roc_auc_score (ties within a bin count half; a test compares them), for all bootstrap
    samples at once: scikit-learn takes one at a time and 2 ms for each.

    Returns:
      float64 (...); NaN where there is one class only.
    """
    negative, positive = counts[..., 0, :], counts[..., 1, :]
    lower = negative.cumsum(-1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * lower).sum(-1) / (positive.sum(-1) * negative.sum(-1))


def f1(counts: Counted, threshold_bin: int) -> NDArray[np.float64]:
    """F1 of each (..., 2, BINS) count when bins from `threshold_bin` on are called positive.

    Equal to sklearn.metrics.f1_score. Returns float64 (...); NaN without a positive slice.
    """
    called = counts[..., threshold_bin:].sum(-1)
    positives = counts[..., 1, :].sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(positives > 0, 2 * called[..., 1] / (called.sum(-1) + positives), np.nan)


def best_threshold(counts: Counted) -> int:
    """The bin from which on calling positive gives the best F1; the lowest of equals.

    To be used on validation slices of training hospitals, never on the slices that are then reported.

    Raises:
      MetricsError: no positive slice, so that no threshold is better than another.
    """
    if not counts[1].any():
        raise MetricsError("no positive validation slice: a threshold cannot be chosen; give the sites more patients")
    true_positive = counts[1][::-1].cumsum()[::-1]
    called = counts.sum(axis=0)[::-1].cumsum()[::-1]
    return int(np.argmax(2 * true_positive / (called + counts[1].sum())))


def roc_points(counts: Counted) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates of one (2, BINS) count, for a plot."""
    label, bins = np.nonzero(counts)
    false_positive, true_positive, _ = roc_curve(label, bins, sample_weight=counts[label, bins])
    return false_positive, true_positive


def summarise(counts: Counts, threshold_bin: int | None) -> dict[str, Estimate]:
    """Every metric with its 95 % interval over patients.

    auc, f1: of the marker, over slices. dice: mean over slices with blood. alarms: share of the slices without blood in which
    the model marks some. false_mm2: mean area that it marks there. detection: AUC of a patient with blood against one
    without, by the largest marked area.

    Args:
      counts: of one site, or of several merged.
      threshold_bin: from best_threshold on validation slices; None where there were none, and then F1 is undefined.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        dice = counts.dice_sum / counts.dice_slices
        clear = counts.clear[:, 1:] / counts.clear[:, :1]
    labelled = round(counts.counts[0].sum())
    f1_rows = np.full(len(dice), np.nan) if threshold_bin is None else f1(counts.counts, threshold_bin)
    return {
        "auc": _estimate(auc(counts.counts), labelled, counts.patients),
        "f1": _estimate(f1_rows, labelled, counts.patients),
        "dice": _estimate(dice, int(counts.dice_slices[0]), counts.patients),
        "alarms": _estimate(clear[:, 0], int(counts.clear[0, 0]), counts.patients),
        "false_mm2": _estimate(100 * clear[:, 1], int(counts.clear[0, 0]), counts.patients),
        "detection": _estimate(auc(counts.found), int(counts.clear[0, 0]), int(counts.found[0].sum())),
    }


def _estimate(values: NDArray[np.float64], slices: int, patients: int) -> Estimate:
    """Row 0 as the value, percentiles of the defined others as the interval."""
    value, drawn = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value) or not len(drawn):
        return Estimate(None if np.isnan(value) else value, None, None, slices, patients)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), slices, patients)
