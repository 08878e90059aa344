"""The counts that leave a hospital: cells of neighbouring score steps, none with fewer patients than its policy says.

In the hospital: scores in, a Tally out. The logit's axis has STEPS fixed steps; neighbouring steps are joined until each
cell holds slices of at least `least` patients. No score, edge or threshold comes from the centre, and none is an exact score
of a slice. Beside the cells leaves the area under the hospital's own ROC curve, rounded: one number over all its patients.

At the centre: a Tally in, Counts over the fixed steps out, which add up over hospitals. A wide cell alone would say that all
its slices score alike; within cells, negatives are tilted down and positives up until the area under the hospital's own curve
is the one that it sent. What this costs is measured by simulations/benchmarks/tally.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from shared.metrics import (
    AREAS,
    Counts,
    Scores,
    Tally,
    auc,
    check_finite,
    draw_patients,
    merge_counts,
    per_patient_counts,
)

STEPS = 32
# Narrow around a logit of 0 (.1), wide at the ends (1.6 at 8): scores spread widely once a model is sure, hardly before.
STEP_EDGES = 0.5 * np.sinh(np.linspace(-3.5, 3.5, STEPS + 1))
AUC_STEP = 0.001  # what areas are rounded to
DICE_STEP = 0.1  # what sums of Dice are rounded to; exact sums would tell which patients a bootstrap sample holds
_STEEPEST = 20.0  # tilt per logit; a calibrated model has 0.5
_MIDDLES = (STEP_EDGES[1:] + STEP_EDGES[:-1]) / 2


def tally_scores(scores: Scores, least: int, replicates: int, rng: np.random.Generator) -> Tally:
    """Count scores in cells, for the patients as they are and for bootstrap samples of them.

    Args:
      scores: of slices of one hospital.
      least: fewest patients of a cell; where fewer have a label, blood in their masks, or an empty mask, those counts are 0.
      replicates: number R of bootstrap samples; 0 for none.
      rng: draws them; of a deployed site the operating system's randomness, so that two tallies share no draws.
    Raises:
      MetricsError: a score is not finite.
    """
    check_finite(scores)
    steps = np.clip(np.searchsorted(STEP_EDGES, scores.logit, side="right") - 1, 0, STEPS - 1)
    found = per_patient_counts(scores, steps, STEPS)
    if (found.labels.sum((1, 2)) > 0).sum() < least:
        found.labels[:] = 0
    if few_bled := (found.dice_slices > 0).sum() < least:
        found.dice_sum[:], found.dice_slices[:] = 0, 0
    if few_clear := (found.clear[:, 0] > 0).sum() < least:
        found.clear[:] = 0
    if few_bled or few_clear:
        found.found[:] = 0
    edges = joined(found.labels.sum(1) > 0, least)
    counts = found.drawn(draw_patients(len(found.labels), replicates, rng))
    return Tally(
        edges=edges,
        counts=np.add.reduceat(counts.counts, edges[:-1], axis=-1),
        auc=_own_auc(scores) if counts.counts[0].any() else 0.5,
        dice_sum=np.minimum(np.rint(counts.dice_sum / DICE_STEP) * DICE_STEP, counts.dice_slices),
        dice_slices=counts.dice_slices,
        clear=counts.clear,
        found=_joined_areas(counts.found, least),
        patients=counts.patients,
    )


def _joined_areas(found: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Patients by marked area, cells of fewer than `least` joined with the next, in the place of the first of them.

    All are 0 where one cell would hold everybody: it would say of nobody more than of the others.
    """
    present = found[0].sum(0)
    result = np.zeros_like(found)
    starts, inside = [0], 0
    for cell in range(AREAS - 1):
        inside += int(present[cell])
        if inside >= least:
            starts.append(cell + 1)
            inside = 0
    if inside + int(present[-1]) < least and len(starts) > 1:
        starts.pop()
    if len(starts) > 1:
        result[..., starts] = np.add.reduceat(found, starts, axis=-1)
    return result


def joined(present: NDArray[np.bool_], least: int) -> NDArray[np.int64]:
    """Join neighbouring steps into cells of at least `least` patients, from the lowest score up.

    Args:
      present: bool (P, STEPS), whether a patient has a slice in a step.
      least: fewest patients of a cell; what is left at the end joins the last cell.
    Returns:
      int64 (K + 1,), the step that each cell begins with, and STEPS.
    """
    edges, inside = [0], np.zeros(len(present), dtype=bool)
    for step in range(STEPS - 1):
        inside |= present[:, step]
        if inside.sum() >= least:
            edges.append(step + 1)
            inside[:] = False
    inside |= present[:, -1]
    if inside.sum() < least and len(edges) > 1:
        edges.pop()
    return np.array([*edges, STEPS], dtype=np.int64)


def _own_auc(scores: Scores) -> float:
    """Area under the hospital's own curve, rounded to AUC_STEP; 0.5 where one class is missing."""
    known = ~np.isnan(scores.label)
    values, place = np.unique(scores.logit[known], return_inverse=True)
    counts = np.zeros((2, max(len(values), 1)))
    np.add.at(counts, (scores.label[known].astype(np.int64), place), 1)
    area = float(auc(counts))
    return 0.5 if np.isnan(area) else round(round(area / AUC_STEP) * AUC_STEP, 6)


def spread(tally: Tally) -> Counts:
    """Spread a hospital's cells over the fixed steps, so that its counts add up with those of others.

    Args:
      tally: as it left the hospital.
    Returns:
      Counts over STEPS bins; sums over a cell are the cell's counts, in every row.
    """
    low, high = -_STEEPEST, _STEEPEST
    for _ in range(40):  # the area grows with the tilt
        tilt = (low + high) / 2
        if auc(_spread_over(tally, tilt, rows=1)[0]) < tally.auc:
            low = tilt
        else:
            high = tilt
    mixed = tally.counts[0].sum(-1).all()
    rows = _spread_over(tally, (low + high) / 2 if mixed else 0.0, rows=len(tally.counts))
    return Counts(rows, tally.dice_sum, tally.dice_slices, tally.clear, tally.found, tally.patients)


def pooled(tallies: Iterable[Tally]) -> Counts:
    """Counts of several hospitals together.

    Raises:
      MetricsError: none given, or different numbers of bootstrap samples.
    """
    return merge_counts(map(spread, tallies))


def _spread_over(tally: Tally, tilt: float, rows: int) -> NDArray[np.float64]:
    """Counts over the steps, float64 (rows, 2, STEPS), where the two classes' odds within a cell change by 2 tilt a logit."""
    cell = np.searchsorted(tally.edges, np.arange(STEPS), side="right") - 1
    power = np.array([[-tilt], [tilt]]) * _MIDDLES
    power -= np.maximum.reduceat(power, tally.edges[:-1], axis=-1)[:, cell]
    share = np.exp(power)
    share /= np.add.reduceat(share, tally.edges[:-1], axis=-1)[:, cell]
    return tally.counts[:rows, :, cell].astype(np.float64) * share
