from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from client.dicom.headers import CtSlice, read_images
from client.dicom.pixels import AIR_HU, clamp_hu, read_hu
from client.dicom.pseudonyms import Pseudonyms
from client.ingest.resample import head_centre, resample, restore, touches_edge
from shared.slices import SIDE_PX
from tests.conftest import SmallHospitals
from tests.support.dicom_files import write_ct

KEY = Pseudonyms(b"k" * 32)
DISC_MM = 100.0


def disc(spacing: tuple, shape: tuple, centre_mm: tuple | None = None, padding_hu: int = -1000) -> np.ndarray:
    """A disc of 40 HU, 100 mm wide, with a bright spot 30 mm in front and a dimmer one 30 mm to the patient's right."""
    centre_mm = centre_mm or (shape[0] * spacing[0] / 2, shape[1] * spacing[1] / 2)
    y = (np.arange(shape[0]) + 0.5)[:, None] * spacing[0] - centre_mm[0]
    x = (np.arange(shape[1]) + 0.5)[None] * spacing[1] - centre_mm[1]
    hu = np.where(np.hypot(y, x) < DISC_MM / 2, 40, padding_hu)
    hu[np.hypot(y + 30, x) < 6] = 500
    hu[np.hypot(y, x + 30) < 6] = 200
    return hu


def image_of(path: Path, hu_YX: np.ndarray, **settings: object) -> tuple[CtSlice, np.ndarray]:
    (image,) = read_images(write_ct(path, hu_YX, **settings), KEY)
    return image, clamp_hu(read_hu(image))


def on_grid(image: CtSlice, hu_YX: np.ndarray) -> np.ndarray:
    return resample(hu_YX, image, head_centre([(image, hu_YX)]), fill=AIR_HU)


def middle(mask_YX: np.ndarray) -> tuple[float, float]:
    return tuple(float(v) + 0.5 for v in ndimage.center_of_mass(mask_YX))


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [
        ((0.5, 0.5), (400, 400)),
        ((0.9, 0.9), (220, 240)),
        ((0.5, 1.0), (400, 220)),  # pixels that are not square
        ((1.2, 0.6), (150, 300)),
        ((0.45, 0.45), (511, 511)),
        ((3.5, 3.5), (64, 64)),
        ((0.22, 0.22), (1024, 1024)),
    ],
)
def test_a_disc_keeps_its_size_and_comes_to_the_middle(tmp_path: Path, spacing: tuple, shape: tuple) -> None:
    off_centre = (shape[0] * spacing[0] / 2 + 15, shape[1] * spacing[1] / 2 - 20)
    out_YX = on_grid(*image_of(tmp_path / "a", disc(spacing, shape, off_centre), spacing=spacing))
    assert out_YX.shape == (SIDE_PX, SIDE_PX)
    inside_YX = out_YX > -480  # half between air and tissue
    rows, columns = (np.nonzero(inside_YX.any(axis=a))[0] for a in (1, 0))
    coarse = max(spacing)
    assert rows[-1] - rows[0] + 1 == pytest.approx(DISC_MM, abs=max(1, coarse))
    assert columns[-1] - columns[0] + 1 == pytest.approx(DISC_MM, abs=max(1, coarse))
    assert inside_YX.sum() == pytest.approx(np.pi * (DISC_MM / 2) ** 2, rel=0.01 * max(1, coarse))
    # The head is found on a 4 mm grid.
    assert middle(inside_YX) == pytest.approx((SIDE_PX / 2, SIDE_PX / 2), abs=4)


def test_values_inside_are_kept_and_outside_is_air(tmp_path: Path) -> None:
    image, hu_YX = image_of(tmp_path / "a", disc((1.0, 1.0), (200, 200), padding_hu=-3024))
    out_YX = on_grid(image, hu_YX)
    assert out_YX.min() == out_YX[0, 0] == AIR_HU  # outside of the image altogether
    assert np.median(out_YX[out_YX > -300]) == 40


