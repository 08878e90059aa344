from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice, read_images
from client.dicom.pixels import AIR_HU, MAX_HU, PADDING_HU, clamp_hu, read_hu
from client.dicom.pseudonyms import Pseudonyms
from tests.support.dicom_files import ct_dataset, head_hu, save_as_syntax, write_ct

KEY = Pseudonyms(b"k" * 32)
TEST_IMAGES = "cornerstonejs+cornerstone3D/packages/dicomImageLoader/testImages"
LOSSLESS = ("1.2", "1.2.1", "1.2.2", "1.2.1.99", "1.2.5", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90")
SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
)


def one(path: Path, accept_lossy: bool = False) -> CtSlice:
    (image,) = read_images(path, KEY, accept_lossy)
    return image


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_real_files_decode_to_the_same_hu_in_every_lossless_syntax(real_dicom: Path, syntax: str) -> None:
    folder = real_dicom / TEST_IMAGES
    (path,) = folder.glob(f"CTImage.dcm_*_1.2.840.10008.{syntax}.dcm")
    hu_YX = read_hu(one(path))
    assert one(path).syntax == f"1.2.840.10008.{syntax}"
    assert (hu_YX.min(), hu_YX.max(), hu_YX.dtype) == (-3024, 1378, np.float32)
    np.testing.assert_array_equal(hu_YX, read_hu(one(folder / "CTImage.dcm")))


def test_hu_equal_pydicoms_own_on_real_files(real_dicom: Path) -> None:
    names = ["CT_small.dcm", "J2K_pixelrep_mismatch.dcm"]
    paths = [Path(get_testdata_file(name)) for name in names]
    paths += sorted((real_dicom / "QIICR+dcmqi/data/segmentations/ct-3slice").iterdir())
    for path in paths:
        ds = pydicom.dcmread(path)
        expected_YX = pydicom.pixels.apply_rescale(ds.pixel_array, ds)
        hu_YX = read_hu(one(path))
        padded_YX = hu_YX == PADDING_HU
        np.testing.assert_array_equal(hu_YX[~padded_YX], expected_YX[~padded_YX])
        assert set(np.unique(expected_YX[padded_YX])) <= {ds.get("PixelPaddingValue", 0) + ds.RescaleIntercept}


def test_a_stream_whose_sign_contradicts_the_header() -> None:
    hu_YX = read_hu(one(Path(get_testdata_file("J2K_pixelrep_mismatch.dcm"))))
    assert (hu_YX.min(), hu_YX.max()) == (-2000, 1896)


def test_clamping_ends_at_air_and_at_12_bits() -> None:
    values = np.array([PADDING_HU, -3024, -2048, -2000, -1025, -1024, 0, 3071, 3072, 20000], np.float32)
    np.testing.assert_array_equal(clamp_hu(values), [-1024] * 6 + [0, 3071, 3071, 3071])
    assert (AIR_HU, MAX_HU) == (-1024, 3071)


@pytest.mark.parametrize("bits", range(9, 17))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
def test_every_number_of_bits_in_every_syntax(tmp_path: Path, syntax: str, signed: bool, bits: int) -> None:
    """The whole range of stored values, ends included, with a slope and an intercept."""
    if bits > 12 and syntax == JPEGLossless:
        pytest.skip("GDCM writes process 14 with a predictor of its choice up to 12 bits")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    stored_YX = np.random.default_rng(bits).integers(low, high + 1, (32, 32))
    stored_YX[0, 0], stored_YX[0, 1] = low, high
    ds = ct_dataset(stored_YX, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(signed))
    ds.RescaleSlope, ds.RescaleIntercept = 2, -1024
    ds.PixelData = stored_YX.astype("<i2" if signed else "<u2").tobytes()
    path = save_as_syntax(ds, tmp_path / "a", syntax)
    np.testing.assert_array_equal(read_hu(one(path)), 2.0 * stored_YX - 1024)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL], ids=lambda uid: uid.name)
def test_high_throughput_jpeg_2000(tmp_path: Path, syntax: str) -> None:
    ds = ct_dataset(head_hu())
    stream = imagecodecs.htj2k_encode(head_hu(), reversible=True)
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    np.testing.assert_array_equal(read_hu(one(tmp_path / "a")), head_hu())


@pytest.mark.parametrize("signed", [True, False])
def test_garbage_in_unused_bits_is_cut_off(tmp_path: Path, signed: bool) -> None:
    stored_YX = np.clip(head_hu() + (0 if signed else 1024), -2048, 4095)
    garbage_YX = np.random.default_rng(0).integers(0, 16, stored_YX.shape) << 12
    ds = ct_dataset(stored_YX, BitsStored=12, HighBit=11, PixelRepresentation=int(signed))
    ds.RescaleIntercept = 0 if signed else -1024
    ds.PixelData = ((stored_YX & 0xFFF) | garbage_YX).astype("<u2").tobytes()
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    np.testing.assert_array_equal(read_hu(one(tmp_path / "a")), head_hu())


