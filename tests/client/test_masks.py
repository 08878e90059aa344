from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from highdicom.seg import Segmentation, SegmentDescription
from PIL import Image
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from client.dicom import DicomError, Fault
from client.images import read_images
from client.masks import MaskFile, match_masks, read_mask
from client.scan import FoundFile, scan_file
from client.series import CtSeries, build_series
from tests.dicom_files import ct_dataset, enhanced_ct, head_hu, write_ct, write_series

KEY = b"k" * 32
DCMQI = "QIICR+dcmqi/data/segmentations"
HIGHDICOM = "ImagingDataCommons+highdicom/data/test_files"
SHAPE = (64, 64)


def read_one(path: Path) -> MaskFile:
    record = scan_file(FoundFile(path, path.name, "masks", ""), KEY, False)
    if record.fault:
        raise DicomError(record.fault)
    return record.mask


def series_of(*paths: Path) -> list[CtSeries]:
    series, faults = build_series(image for path in paths for image in read_images(path, KEY))
    assert faults == []
    return series


def masks_of(
    path: Path, series: list[CtSeries], segments: Sequence[str | int] = ()
) -> tuple[list[np.ndarray | None], list[Fault]]:
    """Per slice from the feet up its mask, None where nobody looked; and the faults."""
    matched, faults = match_masks([read_one(path)], series)
    assert faults == []
    ((name, (mask,)),) = matched.items()
    (one,) = [s for s in series if s.name == name]
    found, remarks = read_mask(mask, one, KEY, segments)
    assert all(m.dtype == np.uint8 and set(np.unique(m)) <= {0, 1} for m in found.values())
    return [found.get(s.image) for s in one.slices], remarks


def volume(path: Path, series: list[CtSeries], segments: Sequence[str | int] = ()) -> np.ndarray:
    """Masks of all slices, nothing where nobody looked."""
    masks, _ = masks_of(path, series, segments)
    shape = series[0].slices[0].shape
    return np.stack([np.zeros(shape, np.uint8) if m is None else m for m in masks])


def truth(count: int = 4, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """A blob per slice, none in the last; no symmetry."""
    masks = np.zeros((count, *shape), np.uint8)
    for n in range(count - 1):
        masks[n, 20 + n : 30, 25 : 40 - 2 * n] = 1
    return masks


def describe(number: int, label: str, code: object = codes.SCT.Hematoma) -> SegmentDescription:
    return SegmentDescription(number, label, codes.SCT.MorphologicallyAbnormalStructure, code, "MANUAL")


def write_seg(
    path: Path,
    images: list[Dataset],
    masks: np.ndarray,
    labels: Sequence[str] = ("Hematoma",),
    kind: str = "BINARY",
    syntax: str = ExplicitVRLittleEndian,
    **options: object,
) -> Path:
    seg = Segmentation(
        source_images=images,
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=[describe(n, label) for n, label in enumerate(labels, start=1)],
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="x",
        manufacturer_model_name="x",
        software_versions="1",
        device_serial_number="1",
        transfer_syntax_uid=syntax,
        **options,
    )
    seg.save_as(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "dicom")


@pytest.fixture
def datasets(images: list[Path]) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in images]


def nrrd(path: Path) -> np.ndarray:
    """A label map, int16 (N, Y, X), from the feet up as its third axis runs."""
    header, _, data = path.read_bytes().partition(b"\n\n")
    line = next(text for text in header.decode().splitlines() if text.startswith("sizes"))
    return np.frombuffer(gzip.decompress(data), "<i2").reshape([int(n) for n in line.split()[1:]][::-1])


# DICOM SEG: kinds and encodings


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_every_kind_of_segmentation(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], kind: str, syntax: str
) -> None:
    if kind == "BINARY" and syntax == RLELossless:
        pytest.skip("single bits cannot be run-length encoded (PS3.5 8.2.2)")
    values = truth().astype(float) if kind == "FRACTIONAL" else truth()
    path = write_seg(tmp_path / "seg", datasets, values, kind=kind, syntax=syntax)
    np.testing.assert_array_equal(volume(path, series_of(*images)), truth())


