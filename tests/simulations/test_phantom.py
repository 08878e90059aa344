"""The phantom against shared/PHANTOM.md: numbers measured on rendered slices, averaged over patients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import ndimage

from simulations.patient import SIGNS, Cohort, Patient, sample_patient
from simulations.phantom import MATRIX, POSITIVE_AREA_MM2, SUSPECT_AREA_MM2, Scanner, Slice, render_slice

SCANNER = Scanner()
STEP_MM = SCANNER.field_of_view_mm / MATRIX
PATIENTS = 8
CLEAN = replace(SCANNER, noise_hu=0.0, blur_mm=0.02, holder_hu=0.0)


def patients(count: int, cohort: Cohort, seed: int = 0) -> list[Patient]:
    rng = np.random.default_rng(seed)
    return [sample_patient(rng, cohort) for _ in range(count)]


def middle_slice(patient: Patient, scanner: Scanner = SCANNER, noise_seed: int = 0) -> Slice:
    return render_slice(patient, scanner, patient.lesion_centre_mm[2], np.random.default_rng(noise_seed))


def millimetres() -> tuple[np.ndarray, np.ndarray]:
    """x (1, 512) and y (512, 1) of the pixels' centres."""
    centres = (np.arange(MATRIX) + 0.5) * STEP_MM - SCANNER.field_of_view_mm / 2
    return centres[None, :], centres[:, None]


@dataclass(frozen=True)
class Measured:
    """One number per patient, in HU where nothing else is said."""

    air: list[float]
    air_sd: list[float]
    skull_median: list[float]
    skull_p95: list[float]
    skull_max: list[float]
    cortex: list[float]
    depth: list[float]
    white: list[float]
    grey: list[float]
    csf: list[float]
    noise_sd: list[float]
    lag: list[list[float]]
    edge_px: list[float]
    width_mm: list[float]
    length_mm: list[float]
    lesion: list[float]
    lesion_sd: list[float]
    contrast: list[float]
    area_px: list[float]


def largest(mask_YX: np.ndarray) -> np.ndarray:
    regions, _ = ndimage.label(mask_YX)
    return regions == 1 + np.argmax(np.bincount(regions.ravel())[1:])


def edge_width_px(hu_YX: np.ndarray, patient: Patient) -> float:
    """Median 10-90 % width of the skin's edge over rays through the front half, away from the holder."""
    distance_px = np.arange(110, 55, -0.05) / STEP_MM  # from the air inwards
    widths = []
    for angle in np.deg2rad(np.arange(190, 350, 10)):
        x = patient.pose[1] / STEP_MM + MATRIX / 2 - 0.5 + distance_px * np.cos(angle)
        y = patient.pose[2] / STEP_MM + MATRIX / 2 - 0.5 + distance_px * np.sin(angle)
        profile = ndimage.map_coordinates(hu_YX, [y, x], order=1, mode="nearest")
        place = int(np.argmax(profile > -500))
        top = profile[place : place + 60].max()
        low, high = (-1000 + share * (top + 1000) for share in (0.1, 0.9))
        widths.append((np.argmax(profile > high) - np.argmax(profile > low)) * 0.05 / STEP_MM)
    return float(np.median(widths))


