from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from tests.dicom_files import ct_dataset, write_series
from tests.mask_files import masks_of, refused, series_of


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