DIRECTIONS = [
    pytest.param((1, 0, 0), (0, 1, 0), id="supine"),
    pytest.param((-1, 0, 0), (0, -1, 0), id="prone"),
    pytest.param((-1, 0, 0), (0, 1, 0), id="columns-flipped"),
    pytest.param((1, 0, 0), (0, -1, 0), id="rows-flipped"),
    pytest.param((0, 1, 0), (-1, 0, 0), id="on the side"),
    pytest.param((0, -1, 0), (1, 0, 0), id="on the other side"),
    pytest.param((0, 1, 0), (1, 0, 0), id="on the side, feet first"),
    pytest.param((0, -1, 0), (-1, 0, 0), id="on the other side, feet first"),
]


@pytest.mark.parametrize(("row", "column"), DIRECTIONS)
def test_every_direction_of_rows_and_columns_comes_to_the_same_picture(
    tmp_path: Path, row: tuple, column: tuple
) -> None:
    """Rows run to the back and columns to the patient's left."""
    spacing = (1.0, 0.8)
    standard_YX = disc(spacing, (180, 250))
    first, last = np.array([0.0, 0.0]), np.array([249 * 0.8, 179 * 1.0])  # x and y of the corners
    transposed = row[0] == 0
    along_x, along_y = (column[0], row[1]) if transposed else (row[0], column[1])
    turned_YX = standard_YX[::along_y, ::along_x]
    corner = (first[0] if along_x > 0 else last[0], first[1] if along_y > 0 else last[1], 0.0)
    settings = {"row": row, "column": column, "position": corner}
    turned = image_of(
        tmp_path / "a",
        turned_YX.T if transposed else turned_YX,
        spacing=spacing[::-1] if transposed else spacing,
        **settings,
    )
    out_YX = on_grid(*turned)
    np.testing.assert_allclose(out_YX, on_grid(*image_of(tmp_path / "b", standard_YX, spacing=spacing)), atol=0.01)
    bright = middle(out_YX > 350)
    dark = middle((out_YX > 150) & (out_YX < 250) & (np.indices((SIDE_PX, SIDE_PX))[1] < 100))
    assert bright == pytest.approx((SIDE_PX / 2 - 30, SIDE_PX / 2), abs=4)
    assert dark == pytest.approx((SIDE_PX / 2, SIDE_PX / 2 - 30), abs=4)


def test_a_tilted_slice_keeps_the_scale_of_its_own_plane(tmp_path: Path) -> None:
    angle = np.deg2rad(22)
    column = (0.0, float(np.cos(angle)), float(-np.sin(angle)))
    out_YX = on_grid(*image_of(tmp_path / "a", disc((1.0, 1.0), (200, 200)), column=column))
    np.testing.assert_allclose(out_YX, on_grid(*image_of(tmp_path / "b", disc((1.0, 1.0), (200, 200)))), atol=0.01)


def test_one_centre_for_a_series_whose_pictures_are_cut_differently(tmp_path: Path) -> None:
    """The centre is a place in the patient, not in the picture."""
    hu_YX = disc((1.0, 1.0), (220, 220))
    whole = image_of(tmp_path / "a", hu_YX)
    moved = image_of(tmp_path / "b", hu_YX[10:210, 20:220], position=(20.0, 10.0, 5.0))
    centre = head_centre([whole])
    np.testing.assert_allclose(
        resample(whole[1], whole[0], centre, AIR_HU)[30:190, 30:190],
        resample(moved[1], moved[0], centre, AIR_HU)[30:190, 30:190],
        atol=0.01,
    )


def test_the_median_over_slices_is_the_centre(tmp_path: Path) -> None:
    images = [
        image_of(tmp_path / f"{n}", disc((1.0, 1.0), (200, 200), (100 + shift, 100)), position=(0, 0, 5.0 * n))
        for n, shift in enumerate((0, 0, 16))
    ]
    centre = head_centre(images)
    rows = [middle(resample(hu, image, centre, AIR_HU) > -480)[0] for image, hu in images]
    assert rows[1] - rows[0] == pytest.approx(0, abs=0.1)
    assert rows[2] - rows[0] == pytest.approx(16, abs=0.2)  # a head that moves still moves


