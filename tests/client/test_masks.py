from __future__ import annotations

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from client.dicom import CtSeries, DicomError, read_series
from client.masks import find_masks, read_masks
from simulations.export import ct_image, segmentation
from simulations.hospitals import HOSPITALS, Hospital
from simulations.patient import sample_patient
from simulations.phantom import render_slice

DCMQI = "QIICR+dcmqi/data/segmentations"
HIGHDICOM = "ImagingDataCommons+highdicom/data/test_files"
SLICES = 4
HOSPITAL: Hospital = replace(HOSPITALS[0], slices=SLICES)


class Phantom:
    """One patient's series on disk, the truth of each image, and its SEG."""

    def __init__(self, root: Path):
        self.images, self.masks = root / "dicom", root / "masks"
        self.images.mkdir()
        self.masks.mkdir()
        rng = np.random.default_rng(2)
        patient = sample_patient(rng, HOSPITAL.cohort)
        self.datasets, self.truth = [], {}
        for index in range(SLICES):
            # The last image lies far from the hematoma: its mask is empty and has no frame.
            z_mm = patient.lesion_centre_mm[2] + (60.0 if index == SLICES - 1 else 5.0 * index)
            rendered = render_slice(patient, HOSPITAL.scanner, z_mm, rng)
            image = ct_image(HOSPITAL, 0, 0, index, z_mm, rendered)
            # Names in another order than the positions.
            image.save_as(self.images / f"{(3 * index + 2) % SLICES}", enforce_file_format=True)
            self.datasets.append(image)
            self.truth[str(image.SOPInstanceUID)] = rendered.hematoma_YX
        self.pixels_NYX = np.stack(list(self.truth.values()))
        self.seg = segmentation(self.datasets, self.pixels_NYX, HOSPITAL, 0, 0)
        self.seg.save_as(self.masks / "a.dcm", enforce_file_format=True)

    def series(self) -> CtSeries:
        ((series,), faults) = read_series(self.images)
        assert faults == []
        return series


@pytest.fixture
def phantom(tmp_path: Path) -> Phantom:
    return Phantom(tmp_path)


def only_mask(folder: Path) -> object:
    masks, faults = find_masks(folder)
    assert faults == []
    (mask,) = masks.values()
    return mask


def test_masks_equal_the_phantoms_truth(phantom: Phantom) -> None:
    masks = read_masks(only_mask(phantom.masks), phantom.series())
    assert masks.keys() == phantom.truth.keys()
    for uid, truth_YX in phantom.truth.items():
        assert masks[uid].dtype == np.uint8
        np.testing.assert_array_equal(masks[uid], truth_YX)
    assert [bool(m.any()) for m in phantom.truth.values()] == [True, True, True, False]


def test_an_image_without_a_frame_has_an_empty_mask(phantom: Phantom) -> None:
    seg = pydicom.dcmread(phantom.masks / "a.dcm")
    assert seg.NumberOfFrames == SLICES - 1
    empty = list(phantom.truth)[-1]
    assert read_masks(only_mask(phantom.masks), phantom.series())[empty].sum() == 0


def test_images_that_the_seg_does_not_list_have_no_mask(phantom: Phantom) -> None:
    part = segmentation(phantom.datasets[:2], phantom.pixels_NYX[:2], HOSPITAL, 0, 0)
    part.save_as(phantom.masks / "a.dcm", enforce_file_format=True)
    masks = read_masks(only_mask(phantom.masks), phantom.series())
    assert masks.keys() == set(list(phantom.truth)[:2])


def test_order_of_files_and_frames_means_nothing(phantom: Phantom) -> None:
    order = [2, 0, 3, 1]
    shuffled = segmentation([phantom.datasets[i] for i in order], phantom.pixels_NYX[order], HOSPITAL, 0, 0)
    shuffled.save_as(phantom.masks / "a.dcm", enforce_file_format=True)
    for number, path in enumerate(sorted(phantom.images.iterdir())):
        path.rename(phantom.images / f"z{9 - number}")
    masks = read_masks(only_mask(phantom.masks), phantom.series())
    for uid, truth_YX in phantom.truth.items():
        np.testing.assert_array_equal(masks[uid], truth_YX)


