"""Synthetic non-contrast head CT with an intracerebral hematoma: a patient in, slices in HU out.

A patient is one head and one hematoma in three dimensions; a scanner turns planes of it into slices with
its own resolution, noise, calibration and field of view. The numbers follow measurements on real scans
(tissue HU, noise spectrum, edge width, lesion size and contrast). Negatives are honest: a hematoma
without the marker may carry a notch that is open to the surface, a blend sign or a fluid level.

The marker: a hypodense region strictly inside the hematoma, with no connection to its surface (Boulouis et
al. 2016, JAMA Neurology). Axes in the patient's frame: x to the patient's left, y posterior, z to the head,
in mm from the centre of the head (DICOM PS3.3 C.7.6.2.1.1).

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from simulations.phantom.patient import FEATURES, Blob, Patient

Array = NDArray[np.float32]

DRAWING = 9  # raised with every change of a drawn slice; results stored with another number are not used
MATRIX = 512  # pixels of a slice's side
_RENDER = 256  # anatomy is drawn at half resolution: every scanner's blur is wider than a drawn pixel
_SUBPLANES = 4  # planes of the hematoma averaged over the slice thickness (partial volume)
_HEAD_PLANES = (-0.5 / 3**0.5, 0.5 / 3**0.5)  # of the head, in thicknesses: Gauss-Legendre of order 2

AIR_HU, FAT_HU, SKIN_HU, WHITE_HU, GREY_HU, CSF_HU = -1000.0, -95.0, 35.0, 28.0, 37.0, 5.0

_ROLL_OFF = 1.25  # how fast noise falls beyond its peak
AIR_NOISE = 2.6  # air is noisier than tissue by this factor, through scatter and streaks

# A slice is called positive once the hypodensity is as large as a reader can name, and left without a
# label (unknown) where there is some, but less: 30 mm2 is a spot of 6 mm.
POSITIVE_AREA_MM2 = 30.0
SUSPECT_AREA_MM2 = 3.0


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
      holder_hu: brightness of the head holder; 0 omits it.
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
    holder_hu: float = 150.0
    corner_hu: float = 0.0
    padding_hu: float | None = None

    @property
    def noise_hu(self) -> float:
        """Standard deviation in uniform tissue: falls with the root of dose and thickness, rises with sharpness."""
        return 2.8 * (5.0 / self.thickness_mm / self.dose) ** 0.5 * 1.35**self.sharpness

    @property
    def blur_mm(self) -> float:
        """Standard deviation of the in-plane point spread function."""
        return 0.48 * 0.85**self.sharpness

    @property
    def noise_peak_per_mm(self) -> float:
        """Spatial frequency at which the noise power peaks."""
        return 0.235 * 1.13**self.sharpness


def with_feature(patient: Patient, scanner: Scanner) -> tuple[Patient, Scanner]:
    """Changes that a patient's planted feature makes in the head or in how it is scanned; none without a feature."""
    on = patient.feature_on
    match patient.feature:
        case "":
            return patient, scanner
        case "skull":
            return replace(patient, skull_mm=(8.4 if on else 4.8) + 0.2 * (patient.skull_mm - 6.75)), scanner
        case "holder":
            return patient, replace(scanner, holder_hu=600.0 if on else 60.0)
        case "corner":
            return patient, replace(scanner, corner_hu=300.0 if on else 0.0)
        case "field-of-view":
            return patient, replace(scanner, field_of_view_mm=250.0 if on else 215.0)
    raise ValueError(f"planted feature {patient.feature!r}, expected one of {', '.join(FEATURES)}")


@dataclass(frozen=True)
class Slice:
    """One rendered slice.

    Attributes:
      hu: int16 (512, 512).
      hematoma: bool (512, 512), the whole hematoma with its hypodensities.
      hypodensity_mm2: area of the marker in this slice.
    """

    hu_YX: NDArray[np.int16]
    hematoma_YX: NDArray[np.bool_]
    hypodensity_mm2: float

    @property
    def label(self) -> int | None:
        """1 with the marker, 0 without; None where a reader could not tell or there is no hematoma."""
        if not self.hematoma_YX.any() or SUSPECT_AREA_MM2 <= self.hypodensity_mm2 < POSITIVE_AREA_MM2:
            return None
        return int(self.hypodensity_mm2 >= POSITIVE_AREA_MM2)