def test_a_fraction_of_a_half_is_hematoma(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    fractions = np.full((4, *SHAPE), 0.1)
    fractions[:, 10, 10:13] = (0.4, 0.6, 0.9)
    path = write_seg(tmp_path / "seg", datasets, fractions, kind="FRACTIONAL")
    assert volume(path, series_of(*images))[:, 10, 9:14].tolist() == [[0, 0, 1, 1, 0]] * 4


def test_frames_that_are_left_out_are_empty_and_images_not_listed_have_no_mask(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    path = write_seg(tmp_path / "seg", datasets[:3], truth()[[0, 3, 2]], omit_empty_frames=True)
    assert pydicom.dcmread(path).NumberOfFrames == 2  # gapped
    masks, _ = masks_of(path, series_of(*images))
    assert [None if m is None else int(m.sum()) for m in masks] == [truth()[0].sum(), 0, truth()[2].sum(), None]


def test_overlapping_segments_are_united(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    both = np.stack([truth(), np.roll(truth(), 5, axis=2)], axis=-1)
    path = write_seg(tmp_path / "seg", datasets, both, labels=("Core", "Edge"))
    series = series_of(*images)
    np.testing.assert_array_equal(volume(path, series, ("core",)), both[..., 0])
    np.testing.assert_array_equal(volume(path, series, (2,)), both[..., 1])
    np.testing.assert_array_equal(volume(path, series, ("Core", "Edge")), both.max(axis=-1))


def test_order_of_files_and_frames_means_nothing(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    order = [2, 0, 3, 1]
    path = write_seg(tmp_path / "seg", [datasets[i] for i in order], truth()[order])
    np.testing.assert_array_equal(volume(path, series_of(*images[::-1])), truth())


@pytest.mark.parametrize(
    ("seg", "segments", "expected", "value"),
    [
        ("liver", (), "liver_seg", None),
        ("partial_overlaps", ("GREEN",), "partial_overlaps-1", 1),
        ("partial_overlaps", ("ORANGE",), "partial_overlaps-2", 2),
        ("partial_overlaps", ("SCT:20982000",), "partial_overlaps-3", 3),
        ("partial_overlaps", (4,), "partial_overlaps-1", 4),
        ("partial_overlaps", ("dark_blue",), "partial_overlaps-1", 5),
    ],
)
def test_real_label_maps_are_reproduced_exactly(
    real_dicom: Path, seg: str, segments: tuple, expected: str, value: int | None
) -> None:
    folder = real_dicom / DCMQI
    labels = nrrd(folder / f"{expected}.nrrd")
    series = series_of(*(folder / "ct-3slice").iterdir())
    found = volume(folder / f"{seg}.dcm", series, segments)
    np.testing.assert_array_equal(found, labels > 0 if value is None else labels == value)
    assert found.any()


@pytest.mark.parametrize("name", ["noppv", "ppv5"])
def test_real_sparse_label_maps(real_dicom: Path, name: str) -> None:
    """In ppv5 the frame that is left out reads 5, its pixel padding value, in the label map: no segment, and no frame."""
    folder = real_dicom / DCMQI
    series = series_of(*(folder / "24x38x3/image").iterdir())
    masks, _ = masks_of(folder / f"sparse-labelmap-{name}.dcm", series)
    labels = nrrd(folder / f"sparse_labelmap_{name}_seg.nrrd")
    assert [m is None for m in masks] == [False, True, False]
    np.testing.assert_array_equal(masks[0], labels[0] == 1)
    np.testing.assert_array_equal(masks[2], labels[2] == 1)
    assert not (labels[1] == 1).any()


@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_real_masks_of_odd_sizes(real_dicom: Path, name: str) -> None:
    folder = real_dicom / DCMQI / name
    (path,) = (folder / "seg").iterdir()
    found = volume(path, series_of(*(folder / "image").iterdir()))
    np.testing.assert_array_equal(found, nrrd(folder / "nrrd" / "label.nrrd") > 0)


@pytest.mark.parametrize(
    "name", ["liver_spine_seg", "liver_spine_gapped_seg", "spine_seg", "spine_seg_label5", "heart_seg"]
)
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_real_label_maps_without_a_segmentation_survive_one(
    real_dicom: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = real_dicom / DCMQI
    paths = sorted((folder / "ct-3slice").iterdir(), reverse=True)  # 03 is the lowest, where the label map begins
    labels = nrrd(folder / f"{name}.nrrd")
    values = [int(v) for v in np.unique(labels) if v]
    ordered = np.searchsorted([0, *values], labels).astype(np.uint8)
    sources = [pydicom.dcmread(path) for path in paths]
    for ds in sources:
        ds.SpecificCharacterSet = "ISO_IR 100"  # empty in these files, which highdicom refuses to copy
    path = write_seg(tmp_path / "seg", sources, ordered, labels=[f"value {v}" for v in values], kind=kind)
    for value in values:
        np.testing.assert_array_equal(volume(path, series_of(*paths), (f"value {value}",)), labels == value)


@pytest.mark.parametrize(
    ("name", "segments", "pixels"),
    [
        ("seg_image_ct_binary_single_frame.dcm", (), 1832),
    ],
)
def test_a_real_mask_on_its_real_image(real_dicom: Path, name: str, segments: tuple, pixels: int) -> None:
    folder = real_dicom / HIGHDICOM
    found = volume(folder / name, series_of(folder / "ct_image.dcm"), segments)
    np.testing.assert_array_equal(found[0], pydicom.dcmread(folder / name).pixel_array)
    assert found.sum() == pixels


def test_a_segmentation_of_a_multi_frame_image(tmp_path: Path) -> None:
    singles = [ct_dataset(head_hu(seed=n), position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}") for n in range(4)]
    order = [2, 0, 3, 1]
    enhanced_ct(singles, order).save_as(tmp_path / "multi", enforce_file_format=True)
    source = pydicom.dcmread(tmp_path / "multi")
    path = write_seg(tmp_path / "seg", [source], truth()[order], omit_empty_frames=True)
    np.testing.assert_array_equal(volume(path, series_of(tmp_path / "multi")), truth())


# DICOM SEG: refusals


def refused(path: Path, series: list[CtSeries], match: str, segments: Sequence[str | int] = ()) -> None:
    with pytest.raises(DicomError, match=match):
        masks_of(path, series, segments)


def test_several_segments_and_none_named(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    both = np.stack([truth(), truth()], axis=-1)
    path = write_seg(tmp_path / "seg", datasets, both, labels=("Hematoma", "Ventricle"))
    series = series_of(*images)
    refused(path, series, r"2 segments \(1 Hematoma SCT:\d+; 2 Ventricle SCT:\d+\): expected one, .* data.segment")
    refused(path, series, r"data.segment \['clot'\] is not among them", ("clot",))


@pytest.mark.parametrize("name", ["seg_image_ct_binary_overlap.dcm", "seg_image_ct_true_fractional.dcm"])
def test_a_mask_of_images_that_are_not_there(real_dicom: Path, name: str) -> None:
    series = series_of(*(real_dicom / DCMQI / "ct-3slice").iterdir())
    matched, (fault,) = match_masks([read_one(real_dicom / HIGHDICOM / name)], series)
    assert matched == {}
    assert fault.reason == "refers to 4 images, none of which is in data.images or could be used"


def test_a_missing_image_is_reported_and_the_others_keep_their_masks(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    path = write_seg(tmp_path / "seg", datasets, truth())
    masks, (remark,) = masks_of(path, series_of(*images[1:]))
    np.testing.assert_array_equal(np.stack(masks), truth()[1:])
    assert "refers to 1 images that are not there" in remark.reason


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"spacing": (0.9, 0.9)}, "mask has pixels of"),
        ({"position": (0.0, 3.0, 0.0)}, r"lies 3.0 mm from its image"),
        ({"row": (-1.0, 0.0, 0.0), "column": (0.0, -1.0, 0.0)}, "another orientation"),
        ({"FrameOfReferenceUID": "1.2.3"}, "another frame of reference"),
    ],
)
def test_a_mask_of_another_geometry_is_refused(tmp_path: Path, change: dict, match: str) -> None:
    """The mask is drawn on an image with the same UID that lies elsewhere."""
    write_ct(tmp_path / "drawn", head_hu(), **change)
    write_ct(tmp_path / "there", head_hu())
    path = write_seg(tmp_path / "seg", [pydicom.dcmread(tmp_path / "drawn")], truth(2)[:1])
    refused(path, series_of(tmp_path / "there"), match)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    write_ct(tmp_path / "drawn", head_hu((32, 64)))
    write_ct(tmp_path / "there", head_hu())
    path = write_seg(tmp_path / "seg", [pydicom.dcmread(tmp_path / "drawn")], truth(2)[:1, :32])
    refused(path, series_of(tmp_path / "there"), r"mask is \(32, 64\) pixels, its image \(64, 64\)")


def test_a_second_mask_of_the_same_series_is_left_out(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    paths = [write_seg(tmp_path / name, datasets, truth()) for name in ("a", "b")]
    matched, (fault,) = match_masks([read_one(p) for p in paths], series_of(*images))
    ((found,),) = matched.values()
    assert {found.file, fault.what.removeprefix("file ")} == {"a", "b"}
    assert "a second mask of the same series" in fault.reason


def test_what_is_no_mask_is_left_out(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "letter.txt").write_text("a letter")
    for path, reason in (
        (images[0], "CT Image Storage, expected Segmentation"),
        (tmp_path / "letter.txt", "not a DICOM"),
    ):
        with pytest.raises(DicomError, match=reason):
            read_one(path)


def test_a_mask_cut_anywhere_is_refused_or_whole(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    whole = write_seg(tmp_path / "seg", datasets, truth()).read_bytes()
    series = series_of(*images)
    for length in range(1, len(whole) - 1, 61):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(DicomError):
            masks_of(tmp_path / "cut", series)


@pytest.mark.parametrize("part", ["ReferencedSeriesSequence", "ReferencedInstanceSequence", "uid"])
def test_a_mask_that_lists_no_image_is_left_out(tmp_path: Path, datasets: list[Dataset], part: str) -> None:
    path = write_seg(tmp_path / "seg", datasets, truth())
    ds = pydicom.dcmread(path)
    if part == "ReferencedSeriesSequence":
        del ds.ReferencedSeriesSequence
    elif part == "uid":
        del ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
    else:
        del ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    ds.save_as(path)
    with pytest.raises(DicomError, match="refers to no image"):
        read_one(path)


# RTSTRUCT


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


@pytest.mark.parametrize(("name", "absent"), [("non_existent_reference_rt", 1), ("invalid_reference_rt", 3)])
def test_a_real_rtstruct_that_refers_to_missing_images(real_dicom: Path, name: str, absent: int) -> None:
    folder = real_dicom / "qurit+rt-utils/tests/mock_data"
    series = series_of(folder / "ct_1.dcm", folder / "ct_2.dcm")
    refused(folder / f"{name}.dcm", series, r"4 segments \(1 ROI-1; 2 ROI-2; 3 ROI-3; 4 ROI-4\): expected one")
    masks, (remark,) = masks_of(folder / f"{name}.dcm", series, ("ROI-1",))
    assert all(m.any() for m in masks)
    assert f"refers to {absent} images that are not there" in remark.reason


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
    refused(rtstruct(tmp_path / "rt", datasets, one, kind="POINT"), series, "a contour of type POINT")
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


# NIfTI


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def grid_of(axes: str, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    """Affine (RAS) of voxels on the series of write_series, stored along e.g. "RAS" or "LPS" or "SPL" from corner to corner."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(axes):
        axis = next(n for n, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        sign = 1 if letter in "RAS" else -1
        affine[axis, column] = sign * spacing[axis]
        low = {0: -(shape[0] - 1) * spacing[0], 1: -(shape[1] - 1) * spacing[1], 2: 0.0}[axis]
        high = {0: 0.0, 1: 0.0, 2: (shape[2] - 1) * spacing[2]}[axis]
        affine[axis, 3] = low if sign > 0 else high
    return affine


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAS", "RPI", "SPL", "AIR", "PRS"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_is_placed_by_its_affine(tmp_path: Path, images: list[Path], axes: str, suffix: str) -> None:
    """The same label map stored along other axes gives the same masks."""
    patient = truth().transpose(2, 1, 0)  # x to the left, y to the back, z up: LPS
    stored = patient
    order = [next(n for n, pair in enumerate(("RL", "AP", "SI")) if letter in pair) for letter in axes]
    stored = stored.transpose(order)
    for column, letter in enumerate(axes):
        if letter in "RAI":
            stored = np.flip(stored, axis=column)
    path = nifti(tmp_path / f"mask{suffix}", np.ascontiguousarray(stored), grid_of(axes, (64, 64, 4), (1, 1, 5)))
    np.testing.assert_array_equal(volume(path, series_of(*images)), truth())


@pytest.mark.parametrize(
    "change",
    ["half a voxel", "spacing", "shape", "rotated", "one slice more"],
)
def test_a_nifti_of_another_grid_is_refused_and_not_stretched(tmp_path: Path, images: list[Path], change: str) -> None:
    affine, voxels = grid_of("LPS", (64, 64, 4), (1, 1, 5)), truth().transpose(2, 1, 0)
    if change == "half a voxel":
        affine[0, 3] += 0.5
    elif change == "spacing":
        affine[:2, :2] *= 1.02
    elif change == "shape":
        voxels = voxels[:60]
    elif change == "rotated":
        turn = np.deg2rad(3)
        affine[:2, :2] = affine[:2, :2] @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    else:
        images = write_series(tmp_path / "more", count=5)
    series = series_of(*images)
    path = nifti(tmp_path / "mask.nii.gz", voxels, affine)
    matched, (fault,) = match_masks([read_one(path)], series)
    assert matched == {}
    assert "its grid is that of 0 series" in fault.reason
    named = nifti(tmp_path / "1.2.826.1.nii.gz", voxels, affine)
    refused(named, series, r"slices are no layer of the NIfTI's grid")


def test_a_nifti_that_fits_two_series_must_be_named(tmp_path: Path, images: list[Path]) -> None:
    series = series_of(*images, *write_series(tmp_path / "other", series="1.2.5", FrameOfReferenceUID="1.2.6"))
    args = truth().transpose(2, 1, 0), grid_of("LPS", (64, 64, 4), (1, 1, 5))
    _, (fault,) = match_masks([read_one(nifti(tmp_path / "mask.nii", *args))], series)
    assert "its grid is that of 2 series, expected 1; name it SeriesInstanceUID.nii.gz" in fault.reason
    matched, _ = match_masks([read_one(nifti(tmp_path / "1.2.5.nii.gz", *args))], series)
    assert list(matched) == [s.name for s in series if s.slices[0].path.parent.name == "other"]


def test_numbers_of_a_label_map(tmp_path: Path, images: list[Path]) -> None:
    series, affine = series_of(*images), grid_of("LPS", (64, 64, 4), (1, 1, 5))
    labels = (truth() + 2 * np.roll(truth(), 20, axis=2)).transpose(2, 1, 0)
    path = nifti(tmp_path / "m.nii", labels, affine)
    refused(path, series, r"2 segments \(1; 2\): expected one")
    np.testing.assert_array_equal(volume(path, series, (1,)), truth())
    np.testing.assert_array_equal(volume(path, series, ("Hematoma", 1, 2)), truth() | np.roll(truth(), 20, axis=2))
    assert volume(path, series, (7,)).sum() == 0
    floats = nifti(tmp_path / "m.nii", truth().transpose(2, 1, 0)[..., None].astype(np.float32), affine)
    np.testing.assert_array_equal(volume(floats, series), truth())
    floats = nifti(tmp_path / "m.nii", truth().transpose(2, 1, 0) * np.float32(0.3), affine)
    refused(floats, series, "numbers that are not whole")


@pytest.mark.parametrize("content", [b"", b"no nifti", b"\x1f\x8b\x08\x00junk"])
def test_a_file_that_is_called_nifti_and_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.nii.gz").write_bytes(content)
    with pytest.raises(DicomError, match=r"cannot be read as NIfTI|an empty file"):
        read_one(tmp_path / "m.nii.gz")


# PNG


def png(folder: Path, uid: str, pixels: np.ndarray, mode: str | None = None) -> Path:
    path = folder / f"{uid}.png"
    Image.fromarray(pixels).convert(mode).save(path) if mode else Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("mode", [None, "P"])
def test_a_png_is_named_after_its_image(tmp_path: Path, images: list[Path], value: int, mode: str | None) -> None:
    path = png(tmp_path, "1.2.826.1.2", truth()[1] * np.uint8(value), mode)
    masks, _ = masks_of(path, series_of(*images))
    np.testing.assert_array_equal(masks[1], truth()[1])
    assert [m is None for m in masks] == [True, False, True, True]


def test_pngs_of_one_series_add_up(tmp_path: Path, images: list[Path]) -> None:
    paths = [png(tmp_path, f"1.2.826.1.{n + 1}", truth()[n]) for n in range(4)]
    matched, faults = match_masks([read_one(p) for p in paths], series_of(*images))
    assert faults == []
    assert [len(files) for files in matched.values()] == [4]


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (np.zeros((32, 64), np.uint8), r"mask is \(32, 64\) pixels, its image \(64, 64\)"),
        (np.zeros((64, 64, 3), np.uint8), "mode RGB, expected one channel"),
        (np.arange(64 * 64, dtype=np.uint8).reshape(64, 64), r"255 segments .* expected one"),
    ],
)
def test_a_png_that_is_no_mask(tmp_path: Path, images: list[Path], pixels: np.ndarray, match: str) -> None:
    refused(png(tmp_path, "1.2.826.1.2", pixels), series_of(*images), match)


def test_a_png_named_after_nothing(tmp_path: Path, images: list[Path]) -> None:
    _, (fault,) = match_masks([read_one(png(tmp_path, "1.2.99", truth()[0]))], series_of(*images))
    assert fault.reason == "named after no image in data.images; expected SOPInstanceUID.png"


def test_the_file_names_of_masks_and_their_uids_are_in_no_fault(tmp_path: Path, images: list[Path]) -> None:
    shutil.copy(png(tmp_path, "1.2.826.1.2", np.zeros((32, 64), np.uint8)), tmp_path / "Doe.png")
    series = series_of(*images)
    for path in (tmp_path / "1.2.826.1.2.png", tmp_path / "Doe.png"):
        record = scan_file(FoundFile(path, "0123", "masks", ""), KEY, False)
        matched, faults = match_masks([record.mask], series)
        for files in matched.values():
            with pytest.raises(DicomError) as caught:
                read_mask(files[0], series[0], KEY, ())
            faults.append(Fault("", str(caught.value)))
        assert faults
        assert not any(text in str(faults) for text in ("Doe", "1.2.826", str(tmp_path)))


def test_highdicom_reads_what_these_tests_write(tmp_path: Path, datasets: list[Dataset]) -> None:
    seg = highdicom.seg.segread(write_seg(tmp_path / "seg", datasets, truth()))
    assert seg.number_of_segments == 1
