"""The phantom beside real head CT: the same quantities measured on its slices, each with the range found on real scans.

The ranges were measured on real non-contrast head CT of several vendors and on 26 real hemorrhage slices with masks by
radiologists. Quantities of one scanner (tissue, head, lesion) are compared with the standard scanner; noise and edges, which
differ from scanner to scanner, against each kernel.

Shape suffixes: Y row, X column, F frequency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from scipy import fft, ndimage

from simulations.heads.anatomy import draw, to_template
from simulations.heads.scan import Patient
from simulations.heads.scanner import MATRIX, Scanner
from simulations.heads.template import load_template
from simulations.phantom.patient import Case, Cohort, sample_case
from simulations.phantom.render import render_slice

Picture = NDArray[np.float64]
PATCH_PX = 24  # side of the uniform patches that noise is measured in
_PATCH_STARTS = range(128, 384, PATCH_PX)
_PADDED_PX = 128  # a patch's spectrum is read on this finer grid
_LOWEST_MM = 5.0  # of the slices, from the centre of the head
_SERIES = 6  # slices of a series, for the lesion's area


@dataclass(frozen=True)
class Quantity:
    """One measured quantity.

    Attributes:
      name: what.
      unit: of value and range.
      low, high: range on real scans.
      kernel: whether every kernel must lie in the range, not the standard one alone.
    """

    name: str
    unit: str
    low: float
    high: float
    kernel: bool = False


QUANTITIES = (
    Quantity("air", "HU", -1003, -965),
    Quantity("air SD", "HU", 6, 9),
    Quantity("scalp fat", "HU", -105, -58),
    Quantity("skull median", "HU", 600, 1100),
    Quantity("skull 95th percentile", "HU", 1050, 1600),
    Quantity("skull maximum", "HU", 1300, 1760),
    Quantity("skull thickness", "mm", 4, 9),
    Quantity("white matter", "HU", 26, 30),
    Quantity("grey matter", "HU", 33, 40),
    Quantity("grey minus white", "HU", 7, 10),
    Quantity("2 to 5 mm below the table", "HU", 37, 47),
    Quantity("beyond 30 mm", "HU", 26, 34),
    Quantity("CSF", "HU", 2, 8),
    Quantity("noise SD", "HU", 1.8, 4.4, kernel=True),
    Quantity("autocorrelation, lag 1 px", "", 0.47, 0.74, kernel=True),
    Quantity("autocorrelation, lag 2 px", "", -0.05, 0.36, kernel=True),
    Quantity("autocorrelation, lag 3 px", "", -0.25, 0.0, kernel=True),
    Quantity("noise power, peak", "1/mm", 0.15, 0.25),  # "near 0.2"; the range is a reading of it
    Quantity("noise power, half", "1/mm", 0.2, 0.37, kernel=True),
    Quantity("noise power, mean", "1/mm", 0.31, 0.47, kernel=True),
    Quantity("skin edge, 10 to 90 %", "px", 3, 4.5, kernel=True),
    Quantity("head width", "mm", 134, 180),
    Quantity("head length", "mm", 159, 199),
    Quantity("lesion", "HU", 42, 68),
    Quantity("lesion SD", "HU", 5, 11),
    Quantity("lesion contrast", "HU", 14, 35),
    Quantity("lesion area, median of a series", "px", 1937 / 2, 1937 * 2),
)


def measure(scanner: Scanner, cohort: Cohort, patients: int, seed: int) -> dict[str, list[float]]:
    """Measure the quantities on slices through the middle of patients' hematomas.

    Args:
      scanner, cohort: what is drawn.
      patients: how many.
      seed: draws them.
    Returns:
      Name of each of QUANTITIES -> one value per patient in whom it can be measured.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {quantity.name: [] for quantity in QUANTITIES}
    for number, case in enumerate(_with_hematoma(rng, cohort, patients)):
        for name, value in _measure_case(case, scanner, (seed, number)).items():
            if np.isfinite(value):
                values[name].append(float(value))
    return values