def render_slice(patient: Patient, scanner: Scanner, z_mm: float, rng: np.random.Generator) -> Slice:
    """One slice at height z of the scanner's table, through the patient as it lies there.

    Args:
      patient: the head, and scanner: what looks at it, both as with_feature returns them.
      z_mm: position of the slice's centre.
      rng: the slice's noise.
    Returns:
      The slice as the scanner would store it after rescale.
    """
    x_YX, y_YX = _grid(scanner.field_of_view_mm)
    radius_YX = np.hypot(x_YX, y_YX)
    angle, shift_x, shift_y = patient.pose
    head_x = np.cos(angle) * (x_YX - shift_x) + np.sin(angle) * (y_YX - shift_y)
    head_y = -np.sin(angle) * (x_YX - shift_x) + np.cos(angle) * (y_YX - shift_y)
    head_z = z_mm + np.tan(np.deg2rad(scanner.tilt_degree)) * head_y

    planes = [_head(patient, head_x, head_y, head_z + share * scanner.thickness_mm) for share in _HEAD_PLANES]
    hu_YX, brain_YX, depth_YX = (sum(parts) / len(parts) for parts in zip(*planes, strict=True))
    hu_YX += brain_YX * scanner.cupping_hu * np.exp(-depth_YX / 9.0)
    hu_YX, clot_YX, dark_YX = _hematoma(patient, scanner, hu_YX, head_x, head_y, head_z)
    hu_YX += scanner.offset_hu * (hu_YX > -500)
    if scanner.holder_hu:
        hu_YX = _add_holder(hu_YX, patient, scanner.holder_hu, x_YX, y_YX)
    if scanner.corner_hu:
        square_YX = (np.abs(x_YX - shift_x - 92) < 5) & (np.abs(y_YX - shift_y + 92) < 5)  # lies on the head's holder
        hu_YX = np.where(square_YX, np.float32(scanner.corner_hu), hu_YX)

    hu_YX = ndimage.zoom(hu_YX, MATRIX // _RENDER, order=1, grid_mode=True, mode="nearest")
    hu_YX = blur_and_noise(hu_YX, scanner, rng)
    if scanner.padding_hu is not None:
        outside = ndimage.zoom(radius_YX, MATRIX // _RENDER, order=0, grid_mode=True, mode="nearest")
        hu_YX[outside > scanner.field_of_view_mm / 2] = scanner.padding_hu
    pixel_mm2 = (scanner.field_of_view_mm / _RENDER) ** 2
    hematoma_YX = ndimage.zoom(clot_YX, MATRIX // _RENDER, order=1, grid_mode=True, mode="nearest") > 0.5
    return Slice(np.rint(hu_YX).astype(np.int16), hematoma_YX, float((dark_YX > 0.5).sum() * pixel_mm2))


def _grid(field_of_view_mm: float) -> tuple[Array, Array]:
    """Centres of the drawn pixels in mm, x (1, 256) and y (256, 1)."""
    step = field_of_view_mm / _RENDER
    centres = ((np.arange(_RENDER) + 0.5) * step - field_of_view_mm / 2).astype(np.float32)
    return centres[None, :] + 0 * centres[:, None], centres[:, None] + 0 * centres[None, :]


def _soft(signed_mm: Array, width_mm: float = 0.5) -> Array:
    """1 where positive, 0 where negative, over an edge of some tenths of a mm."""
    return np.clip(0.5 + signed_mm / (2 * width_mm), 0, 1)


def _head(patient: Patient, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
    """Skin, fat, skull, brain, CSF.

    Returns:
      HU, the brain's share of each pixel, and depth below the inner table in mm; each float (256, 256).
    """
    level = np.sqrt(np.clip(1 - (z / patient.half_height_mm) ** 2, 0.05, 1))
    phi = np.arctan2(y, x)
    wave = patient.waves[:, 3]
    outline = (
        1 + 0.012 * np.cos(2 * phi + wave[0]) + 0.01 * np.cos(3 * phi + wave[1]) + 0.006 * np.cos(5 * phi + wave[2])
    )
    # A point's distance from the centre and the skin's distance in the same direction.
    radius = np.hypot(x, y)
    surface = (
        outline
        * level
        / np.sqrt((np.cos(phi) / patient.half_width_mm) ** 2 + (np.sin(phi) / patient.half_length_mm) ** 2)
    )
    below_skin = surface - radius
    scalp_mm = 5.5 + 1.2 * np.cos(phi + wave[3]) + 0.6 * np.cos(2 * phi + wave[4])
    skull_mm = patient.skull_mm * (1 + 0.15 * np.cos(2 * phi + wave[5])) / level**0.5
    below_bone = below_skin - scalp_mm
    depth = below_bone - skull_mm

    hu = np.full_like(x, AIR_HU)
    hu += (SKIN_HU - AIR_HU) * _soft(below_skin)
    hu += (FAT_HU - SKIN_HU) * _soft(below_skin - 1.8) * _soft(scalp_mm - 0.8 - below_skin + 0.4)
    bone = _soft(below_bone) * _soft(-depth)
    table = np.maximum(np.exp(-((below_bone - 1.0) ** 2) / 1.6), np.exp(-((depth + 1.0) ** 2) / 1.6))
    hu += bone * (patient.diploe_hu + (patient.table_hu - patient.diploe_hu) * table - hu)
    brain = _soft(depth)
    tissue = _brain(patient, x, y, z, phi, depth)
    hu += brain * (tissue - hu)
    return hu.astype(np.float32), brain.astype(np.float32), np.clip(depth, 0, None).astype(np.float32)


def _brain(patient: Patient, x: Array, y: Array, z: Array, phi: Array, depth: Array) -> Array:
    """HU of the inside of the skull: cortex, white matter, deep nuclei, ventricles, sulci, falx."""
    wave = patient.waves[:, 3]
    fold = np.sin(17 * phi + 2.2 * np.sin(3 * phi + wave[6]) + wave[7] + 0.05 * z)
    cortex_mm = 4.5 + 5.0 * (fold > 0.1) * np.abs(fold)
    tissue = WHITE_HU + (GREY_HU - WHITE_HU) * _soft(cortex_mm - depth, 1.0)
    for side in (-1, 1):
        nuclei = 1 - np.hypot((x - 22 * side) / 11, (y + 2) / 17)
        tissue += (GREY_HU - 1 - tissue) * _soft(8 * nuclei, 1.5) * (np.abs(z - 5) < 25)
        wide = 5.5 * patient.atrophy
        horn = 1 - np.hypot((x - side * (6 + 0.18 * np.abs(y))) / wide, (y - 2) / 33)
        tissue += (CSF_HU - tissue) * _soft(5 * horn, 0.6) * (z > -2)
    third = 1 - np.hypot(x / (2.2 * patient.atrophy), (y - 4) / 12)
    tissue += (CSF_HU - tissue) * _soft(3 * third, 0.6) * (z <= 6)
    sulcus = (np.abs(fold + 0.75) < 0.16 * patient.atrophy) & (depth < 6 + 7 * patient.atrophy)
    rim = depth < 0.9 * patient.atrophy
    tissue = np.where(sulcus | rim, tissue + 0.75 * (CSF_HU - tissue), tissue)
    falx = (np.abs(x) < 0.9) & (depth < 42) & (np.abs(y) > 20)
    return np.where(falx, 46.0, tissue)


def _waves(patient: Patient, points: tuple[Array, Array, Array], first: int, count: int, scale: float) -> Array:
    """Sum of random waves over the hematoma's coordinates, standard deviation about 1."""
    total = np.zeros_like(points[0])
    for kx, ky, kz, phase, _ in patient.waves[first : first + count]:
        total += np.cos(scale * (kx * points[0] + ky * points[1] + kz * points[2]) + phase)
    return total * np.sqrt(2 / count)


def _hematoma(
    patient: Patient, scanner: Scanner, hu: Array, x: Array, y: Array, z: Array
) -> tuple[Array, Array, Array]:
    """Put the hematoma into the slice, averaged over the slice's thickness.

    Returns:
      HU, the hematoma's share of each pixel, the hypodensity's share of each pixel; float (256, 256).
    """
    cx, cy, _ = patient.lesion_centre_mm
    margin = 1.5 * max(patient.lesion_radii_mm) + 10
    box = (np.abs(x - cx) < margin) & (np.abs(y - cy) < margin)
    rows, columns = np.nonzero(box.any(axis=1))[0], np.nonzero(box.any(axis=0))[0]
    clot_YX, dark_YX = np.zeros_like(hu), np.zeros_like(hu)
    if not len(rows) or not len(columns):
        return hu, clot_YX, dark_YX
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    offsets = (np.arange(_SUBPLANES) + 0.5) / _SUBPLANES - 0.5
    parts = [
        _hematoma_plane(patient, hu[window], x[window], y[window], z[window] + o * scanner.thickness_mm)
        for o in offsets
    ]
    value, clot, dark = (np.mean(part, axis=0) for part in zip(*parts, strict=True))
    hu[window], clot_YX[window], dark_YX[window] = value, clot, dark
    return hu, clot_YX, dark_YX


def _hematoma_plane(patient: Patient, hu: Array, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
    """The hematoma in one plane without thickness; arguments and results as in _hematoma."""
    cx, cy, cz = patient.lesion_centre_mm
    cos, sin = np.cos(patient.lesion_angle), np.sin(patient.lesion_angle)
    rx, ry, rz = patient.lesion_radii_mm
    points = (
        ((cos * (x - cx) + sin * (y - cy)) / rx).astype(np.float32),
        ((-sin * (x - cx) + cos * (y - cy)) / ry).astype(np.float32),
        ((z - cz) / rz).astype(np.float32) + np.zeros_like(hu),
    )
    size = np.float32((rx * ry) ** 0.5)
    radius = np.sqrt(points[0] ** 2 + points[1] ** 2 + points[2] ** 2)
    inside_mm = (1 + 0.1 * _waves(patient, points, 0, 8, 1.0) - radius) * size
    in_brain = _soft(hu + 20, 10) * _soft(150 - hu, 20)
    clot = _soft(inside_mm) * in_brain

    value = patient.lesion_hu + 3.5 * _waves(patient, points, 8, 16, 1.6)
    value -= 10 * np.exp(-np.clip(inside_mm, 0, None) / 2.5)
    dark = np.zeros_like(hu)
    for blob in patient.hypodensities:
        dark = np.maximum(dark, _soft(_blob_mm(blob, points, size), 0.9))
    dark *= _soft(inside_mm - 2.5)
    sign = np.zeros_like(hu)
    if patient.sign == "notch":
        sign = _soft(_blob_mm(patient.notch, points, size), 0.9)
    elif patient.sign == "blend":
        sign = _soft((points[0] * patient.plane[0] + points[1] * patient.plane[1] - 0.1) * size)
    elif patient.sign == "fluid-level":
        sign = _soft(cy + 0.1 * size - y)
    value -= patient.drop_hu * np.maximum(dark, sign)

    edema = _soft(inside_mm + patient.edema_mm, 2.0) * in_brain * (hu > 15)
    hu = hu + edema * (patient.edema_hu - hu)
    return hu + clot * (value - hu), clot, dark * clot


def _blob_mm(blob: Blob, points: tuple[Array, Array, Array], size_mm: float) -> Array:
    """Signed distance to a blob's surface in mm, positive inside, approximate."""
    scaled = [(p - c) / r for p, c, r in zip(points, blob.centre, blob.radii, strict=True)]
    return (1 - np.sqrt(sum(s**2 for s in scaled))) * size_mm * min(blob.radii[:2])


def _add_holder(hu: Array, patient: Patient, holder_hu: float, x: Array, y: Array) -> Array:
    """A U-shaped head holder behind the head."""
    distance = np.hypot(x / 1.0, y - 15) - (patient.half_length_mm + 6)
    shell = _soft(1.6 - np.abs(distance), 0.6) * (y > 40)
    return hu + shell * (holder_hu - AIR_HU) * (hu < -500)


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