def test_a_seg_that_refers_to_an_image_not_there_is_refused(phantom: Phantom) -> None:
    (phantom.images / "0").unlink()
    with pytest.raises(DicomError, match="refers to 1 images that are not among the series' 3"):
        read_masks(only_mask(phantom.masks), phantom.series())


def test_a_seg_of_another_grid_is_refused(phantom: Phantom) -> None:
    series = phantom.series()
    smaller = replace(series, slices=tuple(replace(s, shape=(256, 512)) for s in series.slices))
    with pytest.raises(DicomError, match="expected the same grid"):
        read_masks(only_mask(phantom.masks), smaller)


def test_a_seg_of_another_frame_of_reference_is_refused(phantom: Phantom) -> None:
    seg = pydicom.dcmread(phantom.masks / "a.dcm")
    seg.FrameOfReferenceUID = "1.2.3"
    seg.save_as(phantom.masks / "a.dcm")
    with pytest.raises(DicomError, match="frame of reference"):
        read_masks(only_mask(phantom.masks), phantom.series())


def test_a_fractional_seg_is_refused(phantom: Phantom) -> None:
    description = highdicom.seg.SegmentDescription(
        1, "Hematoma", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Hematoma, "MANUAL"
    )
    fractions = np.where(phantom.pixels_NYX, 0.9, 0.1)  # 10 % everywhere is no hematoma
    seg = highdicom.seg.Segmentation(
        phantom.datasets, fractions, "FRACTIONAL", [description], "1.2.5", 1, "1.2.6", 1, "x", "x", "1", "1"
    )
    seg.save_as(phantom.masks / "a.dcm")
    with pytest.raises(DicomError, match=r"cannot be decoded|FRACTIONAL"):
        read_masks(only_mask(phantom.masks), phantom.series())


def test_a_second_seg_of_the_same_series_is_left_out(phantom: Phantom) -> None:
    shutil.copy(phantom.masks / "a.dcm", phantom.masks / "b.dcm")
    masks, (fault,) = find_masks(phantom.masks)
    assert [m.path.name for m in masks.values()] == ["a.dcm"]
    assert fault.what == "b.dcm"
    assert "one SEG per series" in fault.reason


def test_what_is_no_seg_is_left_out(phantom: Phantom) -> None:
    shutil.copy(phantom.images / "0", phantom.masks / "image")
    (phantom.masks / "letter.txt").write_text("a letter")
    whole = (phantom.masks / "a.dcm").read_bytes()
    (phantom.masks / "cut").write_bytes(whole[:700])
    masks, faults = find_masks(phantom.masks)
    assert len(masks) == 1
    reasons = {fault.what: fault.reason for fault in faults}
    assert reasons.keys() == {"image", "letter.txt", "cut"}
    assert "'CT Image Storage', expected Segmentation Storage" in reasons["image"]
    assert "not a DICOM file" in reasons["letter.txt"]


def test_a_seg_cut_anywhere_stops_nothing(phantom: Phantom) -> None:
    whole = (phantom.masks / "a.dcm").read_bytes()
    cut = phantom.masks / "cut"
    for length in range(150, 6000, 61):
        cut.write_bytes(whole[:length])
        masks, _ = find_masks(phantom.masks)
        assert len(masks) == 1, f"cut after {length} bytes"


def test_a_seg_without_the_series_it_refers_to_is_left_out(phantom: Phantom) -> None:
    seg = pydicom.dcmread(phantom.masks / "a.dcm")
    del seg.ReferencedSeriesSequence[0].SeriesInstanceUID
    seg.save_as(phantom.masks / "a.dcm")
    masks, faults = find_masks(phantom.masks)
    assert (masks, [f.what for f in faults]) == ({}, ["a.dcm"])


def test_a_seg_that_lists_no_image_is_refused(phantom: Phantom) -> None:
    seg = pydicom.dcmread(phantom.masks / "a.dcm")
    del seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    seg.save_as(phantom.masks / "a.dcm")
    masks, faults = find_masks(phantom.masks)
    for mask in masks.values():
        with pytest.raises(DicomError):
            read_masks(mask, phantom.series())
    assert masks or faults


