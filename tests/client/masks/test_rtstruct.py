from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from tests.support.dicom_files import ct_dataset, enhanced_ct, write_series
from tests.support.mask_files import masks_of, refused, series_of


def test_a_real_rtstruct(real_dicom: Path) -> None:
    folder = real_dicom / "qurit+rt-utils/tests/mock_data"
    series = series_of(folder / "ct_1.dcm", folder / "ct_2.dcm")
    masks, remarks = masks_of(folder / "rt.dcm", series)
    assert (int(masks[0].sum()), int(masks[1].sum()), remarks) == (1443, 0, [])
    ds = pydicom.dcmread(folder / "rt.dcm")
    area = 0.0
    for contour in ds.ROIContourSequence[0].ContourSequence:
        x, y = np.array(contour.ContourData, float).reshape(-1, 3)[:, :2].T
        area += (np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2  # the hole runs the other way
    pixel = float(np.prod(series[0].slices[0].spacing_mm))
    assert masks[0].sum() * pixel == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("name", ["non_existent_reference_rt", "invalid_reference_rt"])
def test_a_real_rtstruct_that_refers_to_missing_images(real_dicom: Path, name: str) -> None:
    folder = real_dicom / "qurit+rt-utils/tests/mock_data"
    series = series_of(folder / "ct_1.dcm", folder / "ct_2.dcm")
    refused(folder / f"{name}.dcm", series, r"4 segments \(1 ROI-1; 2 ROI-2; 3 ROI-3; 4 ROI-4\): expected one")
    masks, (remark,) = masks_of(folder / f"{name}.dcm", series, ("ROI-1",))
    assert all(m.any() for m in masks)
    assert remark.reason == "1 of its 12 contours left out: on images that are not in data.images or were left out"


def rtstruct(path: Path, images: list[Dataset], contours: list[tuple[int | None, np.ndarray]], **changes: str) -> Path:
    """Closed contours on images given by number, or on none; points in mm."""
    ds = ct_dataset()
    for name in ("PixelData", "Rows", "Columns"):
        delattr(ds, name)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.RTStructureSetStorage
    ds.SOPInstanceUID, ds.Modality = "1.2.77", "RTSTRUCT"

    def refer(image: Dataset) -> Dataset:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        return item

    series, study, frame, roi, drawn = Dataset(), Dataset(), Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = images[0].SeriesInstanceUID, [refer(i) for i in images]
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = images[0].FrameOfReferenceUID, [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    roi.ROINumber, roi.ROIName = 1, "clot"
    roi.ReferencedFrameOfReferenceUID = changes.get("frame", images[0].FrameOfReferenceUID)
    ds.StructureSetROISequence = [roi]
    drawn.ReferencedROINumber, drawn.ContourSequence = 1, []
    for number, points in contours:
        contour = Dataset()
        contour.ContourGeometricType = changes.get("kind", "CLOSED_PLANAR")
        contour.NumberOfContourPoints = len(points)
        contour.ContourData = [f"{v:.4f}" for v in np.ravel(points)]
        if number is not None:
            contour.ContourImageSequence = [refer(images[number])]
        drawn.ContourSequence.append(contour)
    ds.ROIContourSequence = [drawn]
    ds.save_as(path, enforce_file_format=True)
    return path


def circle(radius_mm: float, centre: tuple[float, float], z_mm: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    return np.stack([centre[0] + radius_mm * np.cos(angle), centre[1] + radius_mm * np.sin(angle), 0 * angle + z_mm], 1)


def test_contours_become_pixels_whose_centres_they_enclose(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    square = np.array([[9.5, 19.5, 5], [13.5, 19.5, 5], [13.5, 21.5, 5], [9.5, 21.5, 5]])
    path = rtstruct(tmp_path / "rt", datasets, [(1, square), (2, circle(12, (30, 34), 10.0))])
    masks, remarks = masks_of(path, series_of(*images))
    assert remarks == []
    assert [int(m.sum()) for m in masks][::3] == [0, 0]  # listed, and nothing drawn
    rows, columns = np.nonzero(masks[1])
    assert (set(rows.tolist()), set(columns.tolist())) == ({20, 21}, {10, 11, 12, 13})
    assert masks[2].sum() == pytest.approx(np.pi * 12**2, rel=0.03)


def test_an_inner_contour_is_a_hole_and_a_second_one_apart_is_added(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    contours = [(0, circle(15, (32, 32), 0)), (0, circle(5, (32, 32), 0)), (0, circle(4, (8, 8), 0))]
    masks, _ = masks_of(rtstruct(tmp_path / "rt", datasets, contours), series_of(*images))
    assert masks[0][32, 32] == 0
    assert masks[0].sum() == pytest.approx(np.pi * (15**2 - 5**2 + 4**2), rel=0.02)


def test_a_contour_that_names_no_image_lies_in_its_plane(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    masks, _ = masks_of(rtstruct(tmp_path / "rt", datasets, [(None, circle(9, (30, 30), 10.2))]), series_of(*images))
    assert [m.any() for m in masks] == [False, False, True, False]
    refused(rtstruct(tmp_path / "rt", datasets, [(None, circle(9, (30, 30), 12.5))]), series_of(*images), "2.5 mm from")


def test_contours_that_cannot_be_placed_are_refused(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    series = series_of(*images)
    one = [(1, circle(9, (30, 30), 5))]
    refused(
        rtstruct(tmp_path / "rt", datasets, [(1, circle(9, (30, 30), 10))]), series, "5.0 mm from its image's plane"
    )
    refused(
        rtstruct(tmp_path / "rt", datasets, one, kind="POINT"),
        series,
        r"none of its region's 1 contours can be used \(1 of type POINT, not CLOSED_PLANAR\)",
    )
    nameless = [(None, circle(9, (30, 30), 5))]
    refused(rtstruct(tmp_path / "rt", datasets, nameless, frame="1.2.3"), series, "another frame of reference")
    assert masks_of(rtstruct(tmp_path / "rt", datasets, one, frame="1.2.3"), series)[0][
        1
    ].any()  # named and in its plane


def test_contours_on_tilted_images(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    column = (0.0, float(np.cos(angle)), float(np.sin(angle)))
    images = write_series(tmp_path / "dicom", column=column, spacing=(0.5, 0.5), shape=(128, 128))
    datasets = [pydicom.dcmread(path) for path in images]
    flat = circle(12, (30, 34), 0)
    points = np.stack([flat[:, 0], flat[:, 1] * column[1], 5.0 + flat[:, 1] * column[2]], axis=1)
    masks, _ = masks_of(rtstruct(tmp_path / "rt", datasets, [(1, points)]), series_of(*images))
    assert masks[1].sum() == pytest.approx(np.pi * 24**2, rel=0.015)


def centres(mask_YX: np.ndarray, z_mm: float) -> list[np.ndarray]:
    """A mask's contours through the centres of its outermost pixels, as OpenCV traces them and rt-utils writes them."""
    found, _ = cv2.findContours(mask_YX.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    return [np.c_[c.reshape(-1, 2), np.full(len(c), z_mm)].astype(float) for c in found]


def test_contours_through_pixel_centres_keep_their_edge(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    mask_YX = np.zeros((64, 64), np.uint8)
    mask_YX[10:40, 12:50], mask_YX[20:30, 20:40], mask_YX[23:26, 25:30] = 1, 0, 1  # an island in a hole
    mask_YX[45:47, 20:23], mask_YX[50, 50], mask_YX[55, 10:14] = 1, 1, 1
    path = rtstruct(tmp_path / "rt", datasets, [(1, c) for c in centres(mask_YX, 5.0)])
    masks, remarks = masks_of(path, series_of(*images))
    np.testing.assert_array_equal(masks[1], mask_YX)
    assert remarks == []


@pytest.mark.parametrize("change", ["equal", "begun elsewhere", "closed twice"])
def test_a_contour_that_comes_twice_does_not_cancel(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], change: str
) -> None:
    one = circle(12, (30, 34), 5)
    again = {
        "begun elsewhere": np.roll(one, 40, axis=0),
        "closed twice": np.vstack([one, one[:1]]),
    }
    once, _ = masks_of(rtstruct(tmp_path / "rt", datasets, [(1, one)]), series_of(*images))
    path = rtstruct(tmp_path / "rt", datasets, [(1, one), (1, again.get(change, one))])
    twice, _ = masks_of(path, series_of(*images))
    np.testing.assert_array_equal(twice[1], once[1])
    assert twice[1].sum() > 400


def test_a_contour_twice_in_opposite_directions_may_be_a_ring_and_is_named(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    """OpenCV traces a diamond of four pixels around one as the same polygon twice: outside and, the other way, inside."""
    diamond = np.zeros((64, 64), np.uint8)
    diamond[30, [29, 31]] = diamond[[29, 31], 30] = 1
    wide = np.zeros((64, 64), np.uint8)
    wide[20:40, 20:40], wide[21:39, 21:39] = 1, 0
    first = (0, circle(9, (30, 30), 0))
    for pair in (centres(diamond, 5.0), [circle(12, (30, 34), 5), circle(12, (30, 34), 5)[::-1]]):
        assert len(pair) == 2
        path = rtstruct(tmp_path / "rt", datasets, [first, *((1, c) for c in pair)])
        masks, (remark,) = masks_of(path, series_of(*images))
        assert "2 of its 3 contours left out: on images with one contour twice in opposite directions" in remark.reason
        assert masks[1] is None
        assert masks[0] is not None
    path = rtstruct(tmp_path / "rt", datasets, [(1, c) for c in centres(wide, 5.0)])
    np.testing.assert_array_equal(masks_of(path, series_of(*images))[0][1], wide)


def test_contours_that_cross_are_united_and_xor_is_what_it_says(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    pair = [(1, circle(10, (26.3, 30.2), 5)), (1, circle(10, (34.1, 30.4), 5))]
    areas = {}
    for kind in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        masks, _ = masks_of(rtstruct(tmp_path / "rt", datasets, pair, kind=kind), series_of(*images))
        areas[kind] = int(masks[1].sum())
    single = [int(masks_of(rtstruct(tmp_path / "rt", datasets, [c]), series_of(*images))[0][1].sum()) for c in pair]
    overlap = sum(single) - areas["CLOSED_PLANAR"]
    assert overlap > 100
    assert areas["CLOSEDPLANAR_XOR"] == areas["CLOSED_PLANAR"] - overlap


def edited(path: Path, change: Callable[[Dataset], object]) -> Path:
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)
    return path


def contours_of(ds: Dataset) -> list[Dataset]:
    return ds.ROIContourSequence[0].ContourSequence


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c, "ContourData", []), "without points"),
        (lambda c: delattr(c, "ContourData"), "without points"),
        (lambda c: setattr(c, "ContourGeometricType", "POINT"), "of type POINT, not CLOSED_PLANAR"),
        (lambda c: setattr(c, "ContourGeometricType", "OPEN_PLANAR"), "of type OPEN_PLANAR, not CLOSED_PLANAR"),
        (lambda c: delattr(c, "ContourGeometricType"), r"of type \(empty\), not CLOSED_PLANAR"),
        (
            lambda c: setattr(c, "ContourData", [30.4, 30.4, 10, 30.6, 30.4, 10, 30.5, 30.6, 10]),
            "enclose no pixel's centre",
        ),
        (
            lambda c: setattr(c.ContourImageSequence[0], "ReferencedSOPInstanceUID", "1.2.999"),
            "on images that are not in data.images",
        ),
    ],
)
def test_a_contour_that_cannot_be_used_costs_itself_and_is_counted(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], change: Callable, reason: str
) -> None:
    drawn = [(1, circle(9, (30, 30), 5)), (2, circle(9, (30, 30), 10))]
    path = edited(rtstruct(tmp_path / "rt", datasets, drawn), lambda ds: change(contours_of(ds)[1]))
    masks, (remark,) = masks_of(path, series_of(*images))
    assert re.search(f"1 of its 2 contours left out: .*{reason}", remark.reason)
    assert masks[1].sum() > 200
    assert masks[0] is not None
    if "on images" not in reason:  # then it is not known which
        assert masks[2] is None, "an empty mask would say that somebody found nothing"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ds: delattr(ds, "ROIContourSequence"), "its region has no contours"),
        (lambda ds: delattr(ds.ROIContourSequence[0], "ContourSequence"), "its region has no contours"),
        (lambda ds: delattr(ds, "StructureSetROISequence"), "describes no region"),
        (lambda ds: delattr(ds.StructureSetROISequence[0], "ROINumber"), "a region without ROINumber"),
        (lambda ds: setattr(contours_of(ds)[0], "ContourData", [1, 2, 3, 4]), "a contour of 4 numbers, expected three"),
        (
            lambda ds: setattr(contours_of(ds)[0], "ContourData", ["nan", 2, 3]),
            "a contour of 3 numbers, expected three",
        ),
    ],
)
def test_what_an_rtstruct_lacks_is_named(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], change: Callable, reason: str
) -> None:
    path = rtstruct(tmp_path / "rt", datasets, [(1, circle(9, (30, 30), 5))])
    refused(edited(path, change), series_of(*images), reason)


def test_a_contour_beyond_its_picture_is_refused(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    refused(
        rtstruct(tmp_path / "rt", datasets, [(1, circle(9, (60, 30), 5))]), series_of(*images), "beyond its picture"
    )


def test_contours_on_a_multi_frame_image(tmp_path: Path, datasets: list[Dataset]) -> None:
    order = [2, 0, 3, 1]
    enhanced_ct(datasets, order).save_as(tmp_path / "multi", enforce_file_format=True)
    whole = pydicom.dcmread(tmp_path / "multi")
    path = rtstruct(tmp_path / "rt", [whole], [(0, circle(9, (30, 30), 10))])
    masks, _ = masks_of(path, series_of(tmp_path / "multi"))
    assert [int(m.sum()) > 200 for m in masks] == [False, False, True, False]
