from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from simulations.heads.bleeding import Sign
from simulations.heads.places import SIGNS
from simulations.heads.scan import POSITIVE_AREA_MM2, SUSPECT_AREA_MM2
from simulations.heads.scanner import MATRIX, Scanner
from simulations.phantom.patient import FEATURES, STYLES, Case, Cohort, sample_case
from simulations.phantom.render import (
    Slice,
    render_slice,
    with_feature,
)

SCANNER = Scanner()
CLEAN = replace(SCANNER, dose=math.inf, sharpness=10.0, holder_hu=0.0, thickness_mm=1.0)  # no noise, hardly a blur
BLEEDING = Cohort(healthy=0.0, others=0.0, lobar=0.5, disagreement=0.0)


def cases(count: int, cohort: Cohort, seed: int = 0) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [sample_case(rng, cohort) for _ in range(count)]


def hematoma_slice(
    case: Case, scanner: Scanner = SCANNER, noise_seed: int = 0, offset_mm: float = 0.0, cohort: Cohort = BLEEDING
) -> Slice:
    z_mm = case.lesion_centre_mm()[2] + offset_mm
    return render_slice(case.patient, scanner, z_mm, np.random.default_rng(noise_seed), cohort)


def with_sign(case: Case, sign: Sign) -> Case:
    bleedings = tuple(replace(one, sign=sign) if one is case.hematoma else one for one in case.patient.bleedings)
    return replace(case, patient=replace(case.patient, bleedings=bleedings))


@pytest.mark.parametrize("noise_hu", [1.8, 4.4])
def test_the_scanners_noise_is_the_one_declared(noise_hu: float) -> None:
    (case,) = cases(1, BLEEDING)
    scanner = replace(SCANNER, dose=(SCANNER.noise_hu / noise_hu) ** 2)
    assert scanner.noise_hu == pytest.approx(noise_hu)
    pair = [hematoma_slice(case, scanner, seed).hu_YX.astype(float) for seed in (1, 2)]
    tissue = np.minimum(*pair) > -500  # in air the noise is higher
    # Rounding to whole HU adds a variance of 1 / 12.
    assert (pair[0] - pair[1])[tissue].std() / 2**0.5 == pytest.approx((noise_hu**2 + 1 / 12) ** 0.5, rel=0.02)


def test_padding_lies_outside_the_circle_and_nowhere_else() -> None:
    (case,) = cases(1, BLEEDING)
    hu_YX = hematoma_slice(case, replace(SCANNER, padding_hu=-2000)).hu_YX
    radius_px = np.hypot(*np.meshgrid(*[np.arange(MATRIX) + 0.5 - MATRIX / 2] * 2))
    assert (hu_YX[radius_px > MATRIX / 2 + 2] == -2000).all()
    assert hu_YX[radius_px < MATRIX / 2 - 2].min() > -1200


def test_same_seed_same_patient_and_slice() -> None:
    (one,), (same,), (other,) = (cases(1, BLEEDING, seed) for seed in (3, 3, 4))
    assert one.lesion_centre_mm() == same.lesion_centre_mm()
    assert one.lesion_centre_mm() != other.lesion_centre_mm()
    np.testing.assert_array_equal(hematoma_slice(one).hu_YX, hematoma_slice(same).hu_YX)
    assert (hematoma_slice(one).hu_YX != hematoma_slice(one, noise_seed=9).hu_YX).any()


def test_a_cohort_has_the_shares_that_it_declares() -> None:
    assert not any(case.marker for case in cases(20, replace(BLEEDING, prevalence=0.0)))
    assert all(case.marker for case in cases(20, replace(BLEEDING, prevalence=1.0)))
    many = cases(200, Cohort(healthy=0.3, others=0.4, prevalence=0.5))
    bleeding = [case for case in many if case.patient.bleedings]
    brain = [case for case in bleeding if case.hematoma is not None]
    assert len(bleeding) / len(many) == pytest.approx(0.7, abs=0.12)  # 3.5 standard errors
    assert len(brain) / len(bleeding) == pytest.approx(0.6, abs=0.15)
    assert np.mean([case.marker for case in brain]) == pytest.approx(0.5, abs=0.2)


def test_the_lesions_centre_lies_in_the_lesion() -> None:
    for case in cases(4, replace(BLEEDING, prevalence=0.0, lookalikes=0.0), seed=2):
        x_mm, y_mm, _ = case.lesion_centre_mm()
        mask_YX = hematoma_slice(case).hematoma_YX
        rows, columns = ndimage.center_of_mass(mask_YX)
        step_mm = SCANNER.field_of_view_mm / MATRIX
        found = ((columns + 0.5 - MATRIX / 2) * step_mm, (rows + 0.5 - MATRIX / 2) * step_mm)
        assert math.dist(found, (x_mm, y_mm)) < 12  # the head is warped, and the outline irregular