def test_the_largest_region_is_the_head_not_the_table(tmp_path: Path) -> None:
    hu_YX = disc((1.0, 1.0), (300, 300), (130, 150))
    hu_YX[285:292] = 100  # the table, as wide as the image
    out_YX = on_grid(*image_of(tmp_path / "a", hu_YX))
    regions, _ = ndimage.label(out_YX > -480)
    assert middle(regions == regions[SIDE_PX // 2, SIDE_PX // 2]) == pytest.approx((SIDE_PX / 2, SIDE_PX / 2), abs=4)


def test_air_alone_has_its_own_middle(tmp_path: Path) -> None:
    image, hu_YX = image_of(tmp_path / "a", np.full((100, 120), -1000), spacing=(2.0, 2.0))
    assert head_centre([(image, hu_YX)]) == pytest.approx((119.0, 99.0))  # from the first pixel's centre
    assert on_grid(image, hu_YX).max() < -990


def test_a_cut_head_is_noticed(tmp_path: Path) -> None:
    assert touches_edge(on_grid(*image_of(tmp_path / "a", np.full((260, 260), 40))))
    assert not touches_edge(on_grid(*image_of(tmp_path / "b", disc((1.0, 1.0), (200, 200)))))


def test_mask_and_image_move_together(tmp_path: Path) -> None:
    hu_YX = disc((0.5, 1.0), (420, 230), (90, 130))
    image, _ = image_of(tmp_path / "a", hu_YX, spacing=(0.5, 1.0), row=(-1, 0, 0), column=(0, -1, 0))
    moved_YX = resample(hu_YX, image, (-110.0, -100.0), fill=AIR_HU)
    mask_YX = resample((hu_YX > 350).astype(np.uint8), image, (-110.0, -100.0), fill=0) > 0.5
    assert 90 < mask_YX.sum() < 130  # pi 6^2 = 113 mm2
    assert middle(mask_YX) == pytest.approx(middle(moved_YX > 270), abs=0.3)


def test_masks_of_simulated_series_lie_on_the_clot(hospitals: SmallHospitals) -> None:
    cache = hospitals.cache("hospital-02")  # another field of view than 224 mm
    rows = np.nonzero(cache.masks.any(axis=(1, 2)))[0]
    assert len(rows) > 10
    step = 245 / 512
    area = sum(
        pydicom.dcmread(path).pixel_array.sum() * step**2 for path in hospitals.site("hospital-02").masks.iterdir()
    )
    assert cache.masks.sum() == pytest.approx(area, rel=0.01)  # mm2 at 1 mm per pixel
    for row in rows:
        mask_YX = cache.masks[row].astype(bool)
        if mask_YX.sum() > 300:
            ring_YX = ndimage.binary_dilation(mask_YX, iterations=6) & ~ndimage.binary_dilation(mask_YX, iterations=2)
            soft_YX = ring_YX & (np.abs(cache.hu[row] - 40) < 60)
            assert cache.hu[row][mask_YX].mean() > cache.hu[row][soft_YX].mean() + 5


TURNS = {
    "as usual": ((1, 0, 0), (0, 1, 0)),
    "prone": ((-1, 0, 0), (0, -1, 0)),
    "from the head": ((-1, 0, 0), (0, 1, 0)),
    "on the side": ((0, 1, 0), (1, 0, 0)),
    "on the other side": ((0, -1, 0), (1, 0, 0)),
    "tilted": ((1, 0, 0), (0, 0.9063, 0.4226)),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("spacing", "shape"), [((0.45, 0.45), (512, 512)), ((0.5, 0.9), (400, 240))])
def test_what_is_found_on_the_grid_goes_back_to_its_pixels(
    tmp_path: Path, turn: str, spacing: tuple, shape: tuple
) -> None:
    row, column = TURNS[turn]
    off_centre = (shape[0] * spacing[0] / 2 + 9, shape[1] * spacing[1] / 2 - 13)
    image, hu_YX = image_of(tmp_path / "a", disc(spacing, shape, off_centre), spacing=spacing, row=row, column=column)
    centre_mm = head_centre([(image, hu_YX)])
    spot_YX = hu_YX == 500
    back_YX = restore(resample(spot_YX, image, centre_mm, fill=0), image, centre_mm) > 0.5
    assert back_YX.shape == spot_YX.shape
    overlap = 2 * (back_YX & spot_YX).sum() / (back_YX.sum() + spot_YX.sum())
    assert overlap > 0.95
    apart = np.subtract(ndimage.center_of_mass(back_YX), ndimage.center_of_mass(spot_YX)) * spacing
    assert np.abs(apart).max() < 0.1
