"""Whether a hospital's numbers can be true: compared with themselves, and with what it said at 'hello'.

A hospital can still lie within these bounds. Beyond them it would decide a pooled result, or end a run.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared.metrics import Tally
from shared.wire.records import UpdateError

MOST_SLICES = 100_000_000  # of one hospital
WHOLE = ("patients", "slices", "positives", "steps")
LARGEST_CM2 = 502  # of a slice of the cache, 224 x 224 mm
_ROUNDING = 1e-6  # of sums of Dice, per slice


def check_counts(counts: Mapping[str, float]) -> dict[str, int]:
    """Check the numbers of patients, slices and positives that a hospital says it has.

    Returns:
      The same as integers.
    Raises:
      UpdateError: one is no whole number of a possible size, or they contradict each other.
    """
    for name, number in counts.items():
        if name not in ("patients", "slices", "positives") or not 0 <= number <= MOST_SLICES or number % 1:
            raise UpdateError(f"says that it has {number:g} {name}, expected a whole number up to {MOST_SLICES}")
    if counts.get("positives", 0) > counts.get("slices", MOST_SLICES):
        raise UpdateError(f"says that {counts['positives']:g} of {counts['slices']:g} slices are positive")
    return {name: int(number) for name, number in counts.items()}


def check_metrics(metrics: Mapping[str, float], counts: Mapping[str, int]) -> None:
    """Check the numbers of a round of training.

    Args:
      metrics: as read_metrics returns them.
      counts: from 'hello'; empty where they are withheld.
    Raises:
      UpdateError: one is impossible.
    """
    for name, number in metrics.items():
        if number < 0 or (name in WHOLE and (number % 1 or number > MOST_SLICES)):
            raise UpdateError(f"{number:g} {name} of a round, expected at least 0 and numbers of things whole")
    if "slices" in metrics and metrics["slices"] < 1:
        raise UpdateError("losses of a round over no slice")
    _check_most("patients", metrics.get("patients", 0), counts)


def check_tally(tally: Tally, counts: Mapping[str, int]) -> None:
    """Check counts of scores of one hospital.

    Args:
      tally: as tally_from_record returns it: finite, none negative, of the right shapes.
      counts: from 'hello'; empty where they are withheld. The same policy holds counts of scores back, so that an honest
        hospital sends none then, and there is nothing to compare a liar's with.
    Raises:
      UpdateError: the hospital does not have so much, withheld what it has, or the counts contradict each other.
    """
    if not counts.keys() >= {"patients", "slices"}:
        raise UpdateError("counts of scores, and at 'hello' it withheld how many patients and slices it has")
    labelled, masked = int(tally.counts[0].sum()), int(tally.dice_slices[0] + tally.clear[0, 0])
    _check_most("patients", tally.patients, counts)
    _check_most("slices", max(labelled, masked), counts)
    _check_most("positives", int(tally.counts[0, 1].sum()), counts)
    if tally.patients > labelled + masked > 0:  # of too few patients a hospital counts none
        raise UpdateError(f"counts of {tally.patients} patients in {labelled + masked} slices")
    if (tally.dice_sum > tally.dice_slices * (1 + _ROUNDING) + _ROUNDING).any():
        raise UpdateError("a sum of Dice that is larger than the number of its slices")
    # A bootstrap sample draws as many patients as there are, each with its slices: nothing that row 0 does not have, and no
    # more than all of them that often.
    if (tally.counts[1:] > tally.counts[0] * max(tally.patients, 1)).any():
        raise UpdateError("a bootstrap sample with scores that no patient has")
    if (tally.dice_slices[1:] + tally.clear[1:, 0] > masked * max(tally.patients, 1)).any():
        raise UpdateError("a bootstrap sample with masks that no patient has")
    if tally.found[0].sum() > tally.patients or (tally.found[1:] > tally.found[0] * max(tally.patients, 1)).any():
        raise UpdateError("patients by marked area whom the hospital does not have")
    if (tally.clear[:, 2] > tally.clear[:, 0] * LARGEST_CM2).any():
        raise UpdateError("more area marked than its slices have")


def _check_most(name: str, number: float, counts: Mapping[str, int]) -> None:
    """Refuse more of something than the hospital said it has, or than any has."""
    most = counts.get(name, MOST_SLICES)
    if number > most:
        raise UpdateError(f"counts of {number:g} {name}, and at 'hello' it had {most}")
