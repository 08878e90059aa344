"""DICOM SEG as other programs write it: without references, with some of them, in other encodings, a file per segment."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from client.masks.match import match_masks, read_masks
from tests.support.dicom_files import write_series
from tests.support.mask_files import KEY, masks_of, read_one, refused, series_of, truth, volume, write_seg

AREAS = [150, 117, 88, 0]


def written(
    tmp_path: Path, datasets: list[Dataset], change: Callable[[Dataset], object] = lambda ds: None, **options: object
) -> Path:
    """A SEG of the truth, changed as another program would have written it."""
    path = write_seg(tmp_path / "seg.dcm", datasets, truth(), **options)
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)
    return path


def frames(ds: Dataset) -> list[Dataset]:
    return list(ds.PerFrameFunctionalGroupsSequence)


def without(*names: str, of: slice = slice(None)) -> Callable[[Dataset], None]:
    """Removes elements of the file or of its frames."""

    def change(ds: Dataset) -> None:
        for name in names:
            for group in [ds, *frames(ds)[of]]:
                if name in group:
                    delattr(group, name)

    return change


def without_macro(name: str) -> Callable[[Dataset], None]:
    """Removes a functional group, of the frames or shared."""

    def change(ds: Dataset) -> None:
        for group in [*frames(ds), *ds.SharedFunctionalGroupsSequence]:
            if name in group:
                delattr(group, name)

    return change


REFERENCES = ("ReferencedSeriesSequence", "SourceImageSequence", "DerivationImageSequence")


@pytest.mark.parametrize(
    ("gone", "of", "looked"),
    [
        (("ReferencedSeriesSequence",), slice(None), 4),
        (("DerivationImageSequence",), slice(None), 4),
        (("DerivationImageSequence",), slice(1, 2), 4),
        (("ReferencedSeriesSequence", "DerivationImageSequence"), slice(None), 4),
        (REFERENCES[:2], slice(None), 3),
        (REFERENCES, slice(None), 3),
        ((*REFERENCES, "FrameOfReferenceUID"), slice(None), 3),
    ],
)
def test_frames_are_placed_by_position_where_references_are_missing(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], gone: tuple[str, ...], of: slice, looked: int
) -> None:
    """An image that no reference lists and no frame shows has no mask: whether somebody looked at it is not known."""
    path = written(tmp_path, datasets, without(*gone, of=of))
    masks, remarks = masks_of(path, series_of(*images))
    assert [0 if m is None else int(m.sum()) for m in masks] == AREAS
    assert (sum(m is not None for m in masks), remarks) == (looked, [])


def test_a_frame_names_an_image_that_the_list_does_not(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    def shorten(ds: Dataset) -> None:
        del ds.SourceImageSequence
        del ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence[1:]

    np.testing.assert_array_equal(volume(written(tmp_path, datasets, shorten), series_of(*images)), truth())


def test_without_references_one_of_two_series_must_fit(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    path = written(tmp_path, datasets, without(*REFERENCES))
    twin = write_series(tmp_path / "twin", series="1.2.5")
    _, (fault,) = match_masks([read_one(path)], series_of(*images, *twin))
    assert "its frames lie on those of 2 series, expected 1; export it with its references" in fault.reason
    far = write_series(tmp_path / "far", series="1.2.6", FrameOfReferenceUID="1.2.99")
    matched, _ = match_masks([read_one(path)], series_of(*images, *far))
    assert len(matched) == 1
    matched, (fault,) = match_masks([read_one(path)], series_of(*far))
    assert (matched, "of 0 series" in fault.reason) == ({}, True)


def test_frames_of_one_segment_on_one_image_are_united(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    both = np.stack([truth(), np.roll(truth(), 9, axis=2)], axis=-1)
    path = write_seg(tmp_path / "seg.dcm", datasets, both, labels=("Clot", "More"))
    ds = pydicom.dcmread(path)
    for group in frames(ds):
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 1
    ds.save_as(path)
    np.testing.assert_array_equal(volume(path, series_of(*images), ("Clot",)), both.max(axis=-1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            without_macro("PlanePositionSequence"),
            "a frame without ImagePositionPatient .*, so where it lies is not known",
        ),
        (without_macro("PlaneOrientationSequence"), "a frame without ImageOrientationPatient"),
        (without_macro("PixelMeasuresSequence"), "a frame without PixelSpacing"),
        (without_macro("SegmentIdentificationSequence"), "frame 1 is of no segment that the file describes"),
        (without("SegmentSequence"), "describes no segment"),
        (without("SegmentationType"), "none of BINARY, FRACTIONAL and LABELMAP"),
        (without("NumberOfFrames"), "NumberOfFrames None, but 3 frames"),
        (lambda ds: setattr(ds, "NumberOfFrames", 4), "NumberOfFrames 4, but 3 frames are described"),
        (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(1), "NumberOfFrames 3, but 2 frames are described"),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData[:-40]), "Pixel Data of .* bytes, expected"),
        (lambda ds: setattr(ds, "PixelData", ds.PixelData * 2), "Pixel Data of .* bytes, expected"),
        (lambda ds: setattr(ds, "Columns", 32), "Pixel Data of .* bytes, expected"),
        (lambda ds: setattr(ds, "BitsAllocated", 32), "BitsAllocated 32"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], change: Callable, reason: str
) -> None:
    refused(written(tmp_path, datasets, change), series_of(*images), reason)


@pytest.mark.parametrize("gone", ["SegmentedPropertyTypeCodeSequence", "SegmentLabel", "both"])
def test_a_segment_without_a_name_or_code(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], gone: str
) -> None:
    names = ("SegmentedPropertyTypeCodeSequence", "SegmentLabel") if gone == "both" else (gone,)

    def change(ds: Dataset) -> None:
        for name in names:
            delattr(ds.SegmentSequence[0], name)

    path = written(tmp_path, datasets, change)
    np.testing.assert_array_equal(volume(path, series_of(*images)), truth())
    np.testing.assert_array_equal(volume(path, series_of(*images), (1,)), truth())
    if gone != "SegmentLabel":
        assert gone == "both" or volume(path, series_of(*images), ("hematoma ",)).any()


def test_a_frame_that_lies_elsewhere_than_the_image_it_names(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    def move(ds: Dataset) -> None:
        frames(ds)[1].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 15]

    refused(written(tmp_path, datasets, move), series_of(*images), r"a frame of the mask lies \d+.0 mm from its image")


def test_a_frame_beside_all_images_is_named_and_its_neighbour_gets_no_empty_mask(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    def move(ds: Dataset) -> None:
        without("DerivationImageSequence")(ds)
        frames(ds)[1].PlanePositionSequence[0].ImagePositionPatient = [0, 0, 6.0]

    masks, (remark,) = masks_of(written(tmp_path, datasets, move), series_of(*images))
    assert remark.reason == "1 of its 3 frames left out: at a place where its series has no image"
    assert [m is None for m in masks] == [False, True, False, True], "the last was listed, and may be the frame's"


# Encodings


def save_deflated(ds: Dataset, path: Path) -> None:
    """In a transfer syntax that pydicom does not know and so does not write."""
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.save_as(path, implicit_vr=False, little_endian=True)
    path.write_bytes(path.read_bytes().replace(JPEG2000Lossless.encode(), b"1.2.840.10008.1.2.8.1\0", 1))


def test_deflated_frames(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    path = write_seg(tmp_path / "seg.dcm", datasets, truth(), omit_empty_frames=False)
    ds = pydicom.dcmread(path)
    order = [g.PlanePositionSequence[0].ImagePositionPatient[2] for g in frames(ds)]
    stored = [np.packbits(truth()[int(z / 5)], bitorder="little").tobytes() for z in order]
    deflated = []
    for data in stored:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        deflated.append(deflate.compress(data) + deflate.flush())
    ds.PixelData = encapsulate(deflated)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    save_deflated(ds, path)
    np.testing.assert_array_equal(volume(path, series_of(*images)), truth())
    ds.PixelData = encapsulate([part[: len(part) // 2] for part in deflated])
    ds["PixelData"].is_undefined_length = True
    save_deflated(ds, path)
    refused(path, series_of(*images), r"frame \d is deflated and damaged|frame \d inflates to")


def test_encodings_that_are_not_read_are_named(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    ds = pydicom.dcmread(write_seg(tmp_path / "seg.dcm", datasets, truth()))
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    pydicom.dcmwrite(tmp_path / "big.dcm", ds, implicit_vr=False, little_endian=False, force_encoding=True)
    refused(tmp_path / "big.dcm", series_of(*images), "segments in Explicit VR Big Endian, which is not read for masks")
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    ds.PixelData = encapsulate([b"\0" * 64] * 3)
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = RLELossless
    ds.save_as(tmp_path / "rle.dcm", implicit_vr=False, little_endian=True)
    refused(tmp_path / "rle.dcm", series_of(*images), r"segments in RLE Lossless \(single bits\), which is not read")


def test_a_lossy_mask_is_refused(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    path = write_seg(tmp_path / "seg.dcm", datasets, truth(), kind="LABELMAP", syntax=JPEGLSLossless)
    np.testing.assert_array_equal(volume(path, series_of(*images)), truth())
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xda")
    data[place + 7] = 2  # NEAR, behind the length, one component's two bytes and their count
    path.write_bytes(data)
    refused(path, series_of(*images), "JPEG-LS stream with NEAR 2: lossy")


# Several files of one series


def two(tmp_path: Path, datasets: list[Dataset], a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> list:
    paths = [
        write_seg(tmp_path / f"{n}.dcm", datasets, mask, labels=(label,))
        for n, (mask, label) in enumerate(zip((a, b), labels, strict=True))
    ]
    return [read_one(path) for path in paths]


def first_and_rest() -> tuple[np.ndarray, np.ndarray]:
    a, b = truth(), truth()
    a[1:], b[0] = 0, 0
    return a, b


@pytest.mark.parametrize(
    ("labels", "segments"), [(("IPH", "IVH"), ("IPH", "IVH")), (("Clot", "Clot"), ()), (("Clot", "clot "), ("clot",))]
)
def test_a_file_per_segment_or_lesion_is_united(
    tmp_path: Path, images: list[Path], datasets: list[Dataset], labels: tuple, segments: tuple
) -> None:
    files = two(tmp_path, datasets, *first_and_rest(), labels)
    (series,) = series_of(*images)
    matched, faults = match_masks(files, [series])
    assert faults == []
    read = read_masks(matched[series.name], series, KEY, segments)
    assert read.faults == ()
    np.testing.assert_array_equal(np.stack([read.masks[s.image] for s in series.slices]), truth())
    assert [(t.total, t.taken) for t in read.tallies] in ([(1, 1), (2, 2)], [(2, 2), (1, 1)])


def test_files_of_two_segments_of_which_none_is_named_are_refused_both(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    files, (series,) = two(tmp_path, datasets, *first_and_rest(), ("IPH", "Ventricle")), series_of(*images)
    read = read_masks(files, series, KEY, ())
    assert read.masks == {}
    assert [f.what for f in read.faults] == ["file 0.dcm", "file 1.dcm"]
    assert all("hold 2 different segments: expected one" in f.reason for f in read.faults)
    named = read_masks(files, series, KEY, ("IPH",))
    assert sum(int(m.sum()) for m in named.masks.values()) == AREAS[0]
    (fault,) = named.faults
    assert "data.segment ['IPH'] is not among them" in fault.reason


def test_two_drawings_of_one_lesion_are_refused_both(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    (series,) = series_of(*images)
    files = two(tmp_path, datasets, truth(), np.roll(truth(), 1, axis=1), ("Clot", "Clot"))
    read = read_masks(files, series, KEY, ())
    assert (read.masks, len(read.faults)) == ({}, 2)
    assert all("draw the same segment of one image differently" in f.reason for f in read.faults)
    assert [(t.taken, sum(n for _, n in t.left)) for t in read.tallies] == [(0, 3), (0, 3)]
    same = two(tmp_path, datasets, truth(), truth(), ("Clot", "Clot"))
    assert sum(int(m.sum()) for m in read_masks(same, series, KEY, ()).masks.values()) == sum(AREAS)


def test_one_damaged_file_costs_the_masks_of_its_series(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    """Half a mask would be taken for a whole one."""
    files, (series,) = two(tmp_path, datasets, *first_and_rest(), ("Clot", "Clot")), series_of(*images)
    (tmp_path / "1.dcm").write_bytes((tmp_path / "1.dcm").read_bytes()[:-90])
    read = read_masks(files, series, KEY, ())
    assert read.masks == {}
    assert [f.what for f in read.faults] == ["file 1.dcm", "file 0.dcm"]
    assert "another mask file of its series cannot be used" in read.faults[1].reason


def test_another_segment_than_the_one_that_is_named_is_left_out_and_counted(
    tmp_path: Path, images: list[Path], datasets: list[Dataset]
) -> None:
    both = np.stack([truth(), np.roll(truth(), 9, axis=2)], axis=-1)
    path = write_seg(tmp_path / "seg.dcm", datasets, both, labels=("Clot", "Ventricle"))
    (series,) = series_of(*images)
    read = read_masks([read_one(path)], series, KEY, ("clot",))
    (tally,) = read.tallies
    assert (tally.kind, tally.total, tally.taken) == ("frames", 6, 3)
    assert tally.left == (("of another segment than data.segment", 3),)
    assert read.faults == ()