def test_hypodensities_lie_strictly_inside_the_hematoma() -> None:
    pixel_mm = CLEAN.field_of_view_mm / MATRIX
    seen = 0
    for case in cases(8, replace(BLEEDING, prevalence=1.0), seed=5):
        # A calcified plexus that the blood has reached is no surface of the hematoma.
        bare = replace(case.patient, head=replace(case.patient.head, calcium=()))
        case = replace(case, patient=bare)
        for offset_mm in (-4.0, 0.0, 4.0):
            drop_hu = case.hematoma.sign.drop_hu
            marked = hematoma_slice(case, CLEAN, 0, offset_mm)
            plain = hematoma_slice(with_sign(case, Sign()), CLEAN, 0, offset_mm)
            np.testing.assert_array_equal(marked.hematoma_YX, plain.hematoma_YX)
            assert plain.hypodensity_mm2 == 0
            dark_YX = plain.hu_YX.astype(float) - marked.hu_YX > drop_hu / 2
            assert marked.hypodensity_mm2 == pytest.approx(dark_YX.sum() * pixel_mm**2, rel=0.2, abs=5)
            if dark_YX.any():
                seen += 1
                depth_mm = ndimage.distance_transform_edt(marked.hematoma_YX) * pixel_mm
                assert depth_mm[dark_YX].min() > 1.0
    assert seen > 8


@pytest.mark.parametrize("sign", SIGNS)
def test_a_negative_patient_has_no_hypodensity_whatever_sign_it_shows(sign: str) -> None:
    for case in cases(2, replace(BLEEDING, prevalence=0.0)):
        rendered = hematoma_slice(with_sign(case, replace(case.hematoma.sign, name=sign)))
        assert rendered.hypodensity_mm2 == 0
        assert rendered.label == 0


@pytest.mark.parametrize("sign", [s for s in SIGNS if s != "plain"])
def test_a_sign_darkens_part_of_the_hematoma(sign: str) -> None:
    (case,) = cases(1, replace(BLEEDING, prevalence=0.0))
    shown = replace(case.hematoma.sign, name=sign)
    plain, signed = (hematoma_slice(with_sign(case, one), CLEAN) for one in (Sign(), shown))
    darker_YX = plain.hu_YX.astype(float) - signed.hu_YX > shown.drop_hu / 2
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
    disputed = Slice(hu_YX, clot_YX, area_mm2, disputed=True).label
    assert disputed == (None if label is None else 1 - label)
    assert (SUSPECT_AREA_MM2, POSITIVE_AREA_MM2) == (3.0, 30.0)


def test_readers_differ_in_their_outlines_and_labels_and_in_nothing_else() -> None:
    (case,) = cases(1, BLEEDING, seed=1)
    exact, *others = (hematoma_slice(case, cohort=replace(BLEEDING, style=style)) for style in STYLES)
    sizes = {}
    for style, one in zip(STYLES[1:], others, strict=True):
        np.testing.assert_array_equal(one.hu_YX, exact.hu_YX)
        both = (one.hematoma_YX & exact.hematoma_YX).sum()
        assert 0.8 < 2 * both / (one.hematoma_YX.sum() + exact.hematoma_YX.sum()) < 1
        sizes[style] = int(one.hematoma_YX.sum())
    assert sizes["tight"] < exact.hematoma_YX.sum() < sizes["generous"]
    disputing = hematoma_slice(case, cohort=replace(BLEEDING, disagreement=1.0))
    assert disputing.disputed
    assert not exact.disputed


@pytest.mark.parametrize("feature", FEATURES)
def test_a_planted_feature_changes_the_picture_beside_the_hematoma(feature: str) -> None:
    (case,) = cases(1, replace(BLEEDING, feature=feature), seed=4)
    z_mm = case.lesion_centre_mm()[2]
    on, off = (
        render_slice(*with_feature(replace(case, feature_on=shown), CLEAN), z_mm, np.random.default_rng(0))
        for shown in (True, False)
    )
    assert (np.abs(on.hu_YX.astype(float) - off.hu_YX) > 50).sum() > 200


def test_a_feature_goes_with_the_marker_as_strongly_as_declared() -> None:
    cohort = replace(BLEEDING, prevalence=0.5, feature="skull", rho=1.0)
    assert all(case.feature_on == case.marker for case in cases(20, cohort))
    assert all(case.feature_on != case.marker for case in cases(20, replace(cohort, rho=-1.0)))


def test_far_from_the_hematoma_there_is_none_and_no_label() -> None:
    (case,) = cases(1, replace(BLEEDING, prevalence=1.0))
    rendered = hematoma_slice(case, offset_mm=-50)
    assert not rendered.hematoma_YX.any()
    assert (rendered.hypodensity_mm2, rendered.label) == (0.0, None)
