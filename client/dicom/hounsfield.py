"""Whether a series' values can be Hounsfield units.

A missing rescale, a rescale applied twice or a windowed picture gives numbers that decode without error and poison a
model. A series is refused unless air is near -1000 and soft tissue near 0 to 80 HU; nothing is guessed or corrected.

Stays in the hospital. Shape suffix: Y row, X column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BIN_HU = 5
LOW_HU, HIGH_HU = -3100, 4100
BINS = (HIGH_HU - LOW_HU) // BIN_HU
SPARSE = 4  # every fourth pixel both ways is enough to count

PADDED_BELOW_HU = -1200  # padding is no measurement
AIR_RANGE_HU = (-1100, -850)  # real air: -965 to -1003, SD up to 28
TISSUE_RANGE_HU = (-20, 100)
TISSUE_MODE_HU = (-10, 90)
LEAST_AIR = 0.01  # of all measured pixels
LEAST_TISSUE = 0.2  # of what is not air


def histogram(hu_YX: NDArray[np.float32]) -> NDArray[np.int64]:
    """Counts of a slice's values, int64 (BINS,) from LOW_HU in steps of BIN_HU; values beyond are in the end bins."""
    index = (hu_YX[::SPARSE, ::SPARSE].ravel() - np.float32(LOW_HU)) * np.float32(1 / BIN_HU)
    np.clip(index, 0, BINS - 1, out=index)
    return np.bincount(index.astype(np.int32), minlength=BINS)


def implausible(counts: NDArray[np.int64]) -> str | None:
    """Return why a series' values cannot be HU, with the measured numbers; None if they can.

    Args:
      counts: sum of `histogram` over the series' slices, int64 (BINS,).
    """
    start = _bin(PADDED_BELOW_HU)
    measured, not_air = counts[start:].sum(), counts[_bin(-300) :].sum()
    air = _count(counts, AIR_RANGE_HU) / max(1, measured)
    tissue = _count(counts, TISSUE_RANGE_HU) / max(1, not_air)
    mode = _mode(counts, -200, 300)
    if air >= LEAST_AIR and tissue >= LEAST_TISSUE and TISSUE_MODE_HU[0] <= mode <= TISSUE_MODE_HU[1]:
        return None
    common = _mode(counts, PADDED_BELOW_HU, HIGH_HU)
    return (
        f"values cannot be HU: {air:.1%} of pixels near air's -1000, {tissue:.0%} of the others at soft tissue's "
        f"{TISSUE_RANGE_HU[0]} to {TISSUE_RANGE_HU[1]} with most at {mode}, most common value {common}; expected at least "
        f"{LEAST_AIR:.0%}, {LEAST_TISSUE:.0%} and {TISSUE_MODE_HU[0]} to {TISSUE_MODE_HU[1]}. {_cause(counts)}; export the series again"
    )


def _cause(counts: NDArray[np.int64]) -> str:
    """Return the most frequent cause of values like these."""
    total = max(1, counts.sum())
    if counts[: _bin(PADDED_BELOW_HU)].sum() > LEAST_TISSUE * total and not _count(counts, TISSUE_RANGE_HU):
        return "A rescale that was applied twice is the common cause"
    if counts[_bin(-5) : _bin(260)].sum() == total:
        return (
            "A window that was applied before the export, or a missing RescaleIntercept of -1024, is the common cause"
        )
    return "A missing RescaleIntercept of -1024 is the common cause"


def without_air(counts: NDArray[np.int64]) -> bool:
    """Whether hardly a pixel is near air's -1000: what a wrong rescale does to some slices of a series."""
    measured = counts[_bin(PADDED_BELOW_HU) :].sum()
    return bool(_count(counts, AIR_RANGE_HU) < LEAST_AIR * max(1, measured))


def _bin(hu: float) -> int:
    return int((hu - LOW_HU) // BIN_HU)


def _count(counts: NDArray[np.int64], range_hu: tuple[float, float]) -> int:
    return int(counts[_bin(range_hu[0]) : _bin(range_hu[1]) + 1].sum())


def _mode(counts: NDArray[np.int64], low_hu: float, high_hu: float) -> int:
    """The middle of the fullest bin of a range, its neighbours within 10 HU counted in."""
    smooth = np.convolve(counts, [1, 2, 3, 2, 1], mode="same")[_bin(low_hu) : _bin(high_hu)]
    return LOW_HU + BIN_HU * (_bin(low_hu) + int(np.argmax(smooth))) + BIN_HU // 2
