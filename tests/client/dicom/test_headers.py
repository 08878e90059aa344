from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from client.dicom.elements import text
from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice, read_images
from client.dicom.pixels import read_hu
from client.dicom.pseudonyms import Pseudonyms
from tests.support.dicom_files import ct_dataset, enhanced_ct, head_hu, save_as_syntax, write_ct

KEY = Pseudonyms(b"k" * 32)
TEST_IMAGES = "cornerstonejs+cornerstone3D/packages/dicomImageLoader/testImages"


def one(path: Path, accept_lossy: bool = False) -> CtSlice:
    (image,) = read_images(path, KEY, accept_lossy, "code")
    return image


def with_raw(source: Path, keyword: str, value: bytes) -> bytes:
    """A file's bytes with one element's value replaced, as a broken export would write it."""
    ds = pydicom.dcmread(source)
    data, tag = source.read_bytes(), ds[keyword].tag
    start = data.index(struct.pack("<HH", tag.group, tag.element) + ds[keyword].VR.encode())
    (length,) = struct.unpack_from("<H", data, start + 6)
    return data[: start + 6] + struct.pack("<H", len(value)) + value + data[start + 8 + length :]


def test_a_real_tilted_head_slice() -> None:
    image = one(Path(get_testdata_file("J2K_pixelrep_mismatch.dcm")))
    assert image.shape == (512, 512)
    assert image.spacing_mm == (0.431, 0.431)
    assert image.column_direction == (0.0, 0.9272, -0.3746)  # 22 degrees of gantry tilt
    # normal = (1, 0, 0) x (0, .9272, -.3746) = (0, .3746, .9272)
    assert image.height_mm == pytest.approx(0.3746 * -98.1898 + 0.9272 * 72.1446)
    assert (image.bits_stored, image.signed, image.syntax) == (13, True, JPEG2000Lossless)


def test_headers_equal_pydicoms(real_dicom: Path) -> None:
    """Values are taken from raw elements; pydicom's own conversion is the measure."""
    for path in [
        real_dicom / TEST_IMAGES / "CTImage.dcm",
        real_dicom / "QIICR+dcmqi/data/segmentations/ct-3slice/01.dcm",
        Path(get_testdata_file("CT_small.dcm")),
    ]:
        ds, image = pydicom.dcmread(path), one(path)
        assert image.shape == (ds.Rows, ds.Columns)
        assert image.spacing_mm == tuple(ds.PixelSpacing)
        assert image.position_mm == tuple(ds.ImagePositionPatient)
        assert (*image.row_direction, *image.column_direction) == tuple(ds.ImageOrientationPatient)
        assert (image.slope, image.intercept) == (ds.RescaleSlope, ds.RescaleIntercept)
        assert image.thickness_mm == ds.SliceThickness
        assert image.tilt_degree == ds.GantryDetectorTilt
        assert image.kernel == ds.ConvolutionKernel
        assert image.padding == (ds.PixelPaddingValue, ds.PixelPaddingValue)
        assert image.patient == KEY.of("patient", str(ds.PatientID))
        assert image.series == KEY.of("series", str(ds.SeriesInstanceUID))


def test_no_identifier_is_in_a_header(tmp_path: Path) -> None:
    path = write_ct(tmp_path / "Doe^Jane", head_hu(), SeriesDescription="Doe bone", StudyDate="20240131")
    image = one(path)
    shown = " ".join(str(getattr(image, f.name)) for f in fields(image) if f.name != "path")
    for planted in ("Doe", "4711", "1.2.826", "20240131"):
        assert planted not in shown
    assert image.bone  # the description was read, and is gone


def test_an_identifier_in_another_alphabet(tmp_path: Path) -> None:
    names = {}
    for charset, encoding in (("ISO_IR 100", "latin-1"), ("ISO_IR 192", "utf-8")):
        path = write_ct(tmp_path / encoding, SpecificCharacterSet=charset, patient="Müller-1")
        assert "Müller-1".encode(encoding) in path.read_bytes()
        names[encoding] = one(path).patient
    assert set(names.values()) == {KEY.of("patient", "Müller-1")}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_the_header_is_the_same_in_every_encoding(tmp_path: Path, syntax: str) -> None:
    settings = {"PixelPaddingValue": -2000, "ConvolutionKernel": "H31s", "GantryDetectorTilt": "-12.5"}
    plain = one(write_ct(tmp_path / "plain", head_hu(), **settings))
    other = one(save_as_syntax(ct_dataset(head_hu(), **settings), tmp_path / "other", syntax))
    same = [f.name for f in fields(CtSlice) if f.name not in ("path", "syntax", "pixel_offset")]
    assert {n: getattr(other, n) for n in same} == {n: getattr(plain, n) for n in same}
    assert (plain.padding, plain.tilt_degree) == ((-2000, -2000), -12.5)


