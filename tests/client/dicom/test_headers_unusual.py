"""Images that are right and unusual, which are taken, and those that only look right, which are not."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from client.dicom.elements import identifier
from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice, read_images
from client.dicom.pixels import read_hu
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import sharpness
from client.ingest.resent import without_copies
from client.ingest.workers import WorkerPool
from tests.support.dicom_files import ct_dataset, head_hu, save_as_syntax, write_ct
from tests.support.small_sites import SERIES, draw, edit_data, ingested, make_site, three, tiny_head

KEY = Pseudonyms(b"k" * 32)
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


def one(path: Path) -> CtSlice:
    (image,) = read_images(path, KEY, False, path.name)
    return image


# What follows the pixels


def with_private(ds: Dataset) -> None:
    block = ds.private_block(0x7FE1, "MAKER", create=True)
    block.add_new(0x01, "OB", b"\x01\x02\x00\x00")
    block.add_new(0x02, "LO", "text")


def with_padding(ds: Dataset) -> None:
    ds.add_new(0xFFFCFFFC, "OB", bytes(100))


def with_excess(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData + b"\x01\x00"


def with_sequence(ds: Dataset) -> None:
    item = Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    ds.add_new(0x7FE30010, "SQ", [item])
    ds[0x7FE30010].is_undefined_length = True


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.name)
@pytest.mark.parametrize("change", [with_private, with_padding, with_excess, with_sequence])
def test_what_may_follow_the_pixels(tmp_path: Path, syntax: str, change: Callable[[Dataset], None]) -> None:
    ds = ct_dataset(head_hu())
    change(ds)
    np.testing.assert_array_equal(read_hu(one(save_as_syntax(ds, tmp_path / "a", syntax))), head_hu())


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.name)
@pytest.mark.parametrize("nuls", [1, 2, 7, 2048])
def test_nuls_up_to_the_end_of_a_block(tmp_path: Path, syntax: str, nuls: int) -> None:
    path = save_as_syntax(ct_dataset(head_hu()), tmp_path / "a", syntax)
    path.write_bytes(path.read_bytes() + bytes(nuls))
    np.testing.assert_array_equal(read_hu(one(path)), head_hu())


@pytest.mark.parametrize(
    "tail",
    [b"\x01", b"junk that is no element", b"\xe1\x7f\x10\x00OB\0\0\xff\xff\0\0abc", b"\x08\x00\x05\x00CS\x02\x00AB"],
)
def test_what_may_not_follow_the_pixels(tmp_path: Path, tail: bytes) -> None:
    path = write_ct(tmp_path / "a", head_hu())
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(DicomError, match="bytes after Pixel Data that are no element"):
        one(path)


def test_a_row_more_is_another_picture(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="Pixel Data of 8320 bytes, expected 8192"):
        one(write_ct(tmp_path / "a", head_hu(), PixelData=head_hu().tobytes() + bytes(128)))


# Streams


def in_syntax(path: Path, stream: bytes, syntax: str) -> CtSlice:
    ds = ct_dataset(head_hu())
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)
    return one(path)


@pytest.mark.parametrize("near", [1, 10])
def test_a_near_lossless_stream_under_a_lossless_syntax(tmp_path: Path, near: int) -> None:
    stream = imagecodecs.jpegls_encode((head_hu() + 1024).astype(np.uint16), level=near)
    with pytest.raises(
        DicomError, match=f"JPEG-LS stream with NEAR {near}: lossy.*export the series again without loss"
    ):
        read_hu(in_syntax(tmp_path / "a", stream, JPEGLSLossless))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, "1.2.840.10008.1.2.4.57"])
def test_a_cosine_stream_under_a_lossless_syntax(tmp_path: Path, syntax: str) -> None:
    stream = imagecodecs.jpeg_encode(np.clip(head_hu() // 8 + 128, 0, 255).astype(np.uint8), level=90)
    with pytest.raises(DicomError, match=r"cosine transform \(SOF0\): lossy"):
        read_hu(in_syntax(tmp_path / "a", stream, syntax))


def scan_edited(path: Path, change: Callable[[bytearray, int], None]) -> CtSlice:
    """JPEG Lossless with the last three bytes of its scan's header changed: Ss, Se, and Ah with Al."""
    save_as_syntax(ct_dataset(head_hu() + 1024, RescaleIntercept=-1024), path, JPEGLosslessSV1)
    stream = bytearray(get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1))
    place = stream.index(b"\xff\xda")
    change(stream, place + 2 + struct.unpack_from(">H", stream, place + 2)[0] - 3)
    ds = pydicom.dcmread(path)
    ds.PixelData = encapsulate([bytes(stream)])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)
    return one(path)


