from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from simulations.phantom.patient import SIGNS, Cohort, Patient, sample_patient
from simulations.phantom.render import MATRIX, POSITIVE_AREA_MM2, SUSPECT_AREA_MM2, Scanner, Slice, render_slice

SCANNER = Scanner()
CLEAN = replace(SCANNER, dose=math.inf, sharpness=10.0, holder_hu=0.0)  # no noise, hardly a blur


def patients(count: int, cohort: Cohort, seed: int = 0) -> list[Patient]:
    rng = np.random.default_rng(seed)
    return [sample_patient(rng, cohort) for _ in range(count)]


def middle_slice(patient: Patient, scanner: Scanner = SCANNER, noise_seed: int = 0) -> Slice:
    return render_slice(patient, scanner, patient.lesion_centre_mm[2], np.random.default_rng(noise_seed))


@pytest.mark.parametrize("noise_hu", [1.8, 4.4])
def test_the_scanners_noise_is_the_one_declared(noise_hu: float) -> None:
    (patient,) = patients(1, Cohort())
    scanner = replace(SCANNER, dose=(SCANNER.noise_hu / noise_hu) ** 2)
    assert scanner.noise_hu == pytest.approx(noise_hu)
    pair = [middle_slice(patient, scanner, seed).hu_YX.astype(float) for seed in (1, 2)]
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