def _with_hematoma(rng: np.random.Generator, cohort: Cohort, count: int) -> list[Case]:
    """Patients who bled into a hemisphere, above the orbits, where the skull is one closed ring."""
    cases: list[Case] = []
    while len(cases) < count:
        case = sample_case(rng, cohort)
        bled = case.hematoma is not None and case.hematoma.kind in ("deep", "lobar")
        if bled and case.lesion_centre_mm()[2] > _LOWEST_MM:
            cases.append(case)
    return cases


def _measure_case(case: Case, scanner: Scanner, seed: tuple[int, int]) -> dict[str, float]:
    """All quantities of one patient; NaN where there is too little of the tissue."""
    patient = case.patient
    z_mm, step_mm = case.lesion_centre_mm()[2], scanner.field_of_view_mm / MATRIX
    first, second = (
        render_slice(patient, scanner, z_mm, np.random.default_rng((*seed, exposure))) for exposure in (1, 2)
    )
    hu_YX, clot_YX = first.hu_YX.astype(float), first.hematoma_YX
    noise_YX = (hu_YX - second.hu_YX) / 2**0.5  # two exposures of one head differ by noise alone
    _, inner_YX = _inside_skull(hu_YX, step_mm)
    windows = [np.s_[y : y + PATCH_PX, x : x + PATCH_PX] for y in _PATCH_STARTS for x in _PATCH_STARTS]
    patches = [noise_YX[window] for window in windows if inner_YX[window].all()]  # air is noisier than tissue
    lags, power = autocorrelation(patches), spectrum(patches, step_mm)
    areas = []
    for place in range(_SERIES):
        height_mm = z_mm + (place - (_SERIES - 1) / 2) * scanner.spacing_mm
        areas.append(render_slice(patient, scanner, height_mm, np.random.default_rng(place)).hematoma_YX.sum())
    return {
        **_tissue(hu_YX, clot_YX, _matter(patient, z_mm, step_mm), step_mm),
        "noise SD": float(np.mean([patch.std() for patch in patches])),
        **{f"autocorrelation, lag {lag} px": lags[lag - 1] for lag in (1, 2, 3)},
        "noise power, peak": peak_frequency(*power),
        "noise power, half": half_power(*power),
        "noise power, mean": mean_frequency(*power),
        "skin edge, 10 to 90 %": edge_width_px(hu_YX, patient, step_mm),
        **_lesion(hu_YX, clot_YX, step_mm),
        "lesion area, median of a series": float(np.median([area for area in areas if area])),
    }


def _places(step_mm: float) -> tuple[Picture, Picture]:
    """x (1, X) and y (Y, 1) of the pixels' centres in mm."""
    centres = (np.arange(MATRIX) + 0.5 - MATRIX / 2) * step_mm
    return centres[None, :], centres[:, None]


