"""A scanner: what it adds to a head, each cause of shift between hospitals one named number.

The numbers follow measurements on real scans: noise spectrum, edge width, calibration, field of view.

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Array = NDArray[np.float32]

MATRIX = 512  # pixels of a slice's side
RESTS = ("none", "shell", "cushion", "table")
AIR_NOISE = 2.6  # air is noisier than tissue by this factor, through scatter and streaks
_ROLL_OFF = 1.25  # how fast noise falls beyond its peak


@dataclass(frozen=True)
class Scanner:
    """One hospital's scanner; each field is one named cause of shift between hospitals.

    Attributes:
      dose: tube current, 1 is the standard; noise falls with its root.
      sharpness: the reconstruction kernel, from -1 (smooth) over 0 (standard) to 1 (sharp).
      thickness_mm: slice thickness, averaged over; noise falls with its root.
      spacing_mm: distance of neighbouring slices.
      offset_hu: calibration error, added everywhere inside the head.
      cupping_hu: rise of soft tissue towards the skull (beam hardening).
      field_of_view_mm: side of the reconstructed square.
      tilt_degree: gantry tilt, about the x axis.
      rest: what the head lies on, one of RESTS.
      holder_hu: brightness of the rest's surface; 0 omits it.
      petrous_hu: depth of the dark band between the petrous bones (beam hardening).
      helical: a helical scan's slices have the profile of a triangle twice as wide as their thickness, sequential ones that
        of a box.
      contrast: of grey to white matter, a share of the usual; it grows as the tube's voltage falls.
      corner_hu: brightness of a square marker beside the head; 0 omits it.
      padding_hu: value outside the circular field of view, or None for a square one.
    """

    dose: float = 1.0
    sharpness: float = 0.0
    thickness_mm: float = 5.0
    spacing_mm: float = 5.0
    offset_hu: float = 0.0
    cupping_hu: float = 6.0
    field_of_view_mm: float = 230.0
    tilt_degree: float = 0.0
    rest: str = "shell"
    holder_hu: float = 150.0
    petrous_hu: float = 5.0
    contrast: float = 1.0
    helical: bool = False
    corner_hu: float = 0.0
    padding_hu: float | None = None

    @property
    def noise_hu(self) -> float:
        """Standard deviation in uniform tissue: falls with the root of dose and thickness, rises with sharpness."""
        return 2.8 * (5.0 / self.thickness_mm / self.dose) ** 0.5 * 1.35**self.sharpness

    @property
    def blur_mm(self) -> float:
        """Standard deviation of the in-plane point spread function."""
        return 0.35 * 0.85**self.sharpness

    @property
    def noise_peak_per_mm(self) -> float:
        """Spatial frequency at which the noise power peaks."""
        return 0.235 * 1.13**self.sharpness


def blur_and_noise(hu: Array, scanner: Scanner, rng: np.random.Generator) -> Array:
    """Point spread function and correlated noise, both in the frequency domain.

    The noise power rises with frequency (filtered back-projection), peaks where the kernel says and falls;
    it is scaled to the scanner's standard deviation.
    """
    step = scanner.field_of_view_mm / MATRIX
    fy = fft.fftfreq(MATRIX, step).astype(np.float32)[:, None]
    fx = fft.rfftfreq(MATRIX, step).astype(np.float32)[None, :]
    f = np.hypot(fy, fx)
    transfer = np.exp(-2 * (np.pi * scanner.blur_mm * f) ** 2)
    peak = scanner.noise_peak_per_mm
    # Its square, the power, has its maximum at the peak; the exponent gives the autocorrelation of real kernels.
    amplitude = (f / peak) * np.exp(-((f / peak) ** _ROLL_OFF) / _ROLL_OFF)
    white = fft.rfft2(rng.standard_normal((MATRIX, MATRIX), dtype=np.float32))
    noise = fft.irfft2(white * amplitude, s=hu.shape)
    blurred = fft.irfft2(fft.rfft2(hu) * transfer, s=hu.shape)
    noise *= np.float32(scanner.noise_hu / noise.std())
    return blurred + noise * np.where(blurred < -500, np.float32(AIR_NOISE), np.float32(1))
