from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, FileMetaDataset
from pydicom.data import get_testdata_file
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from client.dicom import AIR_HU, MAX_HU, DicomError, clamp_hu, find_files, read_header, read_hu, read_series

TEST_IMAGES = "cornerstonejs+cornerstone3D/packages/dicomImageLoader/testImages"
LOSSLESS = ("1.2", "1.2.1", "1.2.2", "1.2.1.99", "1.2.5", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90")
LOSSY = ("1.2.4.50", "1.2.4.81", "1.2.4.91")


def ct_dataset(
    hu_YX: np.ndarray | None = None,
    *,
    position: tuple[float, ...] = (0.0, 0.0, 0.0),
    spacing: tuple[float, ...] = (1.0, 1.0),
    row: tuple[float, ...] = (1.0, 0.0, 0.0),
    column: tuple[float, ...] = (0.0, 1.0, 0.0),
    series: str = "1.2.826.1",
    sop: str = "1.2.826.1.1",
    patient: str = "Doe-4711",
    **changes: object,
) -> Dataset:
    """A CT image; `changes` sets attributes, None removes one."""
    hu_YX = np.full((16, 16), 40) if hu_YX is None else hu_YX
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, sop
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.826.9", series, "1.2.826.8"
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = patient, "Doe^Jane", "", ""
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ""
    ds.Rows, ds.Columns = hu_YX.shape
    ds.PixelSpacing, ds.ImagePositionPatient = list(spacing), list(position)
    ds.ImageOrientationPatient, ds.SliceThickness = [*row, *column], 5
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.InstanceNumber = 1
    ds.PixelData = hu_YX.astype(np.int16).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CTImageStorage)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", sop)
    return ds