def test_an_image_reference_without_its_uid_is_left_out(phantom: Phantom) -> None:
    seg = pydicom.dcmread(phantom.masks / "a.dcm")
    del seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
    seg.save_as(phantom.masks / "a.dcm")
    masks, faults = find_masks(phantom.masks)
    assert (masks, [f.what for f in faults]) == ({}, ["a.dcm"])


def test_a_seg_whose_pixels_are_cut_is_refused(phantom: Phantom) -> None:
    whole = (phantom.masks / "a.dcm").read_bytes()
    (phantom.masks / "a.dcm").write_bytes(whole[:-20000])
    with pytest.raises(DicomError, match="cannot be decoded"):
        read_masks(only_mask(phantom.masks), phantom.series())


def test_a_hospital_without_masks() -> None:
    assert find_masks(None) == ({}, [])


def test_real_segs_with_several_segments_or_of_another_kind_are_left_out(real_dicom: Path, tmp_path: Path) -> None:
    expected = {
        f"{DCMQI}/partial_overlaps.dcm": "5 segments ['GREEN'",
        f"{DCMQI}/sparse-labelmap-ppv5.dcm": "expected Segmentation Storage",
        f"{HIGHDICOM}/seg_image_ct_binary_overlap.dcm": "2 segments ['first segment', 'second segment']",
        f"{HIGHDICOM}/ct_image.dcm": "expected Segmentation Storage",
        "qurit+rt-utils/tests/mock_data/rt.dcm": "'RT Structure Set Storage', expected Segmentation Storage",
    }
    for name in expected:
        shutil.copy(real_dicom / name, tmp_path)
    masks, faults = find_masks(tmp_path)
    assert masks == {}
    reasons = {fault.what: fault.reason for fault in faults}
    for name, text in expected.items():
        assert text in reasons[Path(name).name]


def test_a_real_seg_of_one_frame(real_dicom: Path, tmp_path: Path) -> None:
    for folder, name in (("dicom", "ct_image.dcm"), ("masks", "seg_image_ct_binary_single_frame.dcm")):
        (tmp_path / folder).mkdir()
        shutil.copy(real_dicom / HIGHDICOM / name, tmp_path / folder)
    ((series,), _) = read_series(tmp_path / "dicom")
    ((mask_YX,),) = (list(read_masks(only_mask(tmp_path / "masks"), series).values()),)
    expected_YX = pydicom.dcmread(tmp_path / "masks" / "seg_image_ct_binary_single_frame.dcm").pixel_array
    np.testing.assert_array_equal(mask_YX, expected_YX)
    assert mask_YX.sum() == 1832


def test_a_real_seg_of_another_series_is_refused(real_dicom: Path, tmp_path: Path) -> None:
    shutil.copy(real_dicom / HIGHDICOM / "seg_image_ct_binary.dcm", tmp_path)
    ((series,), _) = read_series(real_dicom / DCMQI / "ct-3slice")
    with pytest.raises(DicomError, match="refers to 4 images that are not among the series' 3"):
        read_masks(only_mask(tmp_path), series)


def test_a_real_seg_written_by_dcmqi_equals_its_label_map(real_dicom: Path, tmp_path: Path) -> None:
    """3D Slicer writes its SEG through dcmqi, which does not say that spatial locations are preserved."""
    shutil.copy(real_dicom / DCMQI / "liver.dcm", tmp_path)
    header, _, data = (real_dicom / DCMQI / "liver_seg.nrrd").read_bytes().partition(b"\n\n")
    assert b"sizes: 512 512 3" in header
    truth_NYX = np.frombuffer(gzip.decompress(data), "<i2").reshape(3, 512, 512) > 0
    ((series,), _) = read_series(real_dicom / DCMQI / "ct-3slice")
    masks = read_masks(only_mask(tmp_path), series)
    # The label map's origin is at -128.69 mm and its third axis runs up, as the series does.
    for image, truth_YX in zip(series.slices, truth_NYX, strict=True):
        np.testing.assert_array_equal(masks[image.sop_uid], truth_YX)