@pytest.fixture(scope="module")
def measured() -> Measured:
    values = Measured(*([] for _ in Measured.__dataclass_fields__))
    x_YX, y_YX = millimetres()
    for patient in patients(PATIENTS, Cohort()):
        first, second = middle_slice(patient, noise_seed=1), middle_slice(patient, noise_seed=2)
        hu_YX, clot_YX = first.hu_YX.astype(float), first.hematoma_YX
        angle, shift_x, shift_y = patient.pose
        head_x = np.cos(angle) * (x_YX - shift_x) + np.sin(angle) * (y_YX - shift_y)
        head_y = -np.sin(angle) * (x_YX - shift_x) + np.cos(angle) * (y_YX - shift_y)
        bone_YX = ndimage.gaussian_filter(hu_YX, 1) > 250
        bone_YX &= np.hypot(x_YX, y_YX) < 105
        inner_YX = largest(ndimage.binary_fill_holes(bone_YX) & ~bone_YX)
        depth_YX = ndimage.distance_transform_edt(inner_YX) * STEP_MM
        healthy_YX = ~ndimage.binary_dilation(clot_YX, iterations=30)

        corner = hu_YX[:24, :24]  # above the face, away from holder and table
        values.air.append(corner.mean())
        values.air_sd.append(corner.std())
        values.skull_median.append(np.median(hu_YX[bone_YX]))
        values.skull_p95.append(np.percentile(hu_YX[bone_YX], 95))
        values.skull_max.append(hu_YX[bone_YX].max())
        values.cortex.append(np.median(hu_YX[healthy_YX & (depth_YX > 2) & (depth_YX < 5)]))
        values.depth.append(np.median(hu_YX[healthy_YX & (depth_YX > 30)]))
        smooth_YX = ndimage.gaussian_filter(hu_YX, 2)
        values.white.append(np.median(hu_YX[healthy_YX & (depth_YX > 14) & (smooth_YX > 24) & (smooth_YX < 31)]))
        nuclei_YX = ((np.abs(head_x) - 22) / 6) ** 2 + ((head_y + 2) / 9) ** 2 < 1
        if (healthy_YX & nuclei_YX).sum() > 50:
            values.grey.append(np.median(hu_YX[healthy_YX & nuclei_YX]))
        ventricle_YX = healthy_YX & (depth_YX > 15) & (smooth_YX < 9)
        if ventricle_YX.sum() > 50:
            values.csf.append(np.median(hu_YX[ventricle_YX]))
        # Two exposures of one head differ by noise alone.
        noise_YX = (first.hu_YX.astype(float) - second.hu_YX) / 2**0.5
        patches = [noise_YX[y : y + 24, x : x + 24] for y in range(100, 400, 24) for x in range(100, 400, 24)]
        patches = [patch - patch.mean() for patch in patches]
        power = np.mean([(p * p).mean() for p in patches])
        values.noise_sd.append(np.mean([p.std() for p in patches]))
        values.lag.append([np.mean([(p[:, k:] * p[:, :-k]).mean() for p in patches]) / power for k in (1, 2, 3)])
        values.edge_px.append(edge_width_px(hu_YX, patient))
        columns, rows = (np.nonzero(ndimage.binary_opening(hu_YX > -300, iterations=5).any(axis=a))[0] for a in (0, 1))
        values.width_mm.append((columns[-1] - columns[0]) * STEP_MM)
        values.length_mm.append((rows[-1] - rows[0]) * STEP_MM)
        values.lesion.append(hu_YX[clot_YX].mean())
        values.lesion_sd.append(hu_YX[ndimage.binary_erosion(clot_YX, iterations=2)].std())
        ring_YX = ndimage.binary_dilation(clot_YX, iterations=14) & ~ndimage.binary_dilation(clot_YX, iterations=4)
        values.contrast.append(hu_YX[clot_YX].mean() - hu_YX[ring_YX & (depth_YX > 2)].mean())
        values.area_px.append(clot_YX.sum())
    return values


@pytest.mark.parametrize(
    ("quantity", "low", "high"),
    [
        ("air", -1003, -965),
        ("air_sd", 6, 9),
        ("skull_median", 600, 1100),
        ("skull_p95", 1050, 1600),
        ("skull_max", 1300, 1760),
        ("cortex", 37, 47),
        ("depth", 26, 34),
        ("white", 26, 30),
        ("grey", 33, 40),
        ("csf", 2, 8),
        ("noise_sd", 2.3, 3.4),
        ("edge_px", 3, 4.5),
        ("width_mm", 134, 180),
        ("length_mm", 159, 199),
        ("lesion", 42, 68),
        ("contrast", 14, 35),
        ("area_px", 464, 11093),
    ],
)
def test_a_measured_quantity_lies_in_the_real_range(measured: Measured, quantity: str, low: float, high: float) -> None:
    values = getattr(measured, quantity)
    assert len(values) >= 3
    assert low <= np.mean(values) <= high


def test_white_and_grey_matter_differ_as_in_a_real_brain(measured: Measured) -> None:
    assert 7 <= np.mean(measured.grey) - np.mean(measured.white) <= 10


def test_the_lesions_spread_is_near_8_hu(measured: Measured) -> None:
    assert 5 <= np.mean(measured.lesion_sd) <= 11


def test_noise_is_correlated_as_a_real_kernel_leaves_it(measured: Measured) -> None:
    first, second, third = np.mean(measured.lag, axis=0)
    assert 0.47 <= first <= 0.74
    assert -0.05 <= second <= 0.36
    assert -0.25 <= third <= 0


def test_median_area_of_the_lesion_over_a_series(measured: Measured) -> None:
    """PHANTOM.md: median 1,937 px, 464 to 11,093; here within a factor of 2 over a series of six slices."""
    areas = []
    for patient in patients(PATIENTS, Cohort()):
        for place in range(6):
            z_mm = patient.lesion_centre_mm[2] + (place - 2.5) * SCANNER.spacing_mm
            areas.append(render_slice(patient, SCANNER, z_mm, np.random.default_rng(0)).hematoma_YX.sum())
    areas = [area for area in areas if area]
    assert 1937 / 2 <= np.median(areas) <= 1937 * 2


@pytest.mark.parametrize("noise_hu", [1.8, 4.4])
def test_the_scanners_noise_is_the_one_declared(noise_hu: float) -> None:
    (patient,) = patients(1, Cohort())
    pair = [middle_slice(patient, replace(SCANNER, noise_hu=noise_hu), seed).hu_YX.astype(float) for seed in (1, 2)]
    tissue = np.minimum(*pair) > -500  # in air the noise is higher
    # Rounding to whole HU adds a variance of 1 / 12.
    assert (pair[0] - pair[1])[tissue].std() / 2**0.5 == pytest.approx((noise_hu**2 + 1 / 12) ** 0.5, rel=0.02)


