from __future__ import annotations

import numpy as np
import pytest

from simulations.studies.ceiling import (
    DROP_HU,
    FEATURES,
    CeilingError,
    fit_radiomics,
    oracle_scores,
    radiomics,
    radiomics_scores,
)

SIDE_PX = 64
Y_YX, X_YX = np.mgrid[:SIDE_PX, :SIDE_PX]
BRAIN_HU, CLOT_HU, SPOT_HU = 30, 60, 40
DISC_YX = np.hypot(Y_YX - 32, X_YX - 32) <= 15
SPOT_YX = np.zeros_like(DISC_YX)
SPOT_YX[29:34, 30:36] = True  # 5 x 6 pixels of 1 mm2
NOTCH_YX = (np.abs(Y_YX - 32) <= 2) & (X_YX >= 36) & DISC_YX  # dark up to the surface
TINY_YX = [DISC_YX & (np.abs(Y_YX - 32) <= reach) & (np.abs(X_YX - 32) <= reach) for reach in (0, 1, 2)]


def hematoma(*dark_YX: np.ndarray, dark_hu: int = SPOT_HU) -> np.ndarray:
    """A disc of clot in brain with dark parts, int16 (Y, X)."""
    hu_YX = np.where(DISC_YX, CLOT_HU, BRAIN_HU)
    for part_YX in dark_YX:
        hu_YX[part_YX] = dark_hu
    return hu_YX.astype(np.int16)


def score(hu_YX: np.ndarray, mask_YX: np.ndarray = DISC_YX) -> float:
    return float(oracle_scores(hu_YX[None], mask_YX[None].astype(np.uint8))[0])


def features(hu_YX: np.ndarray, mask_YX: np.ndarray = DISC_YX) -> dict[str, float]:
    row = radiomics(hu_YX[None], mask_YX[None].astype(np.uint8))[0]
    return dict(zip(FEATURES, row, strict=True))


def test_the_oracle_counts_area_times_depth_of_an_enclosed_spot() -> None:
    assert score(hematoma(SPOT_YX)) == 30 * (CLOT_HU - SPOT_HU - DROP_HU)


def test_the_oracle_gives_nothing_for_an_open_notch_or_a_plain_clot() -> None:
    assert score(hematoma(NOTCH_YX)) == 0
    assert score(hematoma()) == 0
    assert score(hematoma(SPOT_YX, NOTCH_YX)) == 0  # they touch: one open region


def test_a_spot_beside_a_notch_counts_as_without_it() -> None:
    apart_YX = np.roll(SPOT_YX, -7, axis=1)
    assert score(hematoma(apart_YX, NOTCH_YX)) == score(hematoma(SPOT_YX)) > 0


def test_a_spot_that_is_not_dark_enough_gives_nothing() -> None:
    assert score(hematoma(SPOT_YX, dark_hu=round(CLOT_HU - DROP_HU))) == 0
    assert score(hematoma(SPOT_YX, dark_hu=round(CLOT_HU - DROP_HU) - 1)) == 30


def test_a_spot_behind_a_dark_border_counts_from_where_it_comes_loose() -> None:
    border_YX = DISC_YX & (np.hypot(Y_YX - 32, X_YX - 32) > 12)
    spot_YX = np.roll(SPOT_YX, 9, axis=1)
    joined_YX = hematoma(border_YX, dark_hu=50)
    joined_YX[spot_YX] = SPOT_HU
    assert (border_YX & spot_YX).any()
    assert score(joined_YX) == 30 * (50 - SPOT_HU)  # not from 54, where spot and border are one


def test_the_oracle_is_not_moved_by_calibration() -> None:
    assert score(hematoma(SPOT_YX) + np.int16(8)) == score(hematoma(SPOT_YX))


def test_a_spot_that_the_slice_edge_cuts_is_open() -> None:
    hu_YX, mask_YX = hematoma(SPOT_YX), DISC_YX
    assert score(hu_YX[31:], mask_YX[31:]) == 0


def test_without_a_mask_score_and_features_are_zero() -> None:
    nothing_YX = np.zeros_like(DISC_YX)
    assert score(hematoma(SPOT_YX), nothing_YX) == 0
    assert set(features(hematoma(SPOT_YX), nothing_YX).values()) == {0.0}


def test_each_slice_is_scored_on_its_own() -> None:
    stack_NYX = np.stack([hematoma(), hematoma(SPOT_YX), hematoma(NOTCH_YX)])
    masks_NYX = np.stack([DISC_YX] * 3).astype(np.uint8)
    assert oracle_scores(stack_NYX, masks_NYX).tolist() == [0, score(hematoma(SPOT_YX)), 0]
    assert radiomics(stack_NYX, masks_NYX)[1].tolist() == list(features(hematoma(SPOT_YX)).values())