def _inside_skull(hu_YX: Picture, step_mm: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Bone, and what it encloses."""
    x_YX, y_YX = _places(step_mm)
    bone_YX = (ndimage.gaussian_filter(hu_YX, 1) > 250) & (np.hypot(x_YX, y_YX) < 120)
    regions_YX, _ = ndimage.label(ndimage.binary_fill_holes(bone_YX) & ~bone_YX)
    return bone_YX, regions_YX == 1 + np.argmax(np.bincount(regions_YX.ravel())[1:])


def _matter(patient: Patient, z_mm: float, step_mm: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the template, as it lies in this head, is grey or white through and through; each bool (512, 512).

    Read off the head without bleedings in a plane without thickness: its grey is drawn as 100, its white as 200 HU.
    """
    x_YX, y_YX = (torch.from_numpy(np.float32(one)).expand(MATRIX, MATRIX) for one in _places(step_mm))
    marked = replace(patient.head, grey=100.0, white=200.0, rarefaction=0.0, calcium=(), scars=(), drain=None)
    points = to_template(marked, x_YX, y_YX, torch.full((MATRIX, MATRIX), z_mm))
    plane = draw(marked, load_template(), points)
    inside_YX = (plane.depth > 4).numpy()
    hu_YX = plane.hu.numpy()
    return (
        inside_YX & (np.abs(hu_YX - 100) < 8),
        inside_YX & (np.abs(hu_YX - 200) < 8),
    )


def _tissue(
    hu_YX: Picture,
    clot_YX: NDArray[np.bool_],
    matter: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    step_mm: float,
) -> dict[str, float]:
    """Air, scalp, skull, brain and the head's size."""
    bone_YX, inner_YX = _inside_skull(hu_YX, step_mm)
    depth_YX = ndimage.distance_transform_edt(inner_YX) * step_mm
    healthy_YX = ~ndimage.binary_dilation(clot_YX, iterations=30)
    smooth_YX = ndimage.gaussian_filter(hu_YX, 2)
    grey_YX, white_YX = (ndimage.binary_erosion(one, iterations=1) for one in matter)
    corner_YX = hu_YX[:PATCH_PX, :PATCH_PX]  # above the face, away from holder and table

    def median(region_YX: NDArray[np.bool_]) -> float:
        return float(np.median(hu_YX[region_YX])) if region_YX.sum() > 50 else np.nan

    def mean(region_YX: NDArray[np.bool_]) -> float:  # a median of whole HU is too coarse for a difference of 7 HU
        return float(hu_YX[region_YX].mean()) if region_YX.sum() > 50 else np.nan

    # The scalp: between the skull's outer surface and the skin, away from both edges.
    shell_YX = (
        ndimage.binary_dilation(ndimage.binary_fill_holes(bone_YX), iterations=8) & (hu_YX < -30) & (hu_YX > -150)
    )
    white, grey = mean(healthy_YX & white_YX & (depth_YX > 14)), mean(healthy_YX & grey_YX & (depth_YX > 14))
    head_YX = ndimage.binary_opening(hu_YX > -300, iterations=5)
    columns, rows = (np.nonzero(head_YX.any(axis=axis))[0] for axis in (0, 1))
    inner_edge_YX = inner_YX ^ ndimage.binary_erosion(inner_YX)
    outside_mm = ndimage.distance_transform_edt(ndimage.binary_fill_holes(bone_YX)) * step_mm
    return {
        "air": float(corner_YX.mean()),
        "air SD": float(corner_YX.std()),
        "scalp fat": float(np.percentile(hu_YX[shell_YX], 20)) if shell_YX.sum() > 50 else np.nan,
        "skull median": float(np.median(hu_YX[bone_YX])),
        "skull 95th percentile": float(np.percentile(hu_YX[bone_YX], 95)),
        "skull maximum": float(hu_YX[bone_YX].max()),
        "skull thickness": float(np.median(outside_mm[inner_edge_YX])),
        "white matter": white,
        "grey matter": grey,
        "grey minus white": grey - white,
        "2 to 5 mm below the table": median(healthy_YX & (depth_YX > 2) & (depth_YX < 5)),
        "beyond 30 mm": median(healthy_YX & (depth_YX > 30)),
        "CSF": median(healthy_YX & (depth_YX > 15) & (smooth_YX < 9)),
        "head width": float((columns[-1] - columns[0]) * step_mm),
        "head length": float((rows[-1] - rows[0]) * step_mm),
    }


def _lesion(hu_YX: Picture, clot_YX: NDArray[np.bool_], step_mm: float) -> dict[str, float]:
    """Mean, spread and contrast of the hematoma."""
    _, inner_YX = _inside_skull(hu_YX, step_mm)
    depth_YX = ndimage.distance_transform_edt(inner_YX) * step_mm
    ring_YX = ndimage.binary_dilation(clot_YX, iterations=14) & ~ndimage.binary_dilation(clot_YX, iterations=4)
    return {
        "lesion": float(hu_YX[clot_YX].mean()),
        "lesion SD": float(hu_YX[ndimage.binary_erosion(clot_YX, iterations=2)].std()),
        "lesion contrast": float(hu_YX[clot_YX].mean() - hu_YX[ring_YX & (depth_YX > 2)].mean()),
    }


def autocorrelation(patches: list[Picture], most: int = 3) -> list[float]:
    """Autocorrelation of noise along rows, at lags of 1 to `most` px; 1 at lag 0."""
    centred = [patch - patch.mean() for patch in patches]
    power = np.mean([(p * p).mean() for p in centred])
    return [float(np.mean([(p[:, k:] * p[:, :-k]).mean() for p in centred]) / power) for k in range(1, most + 1)]


def spectrum(patches: list[Picture], step_mm: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Noise power over spatial frequency, averaged over patches and directions.

    Returns:
      Frequencies (F,) in 1/mm up to Nyquist, and power per unit of frequency space (F,), unitless.
    """
    power_YX = np.mean([np.abs(fft.fft2(p - p.mean(), s=(_PADDED_PX, _PADDED_PX))) ** 2 for p in patches], axis=0)
    frequency = fft.fftfreq(_PADDED_PX, step_mm)
    radius_YX = np.hypot(frequency[:, None], frequency[None, :])
    edges = np.linspace(0, 0.5 / step_mm, _PADDED_PX // 2 + 1)
    ring = np.digitize(radius_YX.ravel(), edges) - 1
    inside = ring < len(edges) - 1
    count = np.bincount(ring[inside], minlength=len(edges) - 1)
    total = np.bincount(ring[inside], weights=power_YX.ravel()[inside], minlength=len(edges) - 1)
    return (edges[1:] + edges[:-1]) / 2, total / np.maximum(count, 1)


def peak_frequency(frequency_F: NDArray[np.float64], power_F: NDArray[np.float64]) -> float:
    """Frequency of greatest power, 1/mm; smoothed over three rings, since the innermost hold few samples."""
    return float(frequency_F[np.argmax(np.convolve(power_F, [0.25, 0.5, 0.25], mode="same"))])


def half_power(frequency_F: NDArray[np.float64], power_F: NDArray[np.float64]) -> float:
    """The frequency below which half of the radially averaged power lies, 1/mm."""
    share = np.cumsum(power_F) / power_F.sum()
    return float(frequency_F[np.searchsorted(share, 0.5)])


def mean_frequency(frequency_F: NDArray[np.float64], power_F: NDArray[np.float64]) -> float:
    """The mean over the plane of frequencies, where a ring counts by its length, 1/mm."""
    return float((frequency_F**2 * power_F).sum() / (frequency_F * power_F).sum())


def edge_width_px(hu_YX: Picture, patient: Patient, step_mm: float) -> float:
    """Median 10 to 90 % width of the skin's edge over rays through the front half, away from the holder."""
    distance_px = np.arange(110, 55, -0.05) / step_mm  # from the air inwards
    widths = []
    for angle in np.deg2rad(np.arange(190, 350, 10)):
        x = patient.head.shift_mm[0] / step_mm + MATRIX / 2 - 0.5 + distance_px * np.cos(angle)
        y = patient.head.shift_mm[1] / step_mm + MATRIX / 2 - 0.5 + distance_px * np.sin(angle)
        profile = ndimage.map_coordinates(hu_YX, [y, x], order=1, mode="nearest")
        place = int(np.argmax(profile > -500))
        top = profile[place : place + 60].max()
        low, high = (-1000 + share * (top + 1000) for share in (0.1, 0.9))
        widths.append((np.argmax(profile > high) - np.argmax(profile > low)) * 0.05 / step_mm)
    return float(np.median(widths))


def physics_table(patients: int = 8, seed: int = 0, said: Callable[[str], None] = lambda line: None) -> Table:
    """Every quantity with its real range, for a smooth, the standard and a sharp kernel; what lies outside is marked."""
    kernels = {"smooth": -1.0, "standard": 0.0, "sharp": 1.0}
    measured = {}
    for name, sharpness in kernels.items():
        said(f"measuring the {name} kernel")
        measured[name] = measure(Scanner(sharpness=sharpness), Cohort(), patients, seed)
    page = Table("quantity", "unit", "real scans", *kernels)
    for quantity in QUANTITIES:
        cells = []
        for name in kernels:
            value = float(np.mean(measured[name][quantity.name]))
            counts = quantity.kernel or name == "standard"
            outside = counts and not quantity.low <= value <= quantity.high
            cells.append(f"{value:.3g}" + (" outside" if outside else ""))
        page.add_row(quantity.name, quantity.unit, f"{quantity.low:g} to {quantity.high:g}", *cells)
    return page