def test_padding_lies_outside_the_circle_and_nowhere_else() -> None:
    (patient,) = patients(1, Cohort())
    hu_YX = middle_slice(patient, replace(SCANNER, padding_hu=-2000)).hu_YX
    radius_px = np.hypot(*np.meshgrid(*[np.arange(MATRIX) + 0.5 - MATRIX / 2] * 2))
    assert (hu_YX[radius_px > MATRIX / 2 + 2] == -2000).all()
    assert hu_YX[radius_px < MATRIX / 2 - 2].min() > -1200


def test_same_seed_same_patient_and_slice() -> None:
    (one,), (same,), (other,) = (patients(1, Cohort(), seed) for seed in (3, 3, 4))
    assert (one.lesion_centre_mm, one.hypodensities, one.sign) == (same.lesion_centre_mm, same.hypodensities, same.sign)
    np.testing.assert_array_equal(one.waves, same.waves)
    assert one.lesion_centre_mm != other.lesion_centre_mm
    np.testing.assert_array_equal(middle_slice(one).hu_YX, middle_slice(same).hu_YX)
    assert (middle_slice(one).hu_YX != middle_slice(one, noise_seed=9).hu_YX).any()


def test_prevalence_is_the_share_of_patients_with_the_marker() -> None:
    assert all(not p.hypodensities for p in patients(30, Cohort(prevalence=0.0)))
    assert all(p.hypodensities and p.sign == "plain" for p in patients(30, Cohort(prevalence=1.0)))
    share = np.mean([bool(p.hypodensities) for p in patients(400, Cohort(prevalence=0.3))])
    assert share == pytest.approx(0.3, abs=0.08)  # 3.5 standard errors


def test_hypodensities_lie_strictly_inside_the_hematoma() -> None:
    pixel_mm = CLEAN.field_of_view_mm / MATRIX
    seen = 0
    for patient in patients(12, Cohort(prevalence=1.0), seed=5):
        for offset_mm in (-5.0, 0.0, 5.0):
            z_mm = patient.lesion_centre_mm[2] + offset_mm
            with_marker = render_slice(patient, CLEAN, z_mm, np.random.default_rng(0))
            without = render_slice(replace(patient, hypodensities=()), CLEAN, z_mm, np.random.default_rng(0))
            np.testing.assert_array_equal(with_marker.hematoma_YX, without.hematoma_YX)
            assert without.hypodensity_mm2 == 0
            dark_YX = without.hu_YX.astype(float) - with_marker.hu_YX > patient.drop_hu / 2
            area_mm2 = dark_YX.sum() * pixel_mm**2
            assert with_marker.hypodensity_mm2 == pytest.approx(area_mm2, rel=0.15, abs=3)
            if dark_YX.any():
                seen += 1
                depth_mm = ndimage.distance_transform_edt(with_marker.hematoma_YX) * pixel_mm
                assert depth_mm[dark_YX].min() > 1.5
    assert seen > 12


@pytest.mark.parametrize("sign", SIGNS)
def test_a_negative_patient_has_no_hypodensity_whatever_sign_it_shows(sign: str) -> None:
    for patient in patients(2, Cohort(prevalence=0.0)):
        rendered = middle_slice(replace(patient, sign=sign))
        assert rendered.hypodensity_mm2 == 0
        assert rendered.label == 0


@pytest.mark.parametrize("sign", [s for s in SIGNS if s != "plain"])
def test_a_sign_darkens_part_of_the_hematoma(sign: str) -> None:
    patient = replace(patients(1, Cohort(prevalence=0.0))[0], sign="plain")
    plain, signed = middle_slice(patient, CLEAN), middle_slice(replace(patient, sign=sign), CLEAN)
    darker_YX = plain.hu_YX.astype(float) - signed.hu_YX > patient.drop_hu / 2
    assert 0 < darker_YX.sum() < plain.hematoma_YX.sum()


@pytest.mark.parametrize(
    ("area_mm2", "label"),
    [
        (0.0, 0),
        (SUSPECT_AREA_MM2 - 0.01, 0),
        (SUSPECT_AREA_MM2, None),
        (POSITIVE_AREA_MM2 - 0.01, None),
        (POSITIVE_AREA_MM2, 1),
        (300.0, 1),
    ],
)
def test_the_label_follows_the_areas(area_mm2: float, label: int | None) -> None:
    hu_YX, clot_YX = np.zeros((4, 4), np.int16), np.eye(4, dtype=bool)
    assert Slice(hu_YX, clot_YX, area_mm2).label == label
    assert Slice(hu_YX, np.zeros_like(clot_YX), area_mm2).label is None
    assert (SUSPECT_AREA_MM2, POSITIVE_AREA_MM2) == (3.0, 30.0)


def test_far_from_the_hematoma_there_is_none() -> None:
    (patient,) = patients(1, Cohort(prevalence=1.0))
    rendered = render_slice(patient, SCANNER, patient.lesion_centre_mm[2] - 60, np.random.default_rng(0))
    assert not rendered.hematoma_YX.any()
    assert (rendered.hypodensity_mm2, rendered.label) == (0.0, None)