def test_features_of_a_constant_disc_by_hand() -> None:
    found = features(hematoma())
    assert found.pop("area_mm2") == 709  # pixels at most 15 from the centre (Gauss circle problem, r = 15)
    assert found.pop("compactness") == pytest.approx(84**2 / 709)  # 84 pixels touch the outside with a side
    levels = {"mean_hu", "percentile_5_hu", "percentile_25_hu", "percentile_50_hu", "percentile_75_hu"}
    for name in levels | {"percentile_95_hu"}:
        assert found.pop(name) == CLOT_HU
    assert found.pop("contrast_hu") == CLOT_HU - BRAIN_HU
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-9)


def test_features_of_two_equal_halves_by_hand() -> None:
    mask_YX = (np.abs(Y_YX - 31.5) < 8) & (np.abs(X_YX - 31.5) < 8)
    hu_YX = np.where(mask_YX, np.where(X_YX < 32, 50, 70), BRAIN_HU).astype(np.int16)
    found = features(hu_YX, mask_YX)
    assert (found["mean_hu"], found["deviation_hu"], found["skewness"], found["kurtosis"]) == (60, 10, 0, -2)
    assert (found["percentile_5_hu"], found["percentile_95_hu"], found["area_mm2"]) == (50, 70, 256)
    assert found["core_dark_share"] == pytest.approx(0.5, abs=0.1)
    assert found["enclosed_area_mm2"] == 0  # dark, but open


def test_enclosed_features_tell_a_spot_from_a_notch() -> None:
    spot, notch = features(hematoma(SPOT_YX)), features(hematoma(NOTCH_YX))
    for name in ("enclosed_area_mm2", "enclosed_depth_hu", "enclosed_score_mm2_hu"):
        assert spot[name] > 0 == notch[name]
    assert spot["core_drop_hu"] > DROP_HU
    assert notch["core_drop_hu"] > DROP_HU


@pytest.mark.parametrize("mask_YX", TINY_YX)
def test_features_of_tiny_masks_are_finite(mask_YX: np.ndarray) -> None:
    noisy_YX = hematoma() + np.random.default_rng(0).integers(-5, 6, DISC_YX.shape).astype(np.int16)
    assert np.isfinite(list(features(noisy_YX, mask_YX).values())).all()
    assert features(noisy_YX, mask_YX)["area_mm2"] == mask_YX.sum()


def test_features_of_a_mask_that_fills_the_slice_are_finite() -> None:
    assert np.isfinite(list(features(hematoma(), np.ones_like(DISC_YX)).values())).all()


def test_a_fit_separates_spots_from_notches_in_noise_it_has_not_seen() -> None:
    rng = np.random.default_rng(5)
    clean_NYX = np.stack([hematoma(SPOT_YX), hematoma(NOTCH_YX)] * 20)
    noisy_NYX = (clean_NYX + rng.normal(0, 2, clean_NYX.shape)).round().astype(np.int16)
    found_NF = radiomics(noisy_NYX, np.stack([DISC_YX] * 40).astype(np.uint8))
    labels_N = np.array([1.0, 0.0] * 20)
    estimator = fit_radiomics(found_NF[:24], labels_N[:24], seed=0)
    scores_N = radiomics_scores(estimator, found_NF[24:])
    assert scores_N[labels_N[24:] == 1].min() > scores_N[labels_N[24:] == 0].max()
    again = radiomics_scores(fit_radiomics(found_NF[:24], labels_N[:24], seed=0), found_NF[24:])
    assert again.tolist() == scores_N.tolist()


@pytest.mark.parametrize(
    "shapes", [((2, 8, 8), (3, 8, 8)), ((2, 8, 8), (2, 8, 9)), ((8, 8), (8, 8))], ids=["number", "side", "one slice"]
)
@pytest.mark.parametrize("measure", [oracle_scores, radiomics])
def test_slices_and_masks_that_do_not_belong_together_are_refused(measure, shapes) -> None:
    with pytest.raises(CeilingError, match=r"expected the same shape \(N, Y, X\)"):
        measure(np.zeros(shapes[0], np.int16), np.zeros(shapes[1], np.uint8))


@pytest.mark.parametrize("labels", [[0.0, 0.0, 0.0], [0.0, 1.0, np.nan], [0.0, 1.0], [0.0, 1.0, 2.0]])
def test_labels_that_cannot_be_learned_from_are_refused(labels: list[float]) -> None:
    with pytest.raises(CeilingError, match="expected shape"):
        fit_radiomics(np.zeros((3, len(FEATURES))), np.array(labels), seed=0)


@pytest.mark.parametrize("rows_NF", [np.zeros((4, 2)), np.full((4, len(FEATURES)), np.nan)])
def test_features_of_another_kind_are_refused(rows_NF: np.ndarray) -> None:
    with pytest.raises(CeilingError, match=r"make them with simulations\.studies\.ceiling\.radiomics"):
        fit_radiomics(rows_NF, np.array([0.0, 1.0, 0.0, 1.0]), seed=0)
