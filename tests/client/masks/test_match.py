from __future__ import annotations

import gzip
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from client.dicom.faults import DicomError
from client.masks.match import match_masks
from tests.support.dicom_files import ct_dataset, enhanced_ct, head_hu, write_ct
from tests.support.mask_files import SHAPE, masks_of, read_one, refused, series_of, truth, volume, write_seg

DCMQI = "QIICR+dcmqi/data/segmentations"
HIGHDICOM = "ImagingDataCommons+highdicom/data/test_files"


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
    assert fault.reason == (
        "refers to 4 images, none of which is in data.images or could be used; is it of another export, or were images given new UIDs?"
    )


def test_a_missing_image_is_reported_and_the_others_keep_their_masks(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    path = write_seg(tmp_path / "seg", datasets, truth())
    masks, (remark,) = masks_of(path, series_of(*images[1:]))
    np.testing.assert_array_equal(np.stack(masks), truth()[1:])
    assert remark.reason == "1 of its 3 frames left out: on images that are not in data.images or were left out"


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


def test_highdicom_reads_what_these_tests_write(tmp_path: Path, datasets: list[Dataset]) -> None:
    seg = highdicom.seg.segread(write_seg(tmp_path / "seg", datasets, truth()))
    assert seg.number_of_segments == 1
