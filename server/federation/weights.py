"""Weights of hospitals in a mean. The centre decides; a hospital cannot ask for one.

A hospital that chose its own weight could make its encoder the global one. A number of patients is also self-reported,
so that it counts within bounds only.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

MOST = 3.0  # times the median: what a hospital gains by a number of patients that is not true


def site_weights(patients: Mapping[str, int | None], by: str) -> dict[str, float]:
    """Return the weight of each site in the mean of a round.

    Args:
      patients: site -> its number of patients, None where its policy withholds it.
      by: federation.weights: "equal", or "patients" relative to their median, from a third of it to three times.
    Returns:
      Weights, unitless; 1 for a site that withholds its number.
    """
    known = [number for number in patients.values() if number]
    if by == "equal" or not known:
        return dict.fromkeys(patients, 1.0)
    middle = median(known)
    return {
        site: 1.0 if number is None else min(max(number / middle, 1 / MOST), MOST) for site, number in patients.items()
    }