@pytest.mark.parametrize(("place", "value"), [(1, 63), (1, 5), (2, 0x10), (2, 0xF0)])
def test_a_lossless_scan_with_numbers_that_mean_nothing(tmp_path: Path, place: int, value: int) -> None:
    def change(stream: bytearray, at: int) -> None:
        stream[at + place] = value

    np.testing.assert_array_equal(read_hu(scan_edited(tmp_path / "a", change)), head_hu())


def test_a_lossless_scan_that_drops_bits(tmp_path: Path) -> None:
    def change(stream: bytearray, at: int) -> None:
        stream[at + 2] = 0x02

    with pytest.raises(DicomError, match="point transform of 2 bits: lossy"):
        read_hu(scan_edited(tmp_path / "a", change))


# Values


@pytest.mark.parametrize("padding", [-1000, -1024, -900])
def test_padding_that_is_airs_own_value_is_air(tmp_path: Path, padding: int) -> None:
    hu_YX = np.where(head_hu() < -500, padding, head_hu())
    read_YX = read_hu(one(write_ct(tmp_path / "a", hu_YX, PixelPaddingValue=padding)))
    np.testing.assert_array_equal(read_YX, hu_YX)


def test_a_series_whose_padding_is_air_is_taken(tmp_path: Path) -> None:
    cache, report = ingested(make_site(tmp_path, three(PixelPaddingValue=-1000)))
    assert (report.slices, report.faults) == (3, ())
    assert cache.hu.min() == -1024  # beyond the picture


def test_a_rescale_of_its_own_on_every_slice(tmp_path: Path) -> None:
    """As some scanners write: slope and intercept of each slice make its own HU."""
    images = three()
    for n, settings in enumerate(images.values()):
        slope, intercept = 1 + n / 2, -1024 + 100 * n
        stored = np.rint((tiny_head() - intercept) / slope)
        settings |= {"hu_YX": stored, "RescaleSlope": slope, "RescaleIntercept": intercept}
    _, report = ingested(make_site(tmp_path, images))
    assert (report.slices, report.faults) == (3, ())


@pytest.mark.parametrize(("wrong", "left"), [(1, 1), (2, 2)])
def test_slices_that_lost_their_intercept_are_left_out(tmp_path: Path, wrong: int, left: int) -> None:
    images = three()
    for n, settings in enumerate(images.values()):
        settings |= {"hu_YX": tiny_head() + 1024, "RescaleIntercept": 0 if n < wrong else -1024}
    _, report = ingested(make_site(tmp_path, images))
    assert report.slices == 3 - left
    assert len(report.faults) == left
    assert all("no air near -1000 HU with its RescaleSlope 1 and RescaleIntercept 0" in f.reason for f in report.faults)


# Words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("HEAD 1 YEAR FOLLOW UP", "unknown"),
        ("CROSSOVER", "unknown"),
        ("linear", "unknown"),
        ("nuclear", "unknown"),
        ("TROMBONE", "unknown"),
        ("sharpened", "unknown"),
        ("Head 5.0 BONE", "sharp"),
        ("HEAD_BONE_1.0", "sharp"),
        ("bone1.25", "sharp"),
        ("BONEPLUS", "sharp"),
        ("Schädelknochen", "sharp"),
        ("Knochenfenster", "sharp"),
        ("Tête osseux", "sharp"),
        ("inner ear", "sharp"),
        ("IAC 0.6", "sharp"),
    ],
)
def test_words_of_a_description_are_matched_as_words(tmp_path: Path, words: str, expected: str) -> None:
    path = write_ct(tmp_path / "a", SeriesDescription=words, SpecificCharacterSet="ISO_IR 192")
    assert sharpness(one(path)) == expected


@pytest.mark.parametrize(
    ("agent", "given"),
    [
        *(
            (word, False)
            for word in (
                "NONE",
                "none",
                "No",
                "NO CONTRAST",
                "W/O",
                "without",
                "ohne KM",
                "NATIVE",
                "N/A",
                "-",
                "0",
                "",
            )
        ),
        *((word, True) for word in ("IV", "Omnipaque 300", "NON-IONIC", "APPLIED", "Nonionic 350", "yes")),
    ],
)
def test_none_is_no_contrast_agent(tmp_path: Path, agent: str, given: bool) -> None:
    assert one(write_ct(tmp_path / "a", ContrastBolusAgent=agent)).contrast is given


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("CT_SCREENING", False),
        ("OVERFLOW", False),
        ("CLASSD", False),
        ("MIP", True),
        ("THICK_MIP", True),
        ("SCREEN SAVE", True),
    ],
)
def test_words_of_an_image_type(tmp_path: Path, kind: str, refused: bool) -> None:
    path = write_ct(tmp_path / "a", ImageType=["ORIGINAL", "PRIMARY", "AXIAL", kind])
    if refused:
        with pytest.raises(DicomError, match="computed map or a screenshot"):
            one(path)
    else:
        assert one(path).shape == (16, 16)