def write_ct(path: Path, hu_YX: np.ndarray | None = None, **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ct_dataset(hu_YX, **settings).save_as(path, enforce_file_format=True)
    return path


def read_both(path: Path) -> np.ndarray:
    """Header and pixels, as an ingest reads them."""
    read_header(path)
    return read_hu(path)


def with_raw(source: Path, keyword: str, value: bytes) -> bytes:
    """A file's bytes with one element's value replaced, as a broken export would write it."""
    ds = pydicom.dcmread(source)
    data, tag = source.read_bytes(), ds[keyword].tag
    start = data.index(struct.pack("<HH", tag.group, tag.element) + ds[keyword].VR.encode())
    (length,) = struct.unpack_from("<H", data, start + 6)
    return data[: start + 6] + struct.pack("<H", len(value)) + value + data[start + 8 + length :]


def test_a_real_tilted_head_slice() -> None:
    path = Path(get_testdata_file("J2K_pixelrep_mismatch.dcm"))
    header = read_header(path)
    assert header.shape == (512, 512)
    assert header.spacing_mm == (0.431, 0.431)
    assert header.column_direction == (0.0, 0.9272, -0.3746)  # 22 degrees of gantry tilt
    # normal = (1, 0, 0) x (0, .9272, -.3746) = (0, .3746, .9272)
    assert header.height_mm == pytest.approx(0.3746 * -98.1898 + 0.9272 * 72.1446)
    hu_YX = read_hu(path)
    assert hu_YX.dtype == np.float32
    assert (hu_YX.min(), hu_YX.max()) == (-2000, 1896)
    clamped_YX = clamp_hu(hu_YX)
    assert (clamped_YX.min(), clamped_YX.max()) == (AIR_HU, 1896)
    np.testing.assert_array_equal(clamped_YX[hu_YX >= AIR_HU], hu_YX[hu_YX >= AIR_HU])


def test_clamping_ends_at_air_and_at_12_bits() -> None:
    values = np.array([-3024, -1025, -1024, 0, 3071, 3072, 20000], np.float32)
    np.testing.assert_array_equal(clamp_hu(values), [-1024, -1024, -1024, 0, 3071, 3071, 3071])
    assert (AIR_HU, MAX_HU) == (-1024, 3071)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_every_lossless_transfer_syntax_decodes_to_the_same_hu(real_dicom: Path, syntax: str) -> None:
    folder = real_dicom / TEST_IMAGES
    (path,) = folder.glob(f"CTImage.dcm_*_1.2.840.10008.{syntax}.dcm")
    assert str(pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID) == f"1.2.840.10008.{syntax}"
    hu_YX = read_hu(path)
    assert (hu_YX.min(), hu_YX.max()) == (-3024, 1378)
    np.testing.assert_array_equal(hu_YX, read_hu(folder / "CTImage.dcm"))


@pytest.mark.parametrize("syntax", LOSSY)
def test_lossy_pixels_are_refused(real_dicom: Path, syntax: str) -> None:
    """They change HU by up to 64 in these very files; nothing downstream could know."""
    (path,) = (real_dicom / TEST_IMAGES).glob(f"CTImage.dcm_*_1.2.840.10008.{syntax}.dcm")
    with pytest.raises(DicomError, match="lossy"):
        read_both(path)


@pytest.mark.parametrize("syntax", ["1.2.4.51", "1.2.4.53", "1.2.4.55"])
def test_pixels_that_nothing_decodes_are_refused(real_dicom: Path, syntax: str) -> None:
    (path,) = (real_dicom / TEST_IMAGES).glob(f"CTImage.dcm_*_1.2.840.10008.{syntax}.dcm")
    with pytest.raises(DicomError, match=r"cannot be decoded|lossy"):
        read_hu(path)


def test_a_real_file_without_pixel_spacing(real_dicom: Path, tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="Ultrasound Image Storage"):
        read_header(real_dicom / TEST_IMAGES / "no-pixel-spacing.dcm")
    ds = pydicom.dcmread(real_dicom / TEST_IMAGES / "CTImage.dcm")
    del ds.PixelSpacing
    ds.save_as(tmp_path / "image.dcm")
    with pytest.raises(DicomError, match="without PixelSpacing"):
        read_header(tmp_path / "image.dcm")


@pytest.mark.parametrize(
    ("folder", "heights"),
    [
        ("QIICR+dcmqi/data/segmentations/ct-3slice", [-128.690002, -127.690002, -126.690002]),
        ("qurit+rt-utils/tests/mock_data", [60.0, 65.0]),
    ],
)
def test_real_slices_are_ordered_by_position_alone(
    real_dicom: Path, tmp_path: Path, folder: str, heights: list[float]
) -> None:
    expected = {}
    for number, path in enumerate(sorted((real_dicom / folder).glob("*.dcm"))):
        ds = pydicom.dcmread(path)
        if ds.SOPClassUID != CTImageStorage:
            continue
        expected[ds.ImagePositionPatient[2]] = str(ds.SOPInstanceUID)
        ds.InstanceNumber = (7 * number) % 5
        ds.save_as(tmp_path / f"{(11 * number + 3) % 13:02d}")
    ((series,), faults) = read_series(tmp_path)
    assert faults == []
    assert [s.height_mm for s in series.slices] == pytest.approx(heights)
    assert [s.sop_uid for s in series.slices] == [expected[z] for z in sorted(expected)]
    assert series.spacing_mm == pytest.approx(heights[1] - heights[0])


def test_a_real_single_slice(real_dicom: Path, tmp_path: Path) -> None:
    shutil.copy(real_dicom / "ImagingDataCommons+highdicom/data/test_files/ct_image.dcm", tmp_path / "x")
    ((series,), faults) = read_series(tmp_path)
    assert (len(series.slices), series.spacing_mm, faults) == (1, 0.0, [])
    assert series.slices[0].shape == (128, 128)


def test_oblique_slices_are_ordered_along_their_normal(tmp_path: Path) -> None:
    tilt = np.deg2rad(20)
    column = (0.0, float(np.cos(tilt)), float(np.sin(tilt)))
    for number, z in enumerate((10.0, 0.0, 5.0)):
        write_ct(tmp_path / f"{number}", position=(0, -100, z), column=column, sop=f"1.2.{number + 1}")
    ((series,), _) = read_series(tmp_path)
    assert [s.sop_uid for s in series.slices] == ["1.2.2", "1.2.3", "1.2.1"]
    assert series.spacing_mm == pytest.approx(5 * np.cos(tilt))


def test_rescale_is_applied(tmp_path: Path) -> None:
    path = write_ct(tmp_path / "a", np.full((4, 4), 100), RescaleSlope=2, RescaleIntercept=-1024)
    np.testing.assert_array_equal(read_hu(path), np.full((4, 4), 2 * 100 - 1024))


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_pixels_without_rescale_are_refused(tmp_path: Path, keyword: str) -> None:
    with pytest.raises(DicomError, match=keyword):
        read_hu(write_ct(tmp_path / "a", **{keyword: None}))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("a letter"), "not a DICOM file"),
    "empty": (lambda p: p.write_bytes(b""), "not a DICOM file|cannot be read"),
    "secondary capture": (lambda p: write_ct(p, SOPClassUID=SecondaryCaptureImageStorage), "Secondary Capture"),
    "colour": (
        lambda p: write_ct(p, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0),
        "colour",
    ),
    "localizer": (lambda p: write_ct(p, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "sagittal": (lambda p: write_ct(p, row=(0, 1, 0), column=(0, 0, -1)), "expected an axial slice"),
    "coronal": (lambda p: write_ct(p, row=(1, 0, 0), column=(0, 0, -1)), "expected an axial slice"),
    "not orthogonal": (lambda p: write_ct(p, row=(1, 0, 0), column=(0.6, 0.8, 0)), "expected an axial slice"),
    "no direction": (lambda p: write_ct(p, row=(0, 0, 0), column=(0, 0, 0)), "expected an axial slice"),
    "huge pixels": (lambda p: write_ct(p, spacing=(9.0, 9.0)), "PixelSpacing"),
    "no spacing": (lambda p: write_ct(p, PixelSpacing=None), "without PixelSpacing"),
    "no position": (lambda p: write_ct(p, ImagePositionPatient=None), "without ImagePositionPatient"),
    "no orientation": (lambda p: write_ct(p, ImageOrientationPatient=None), "without ImageOrientationPatient"),
    "no series": (lambda p: write_ct(p, SeriesInstanceUID=None), "without SeriesInstanceUID"),
    "no patient": (lambda p: write_ct(p, PatientID=None), "without PatientID"),
    "several missing": (lambda p: write_ct(p, PatientID=None, Rows=None), "without PatientID, Rows"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_reported_and_stops_nothing(tmp_path: Path, kind: str) -> None:
    make, reason = BAD_FILES[kind]
    for number in range(2):
        write_ct(tmp_path / f"good{number}", position=(0, 0, 5.0 * number), sop=f"1.2.{number + 1}")
    make(tmp_path / "bad")
    ((series,), (fault,)) = read_series(tmp_path)
    assert [s.sop_uid for s in series.slices] == ["1.2.1", "1.2.2"]
    assert fault.what == "bad"
    with pytest.raises(DicomError, match=reason) as caught:
        read_header(tmp_path / "bad")
    assert fault.reason == str(caught.value)
    assert "Doe" not in fault.reason


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PixelSpacing", b"abc\\de"),
        ("PixelSpacing", b"1 "),
        ("PixelSpacing", b"1\\1\\1 "),
        ("PixelSpacing", b"nan\\1 "),
        ("PixelSpacing", b"0\\1 "),
        ("ImagePositionPatient", b"1\\1 "),
        ("ImagePositionPatient", b"nan\\1\\1 "),
        ("ImagePositionPatient", b"inf\\1\\1 "),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\1 "),
        ("ImageOrientationPatient", b"nan\\0\\0\\0\\1\\0 "),
        ("Rows", b"\x01"),
        ("Rows", b"\x00\x00"),
    ],
)
def test_a_malformed_value_is_reported_and_stops_nothing(tmp_path: Path, keyword: str, value: bytes) -> None:
    good = write_ct(tmp_path / "good")
    other = write_ct(tmp_path / "bad", position=(0, 0, 5), sop="1.2.2")
    other.write_bytes(with_raw(other, keyword, value))
    series, faults = read_series(tmp_path)
    assert [s.path for one in series for s in one.slices] == [good]
    assert [f.what for f in faults] == ["bad"]
    assert any(text in faults[0].reason for text in (keyword, "cannot be read", "normal"))


@pytest.mark.parametrize("deflated", [False, True])
def test_a_truncated_file_is_reported_wherever_it_ends(tmp_path: Path, deflated: bool) -> None:
    ds = ct_dataset(np.random.default_rng(0).integers(-1000, 1000, (32, 32)))
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian if deflated else ExplicitVRLittleEndian
    ds.save_as(tmp_path / "whole", enforce_file_format=True)
    whole, path = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    read_header(tmp_path / "whole")
    lengths = [*range(1, min(len(whole), 1200), 7), len(whole) // 2, len(whole) - 3]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(DicomError, match=r"\w"):
            read_both(path)


def test_a_second_file_of_the_same_image_is_left_out(tmp_path: Path) -> None:
    write_ct(tmp_path / "a" / "1")
    write_ct(tmp_path / "b" / "1")
    write_ct(tmp_path / "a" / "2", position=(0, 0, 5), sop="1.2.2")
    ((series,), (fault,)) = read_series(tmp_path)
    assert len(series.slices) == 2
    assert fault.what == "b/1"
    assert "SOPInstanceUID" in fault.reason


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"position": (0, 0, 0)}, "at one position"),
        ({"position": (0, 0, 5), "column": (0.0, 0.9396926, 0.3420201)}, "different orientation"),
    ],
)
def test_a_series_that_does_not_hold_together_is_left_out(tmp_path: Path, second: dict, reason: str) -> None:
    write_ct(tmp_path / "1")
    write_ct(tmp_path / "2", sop="1.2.2", **second)
    write_ct(tmp_path / "other", series="1.2.7", sop="1.2.3")
    ((series,), (fault,)) = read_series(tmp_path)
    assert series.uid == "1.2.7"
    assert fault.what == "1.2.826.1"
    assert reason in fault.reason


def test_series_come_in_order_of_their_uid_from_one_folder(tmp_path: Path) -> None:
    for number in (3, 1, 2):
        write_ct(tmp_path / f"{9 - number}", series=f"1.2.{number}", sop=f"1.2.3.{number}")
    series, _ = read_series(tmp_path)
    assert [s.uid for s in series] == ["1.2.1", "1.2.2", "1.2.3"]


def test_links_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    outside = write_ct(tmp_path / "outside" / "secret", sop="1.2.9")
    folder = tmp_path / "dicom"
    good = write_ct(folder / "deep" / "er" / "1")
    (folder / "link").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent, target_is_directory=True)
    (folder / ".hidden").write_bytes(outside.read_bytes())
    assert list(find_files(folder)) == [good]
    ((series,), faults) = read_series(folder)
    assert ([s.path for s in series.slices], faults) == ([good], [])


def test_an_empty_folder_has_no_series(tmp_path: Path) -> None:
    assert read_series(tmp_path) == ([], [])