@pytest.mark.parametrize("padding", [-2000, -2048, -3024])
@pytest.mark.parametrize("declared", [True, False])
def test_padding_becomes_air(tmp_path: Path, padding: int, declared: bool) -> None:
    hu_YX = head_hu()
    hu_YX[:6] = padding
    path = write_ct(tmp_path / "a", hu_YX, **({"PixelPaddingValue": padding} if declared else {}))
    read_YX = read_hu(one(path))
    assert (read_YX[:6] == (PADDING_HU if declared else padding)).all()
    np.testing.assert_array_equal(clamp_hu(read_YX)[:6], np.full((6, 64), AIR_HU))
    np.testing.assert_array_equal(read_YX[6:], hu_YX[6:])


def test_padding_in_bits_beyond_those_stored(tmp_path: Path) -> None:
    """-2000 in unsigned 12-bit data: cut to 12 bits it would read 2096, which is bone."""
    stored_YX = head_hu() + 1024
    stored_YX[:6] = -2000 % 65536 - 65536
    ds = ct_dataset(stored_YX, BitsStored=12, HighBit=11, PixelRepresentation=0)
    ds.RescaleIntercept = -1024
    ds.add_new("PixelPaddingValue", "US", 63536)
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    read_YX = read_hu(one(tmp_path / "a"))
    assert (read_YX[:6] == PADDING_HU).all()
    np.testing.assert_array_equal(read_YX[6:], head_hu()[6:])


def test_a_range_of_padding(tmp_path: Path) -> None:
    hu_YX = head_hu()
    hu_YX[:4, :], hu_YX[4:6, :] = -2000, -1990
    ds = ct_dataset(hu_YX)
    ds.add_new("PixelPaddingValue", "SS", -2000)
    ds.add_new("PixelPaddingRangeLimit", "SS", -1980)
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    assert (read_hu(one(tmp_path / "a")) == PADDING_HU).sum() == 6 * 64


def test_a_padding_value_that_is_tissue_too_counts_at_the_border_alone(tmp_path: Path) -> None:
    hu_YX = head_hu()
    hu_YX[:6] = 0  # padding
    hu_YX[30:33, 30:33] = 0  # cerebrospinal fluid
    read_YX = read_hu(one(write_ct(tmp_path / "a", hu_YX, PixelPaddingValue=0)))
    assert (read_YX[:6] == PADDING_HU).all()
    np.testing.assert_array_equal(read_YX[6:], hu_YX[6:])


def test_a_small_file_that_claims_a_huge_stream(tmp_path: Path) -> None:
    """The header is right; the stream inside claims 65,535 x 65,535: 8 GB if a decoder believed it."""
    for syntax in (JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless):
        path = save_as_syntax(ct_dataset(head_hu()), tmp_path / "a", syntax)
        ds = pydicom.dcmread(path)
        stream = bytearray(get_frame(ds.PixelData, 0, number_of_frames=1))
        if syntax == JPEG2000Lossless:
            place = stream.index(b"\xff\x51") + 6
            stream[place : place + 8] = struct.pack(">2I", 65535, 65535)
        else:
            place = next(stream.index(m) for m in (b"\xff\xc3", b"\xff\xf7") if m in stream) + 5
            stream[place : place + 4] = struct.pack(">2H", 65535, 65535)
        ds.PixelData = encapsulate([bytes(stream)])
        ds.save_as(path)
        with pytest.raises(DicomError, match=r"picture of \(65535, 65535\) pixels, the header says \(64, 64\)"):
            read_hu(one(path))


def test_a_stream_that_is_lossy_though_the_header_says_otherwise(tmp_path: Path) -> None:
    ds = ct_dataset(head_hu())
    stream = imagecodecs.jpeg2k_encode(head_hu(), level=40, codecformat="j2k", reversible=False)
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.save_as(tmp_path / "a", enforce_file_format=True)
    with pytest.raises(DicomError, match="irreversible transform: lossy"):
        read_hu(one(tmp_path / "a"))
    assert read_hu(replace(one(tmp_path / "a"), lossy=True)).shape == (64, 64)


def test_a_stream_in_several_fragments(tmp_path: Path) -> None:
    for syntax in (JPEG2000Lossless, JPEGLosslessSV1):
        path = save_as_syntax(ct_dataset(head_hu()), tmp_path / "a", syntax)
        ds = pydicom.dcmread(path)
        ds.PixelData = encapsulate([get_frame(ds.PixelData, 0, number_of_frames=1)], fragments_per_frame=3)
        ds.save_as(path)
        np.testing.assert_array_equal(read_hu(one(path)), head_hu())


def test_a_file_that_went_away(tmp_path: Path) -> None:
    image = one(write_ct(tmp_path / "a", head_hu()))
    (tmp_path / "a").unlink()
    with pytest.raises(DicomError, match="cannot be opened"):
        read_hu(image)