# Identifiers


def kanji_with_a_backslash() -> str:
    """A character that has the byte 5C in ISO 2022 IR 87, as many have."""
    return next(c for c in map(chr, range(0x4E00, 0x9FFF)) if b"\\" in c.encode("iso2022_jp", "ignore"))


@pytest.mark.parametrize(
    ("charset", "encoding"), [("\\ISO 2022 IR 87", "iso2022_jp"), ("GB18030", "gb18030"), ("ISO_IR 13", "shift_jis")]
)
def test_a_backslash_within_a_character_splits_no_identifier(tmp_path: Path, charset: str, encoding: str) -> None:
    letter = kanji_with_a_backslash() if encoding == "iso2022_jp" else "乗" if encoding == "gb18030" else "ﾊ\\"
    patients = set()
    for n in (1, 2):
        value = f"{letter}-{n}".encode(encoding)
        path = write_ct(tmp_path / f"{n}", patient="X" * 12, SpecificCharacterSet=charset)
        path.write_bytes(path.read_bytes().replace(b"X" * 12, value.ljust(12, b" ")))
        patients.add(one(path).patient)
    assert len(patients) == 2


def test_bytes_that_cannot_be_decoded_tell_patients_apart(tmp_path: Path) -> None:
    found = set()
    for letter in (b"\xfc", b"\xf6"):  # Latin-1, declared as UTF-8
        path = write_ct(tmp_path / "a", patient="Mxller-1", SpecificCharacterSet="ISO_IR 192")
        path.write_bytes(path.read_bytes().replace(b"Mxller-1", b"M" + letter + b"ller-1"))
        found.add(identifier(pydicom.dcmread(path), "PatientID"))
    assert len(found) == 2


# Sent twice


def test_slices_sent_twice_under_new_uids_count_once_and_answer_to_both_names(tmp_path: Path) -> None:
    images = three() | {f"again-{n}": s | {"sop": f"9.{s['sop']}"} for n, s in three().items()}
    labels = f"series_uid,sop_uid,hypodensity\n{SERIES},{SERIES}.1,1\n{SERIES},9.{SERIES}.2,0\n"
    file = make_site(tmp_path, images, labels=labels, data={"masks": "masks"})
    draw(tmp_path / "masks", f"9.{SERIES}.3")
    edit_data(file, segment=1)
    cache, report = ingested(file)
    assert (report.slices, report.positives, report.unlabelled, report.masked) == (3, 1, 1, 1)
    assert len(report.faults) == 3
    assert all("the same picture at the same place as file" in f.reason for f in report.faults)
    np.testing.assert_array_equal(np.nan_to_num(cache.label, nan=9), [1, 0, 9])


def test_a_copy_in_another_compression_is_a_copy(tmp_path: Path) -> None:
    settings = {"position": (0, 0, 5.0), "series": SERIES}
    write_ct(tmp_path / "a", head_hu(), sop="1.2.1", **settings)
    save_as_syntax(ct_dataset(head_hu(), sop="1.2.2", **settings), tmp_path / "b", JPEGLSLossless)
    write_ct(tmp_path / "c", head_hu(seed=1), sop="1.2.3", position=(0, 0, 10.0), series=SERIES)
    with WorkerPool(1) as crew:
        kept, faults = without_copies([one(tmp_path / name) for name in "abc"], crew)
    assert (len(kept), len(faults)) == (2, 1)
    assert sum(len(image.copies) for image in kept) == 1


def test_two_pictures_at_one_place_are_no_copies(tmp_path: Path) -> None:
    twin = next(iter(three().values())) | {"hu_YX": tiny_head(41), "sop": "1.2.99"}
    good = {f"good{n}": settings for n, settings in three("1.2.826.7", StudyInstanceUID="1.2.7").items()}
    file = make_site(tmp_path, three() | {"other": twin} | good)
    _, report = ingested(file)
    (fault,) = report.faults
    assert "1 of 4 slices at the position of another and not equal to it" in fault.reason
    assert report.series == 1