@pytest.mark.parametrize("signed", [True, False])
def test_a_padding_range_in_either_order(tmp_path: Path, signed: bool) -> None:
    ds = ct_dataset(head_hu(), PixelRepresentation=int(signed))
    vr = "SS" if signed else "US"
    low, high = (-2048, -2000) if signed else (63000, 63536)
    ds.add_new("PixelPaddingValue", vr, high)
    ds.add_new("PixelPaddingRangeLimit", vr, low)
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    assert one(tmp_path / "a").padding == (low, high)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("a letter"), "not a DICOM file"),
    "no preamble": (lambda p: p.write_bytes(write_ct(p).read_bytes()[132:]), "not a DICOM file"),
    "a folder's name": (lambda p: None, "cannot be opened"),
    "secondary capture": (lambda p: write_ct(p, SOPClassUID=SecondaryCaptureImageStorage), "Secondary Capture"),
    "private class": (lambda p: write_ct(p, SOPClassUID="1.2.3.4"), "an unknown SOP class, expected"),
    "modality": (lambda p: write_ct(p, Modality="MR"), "Modality MR, expected CT"),
    "colour": (lambda p: write_ct(p, SamplesPerPixel=3, PhotometricInterpretation="RGB"), "SamplesPerPixel 3"),
    "palette": (lambda p: write_ct(p, PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR, expected MONO"),
    "localizer": (lambda p: write_ct(p, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "perfusion": (lambda p: write_ct(p, ImageType=["DERIVED", "PRIMARY", "PERFUSION", "CBF"]), "computed map"),
    "projection": (lambda p: write_ct(p, ImageType=["DERIVED", "SECONDARY", "PROJECTION IMAGE"]), "computed map"),
    "screenshot": (lambda p: write_ct(p, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "screenshot"),
    "burned in": (lambda p: write_ct(p, BurnedInAnnotation="YES"), "text is drawn into the picture"),
    "other unit": (lambda p: write_ct(p, RescaleType="MGML"), "RescaleType MGML, expected HU"),
    "sagittal": (lambda p: write_ct(p, row=(0, 1, 0), column=(0, 0, -1)), "expected an axial slice"),
    "coronal": (lambda p: write_ct(p, row=(1, 0, 0), column=(0, 0, -1)), "expected an axial slice"),
    "not orthogonal": (lambda p: write_ct(p, row=(1, 0, 0), column=(0.6, 0.8, 0)), "right angle"),
    "no direction": (lambda p: write_ct(p, row=(0, 0, 0), column=(0, 0, 0)), "right angle"),
    "huge pixels": (lambda p: write_ct(p, spacing=(9.0, 9.0)), "PixelSpacing"),
    "no spacing": (lambda p: write_ct(p, PixelSpacing=None), "PixelSpacing is missing"),
    "no position": (lambda p: write_ct(p, ImagePositionPatient=None), "ImagePositionPatient is missing"),
    "no orientation": (lambda p: write_ct(p, ImageOrientationPatient=None), "ImageOrientationPatient is missing"),
    "no slope": (lambda p: write_ct(p, RescaleSlope=None), "RescaleSlope is missing"),
    "no intercept": (lambda p: write_ct(p, RescaleIntercept=None), "RescaleIntercept is missing"),
    "slope of nothing": (lambda p: write_ct(p, RescaleSlope=0), "RescaleSlope 0"),
    "no series": (lambda p: write_ct(p, SeriesInstanceUID=None), "without SeriesInstanceUID"),
    "no study": (lambda p: write_ct(p, StudyInstanceUID=None), "without StudyInstanceUID"),
    "no patient": (lambda p: write_ct(p, patient=""), "PatientID is empty, .* give each patient an ID of its own"),
    "8 bits": (lambda p: write_ct(p, BitsAllocated=8, BitsStored=8, HighBit=7), "BitsAllocated 8"),
    "shifted bits": (lambda p: write_ct(p, BitsStored=12, HighBit=15), "HighBit 15"),
    "absurd": (lambda p: write_ct(p, Rows=65535, Columns=65535), "65535 x 65535 pixels"),
    "wrong size": (lambda p: write_ct(p, Rows=17), "Pixel Data of 512 bytes, expected 544"),
    "no pixels": (lambda p: write_ct(p, PixelData=None), "no Pixel Data"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, kind: str) -> None:
    make, reason = BAD_FILES[kind]
    if kind == "no pixels":
        ds = ct_dataset()
        del ds.PixelData
        ds.save_as(tmp_path / "bad", enforce_file_format=True)
    else:
        make(tmp_path / "bad")
    with pytest.raises(DicomError, match=reason) as caught:
        read_images(tmp_path / "bad", KEY)
    assert "Doe" not in str(caught.value)
    assert "1.2.826" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PixelSpacing", b"abc\\de"),
        ("PixelSpacing", b"1 "),
        ("PixelSpacing", b"1\\1\\1 "),
        ("PixelSpacing", b"nan\\1 "),
        ("PixelSpacing", b"\xff\xfe\\1 "),
        ("ImagePositionPatient", b"1\\1 "),
        ("ImagePositionPatient", b"inf\\1\\1 "),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\1 "),
        ("ImageOrientationPatient", b"nan\\0\\0\\0\\1\\0 "),
        ("RescaleSlope", b"one "),
        ("Rows", b"\x01"),
        ("Rows", b"\x00\x00"),
    ],
)
def test_a_malformed_value_is_refused(tmp_path: Path, keyword: str, value: bytes) -> None:
    path = write_ct(tmp_path / "bad")
    path.write_bytes(with_raw(path, keyword, value))
    with pytest.raises(DicomError, match=rf"{keyword}|cannot be|pixels, expected"):
        read_images(path, KEY)


def test_free_text_is_not_repeated_in_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DicomError) as caught:
        read_images(write_ct(tmp_path / "a", Modality="Doe, Jane (1950)"), KEY)
    assert "Jane" not in str(caught.value)


SYNTAXES = (
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_a_cut_file_is_refused_wherever_it_ends(tmp_path: Path, syntax: str) -> None:
    whole = save_as_syntax(ct_dataset(head_hu((32, 32))), tmp_path / "whole", syntax).read_bytes()
    read_hu(one(tmp_path / "whole"))
    path = tmp_path / "cut"
    for length in [*range(1, len(whole) - 1, max(1, len(whole) // 150)), len(whole) - 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(DicomError, match=r"\w"):
            read_hu(one(path))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        (ImplicitVRLittleEndian, ExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, JPEGLosslessSV1),
        (ExplicitVRLittleEndian, RLELossless),
        (JPEG2000Lossless, ExplicitVRLittleEndian),
        (RLELossless, JPEG2000Lossless),
        (JPEG2000Lossless, JPEGLSLossless),
        (ExplicitVRLittleEndian, ExplicitVRBigEndian),
        (ExplicitVRBigEndian, ExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian),
        (ExplicitVRLittleEndian, "1.2.3.4"),
    ],
)
def test_a_wrong_transfer_syntax_in_the_header(tmp_path: Path, written: str, named: str) -> None:
    data = save_as_syntax(ct_dataset(head_hu()), tmp_path / "a", written).read_bytes()
    place = data.index(b"\x02\x00\x10\x00UI")
    length = struct.unpack_from("<H", data, place + 6)[0]
    value = named.encode() + b"\0" * (len(named) % 2)
    changed = data[:place] + b"\x02\x00\x10\x00UI" + struct.pack("<H", len(value)) + value + data[place + 8 + length :]
    start = changed.index(b"\x02\x00\x00\x00UL") + 8
    group = struct.unpack_from("<I", changed, start)[0] + len(value) - length
    (tmp_path / "a").write_bytes(changed[:start] + struct.pack("<I", group) + changed[start + 4 :])
    with pytest.raises(DicomError, match=r"\w"):
        read_hu(one(tmp_path / "a"))


def test_a_deflated_file_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = save_as_syntax(ct_dataset(head_hu()), tmp_path / "a", DeflatedExplicitVRLittleEndian)
    head = path.read_bytes()
    start = 144 + int.from_bytes(head[140:144], "little")
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = b"".join(deflate.compress(bytes(1 << 24)) for _ in range(33)) + deflate.flush()
    path.write_bytes(head[:start] + body)
    assert path.stat().st_size < 4e6
    with pytest.raises(DicomError, match="inflates to more than 512 MiB"):
        read_images(path, KEY)


@pytest.mark.parametrize(
    ("syntax", "declared", "lossy"),
    [(JPEG2000, "00", False), (JPEG2000, "01", True), (JPEG2000, None, True), (HTJ2K, None, True)],
)
def test_perhaps_lossy_syntaxes_pass_where_the_file_says_that_it_is_not(
    tmp_path: Path, syntax: str, declared: str | None, lossy: bool
) -> None:
    path = save_as_syntax(ct_dataset(head_hu()), tmp_path / "a", JPEG2000Lossless)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    if declared:
        ds.LossyImageCompression = declared
    ds.save_as(path)
    if lossy:
        with pytest.raises(DicomError, match=r"lossy compression .* data.accept_lossy"):
            one(path)
    assert one(path, accept_lossy=True).lossy is lossy


@pytest.mark.parametrize("syntax", ["1.2.4.50", "1.2.4.51", "1.2.4.53", "1.2.4.55", "1.2.4.81", "1.2.4.91"])
def test_real_lossy_files_are_refused(real_dicom: Path, syntax: str) -> None:
    (path,) = (real_dicom / TEST_IMAGES).glob(f"CTImage.dcm_*_1.2.840.10008.{syntax}.dcm")
    with pytest.raises(DicomError, match=r"lossy|no decoder"):
        one(path)


@pytest.mark.parametrize("syntax", ["1.2.4.81", "1.2.4.91"])
def test_real_lossy_files_are_taken_where_the_site_says_so(real_dicom: Path, syntax: str) -> None:
    (path,) = (real_dicom / TEST_IMAGES).glob(f"CTImage.dcm_*_1.2.840.10008.{syntax}.dcm")
    image = one(path, accept_lossy=True)
    assert image.lossy
    difference = np.abs(read_hu(image) - read_hu(one(real_dicom / TEST_IMAGES / "CTImage.dcm")))
    assert 0 < difference.max() < 100


def test_a_multi_frame_file_is_read_frame_by_frame(tmp_path: Path) -> None:
    singles = [
        ct_dataset(
            head_hu(seed=n), position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}", RescaleIntercept=-n, RescaleSlope=1 + n
        )
        for n in range(4)
    ]
    order = [2, 0, 3, 1]
    enhanced_ct(singles, order).save_as(tmp_path / "multi", enforce_file_format=True)
    frames = read_images(tmp_path / "multi", KEY)
    assert len({f.image for f in frames}) == 4
    assert len({f.instance for f in frames}) == 1
    for number, (frame, index) in enumerate(zip(frames, order, strict=True)):
        assert (frame.frame, frame.image) == (number, f"{frame.instance}.{number + 1}")
        assert frame.position_mm == (0, 0, 5.0 * index)
        assert (frame.slope, frame.intercept) == (1 + index, -index)
        np.testing.assert_array_equal(read_hu(frame), head_hu(seed=index) * (1.0 + index) - index)


def test_a_compressed_multi_frame_file(tmp_path: Path) -> None:
    singles = [ct_dataset(head_hu(seed=n), position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}") for n in range(3)]
    ds = enhanced_ct(singles, [1, 0, 2])
    ds.compress(JPEG2000Lossless, generate_instance_uid=False)
    ds.save_as(tmp_path / "multi", enforce_file_format=True)
    for frame, index in zip(read_images(tmp_path / "multi", KEY), (1, 0, 2), strict=True):
        np.testing.assert_array_equal(read_hu(frame), head_hu(seed=index))


@pytest.mark.parametrize("what", ["count", "localizer", "unit", "no position"])
def test_a_bad_multi_frame_file(tmp_path: Path, what: str) -> None:
    singles = [ct_dataset(head_hu(), position=(0, 0, 5.0 * n), sop=f"1.2.{n + 1}") for n in range(2)]
    ds = enhanced_ct(singles, [0, 1])
    group = ds.PerFrameFunctionalGroupsSequence[1]
    if what == "count":
        ds.NumberOfFrames = 3
    elif what == "localizer":
        group.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    elif what == "unit":
        group.PixelValueTransformationSequence[0].RescaleType = "MGML"
    else:
        del group.PlanePositionSequence
    ds.save_as(tmp_path / "multi", enforce_file_format=True)
    reason = {"count": "NumberOfFrames 3, 2", "localizer": "localizer", "unit": "MGML", "no position": "ImagePosition"}
    with pytest.raises(DicomError, match=reason[what]):
        read_images(tmp_path / "multi", KEY)


@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_a_real_multi_frame_file_equals_its_single_images(real_dicom: Path, name: str) -> None:
    folder = real_dicom / "QIICR+dcmqi/data/segmentations" / name
    singles = {i.position_mm: read_hu(i) for path in (folder / "image").iterdir() for i in read_images(path, KEY)}
    frames = read_images(folder / "multiframe" / "mf.dcm", KEY)
    assert {f.position_mm for f in frames} == set(singles)
    for frame in frames:
        np.testing.assert_array_equal(read_hu(frame), singles[frame.position_mm])


def test_a_file_that_lost_its_class_but_not_in_its_meta_group(tmp_path: Path) -> None:
    ds = ct_dataset(head_hu())
    del ds.SOPClassUID
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    assert one(tmp_path / "a").shape == (64, 64)


def test_raw_text_is_pydicoms_text() -> None:
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"), stop_before_pixels=True)
    for keyword in ("PatientID", "StudyInstanceUID", "Manufacturer", "ImageType", "ContrastBolusAgent"):
        value = ds.get(keyword, "")
        first = value[0] if isinstance(value, pydicom.multival.MultiValue) else value
        raw = pydicom.dcmread(get_testdata_file("CT_small.dcm"), stop_before_pixels=True)
        assert text(raw, keyword) == str(first)
