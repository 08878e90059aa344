from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset

from client.dicom.faults import DicomError
from client.ingest.scan import FoundFile, scan_file
from client.masks.match import match_masks, read_masks
from tests.support.dicom_files import write_series
from tests.support.mask_files import KEY, grid_of, masks_of, read_one, refused, series_of, truth, volume, write_seg

# NIfTI


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


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
    for segments in ((), ("Hematoma",)):
        refused(
            path, series, r"numbers 1, 2 and no names: .* name its number in site.yaml, as data.segment: 1", segments
        )
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
        (np.arange(64 * 64, dtype=np.uint8).reshape(64, 64), r"numbers 1, 2, 3, 4, 5, 6, 7, 8 and no names"),
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
            read = read_masks(files, series[0], KEY, ())
            assert read.masks == {}
            faults += read.faults
        assert faults
        assert not any(text in str(faults) for text in ("Doe", "1.2.826", str(tmp_path)))


def test_a_qform_against_the_sform_is_refused(tmp_path: Path, images: list[Path]) -> None:
    """nibabel believes the sform, ITK the qform: one of them reads the mirror image."""
    affine = grid_of("LPS", (64, 64, 4), (1, 1, 5))
    mirrored = grid_of("RPS", (64, 64, 4), (1, 1, 5))
    image = nibabel.Nifti1Image(truth().transpose(2, 1, 0), affine)
    image.header.set_qform(mirrored, 1)
    image.header.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "m.nii.gz")
    with pytest.raises(DicomError, match=r"qform and sform contradict each other by 63.0 voxels.*DICOM SEG"):
        read_one(tmp_path / "m.nii.gz")
    image.header.set_qform(affine, 1)
    nibabel.save(image, tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(volume(tmp_path / "m.nii.gz", series_of(*images)), truth())


def test_a_nifti_without_qform_and_sform_is_refused(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(truth().transpose(2, 1, 0), None)
    image.header.set_qform(None, 0)
    image.header.set_sform(None, 0)
    nibabel.save(image, tmp_path / "m.nii.gz")
    with pytest.raises(DicomError, match="neither qform nor sform"):
        read_one(tmp_path / "m.nii.gz")


@pytest.mark.parametrize("name", ["M.NII", "M.NII.GZ", "m.Nii.gz"])
def test_suffixes_in_any_case(tmp_path: Path, images: list[Path], name: str) -> None:
    args = truth().transpose(2, 1, 0), grid_of("LPS", (64, 64, 4), (1, 1, 5))
    shutil.move(nifti(tmp_path / ("m.nii.gz" if name.lower().endswith("gz") else "m.nii"), *args), tmp_path / name)
    np.testing.assert_array_equal(volume(tmp_path / name, series_of(*images)), truth())
    shutil.move(png(tmp_path, "1.2.826.1.2", truth()[1]), tmp_path / "1.2.826.1.2.PNG")
    assert masks_of(tmp_path / "1.2.826.1.2.PNG", series_of(*images))[0][1].any()


def test_layers_beside_the_series_are_counted_and_missed_only_where_something_is_drawn(
    tmp_path: Path, images: list[Path]
) -> None:
    voxels, affine = np.zeros((64, 64, 7), np.uint8), grid_of("LPS", (64, 64, 7), (1, 1, 5))
    voxels[..., :4] = truth().transpose(2, 1, 0)
    voxels[5:9, 5:9, 5] = 1
    path = nifti(tmp_path / "1.2.826.1.nii.gz", voxels, affine)
    (series,) = series_of(*images)
    read = read_masks([read_one(path)], series, KEY, ())
    (tally,) = read.tallies
    assert (tally.total, tally.taken, dict(tally.left)) == (
        7,
        4,
        {"at a place where its series has no image": 1, "empty, at a place where its series has no image": 2},
    )
    assert [f.reason for f in read.faults] == ["1 of its 7 layers left out: at a place where its series has no image"]


def test_white_where_another_number_is_named(tmp_path: Path, images: list[Path]) -> None:
    """0 and 255 with data.segment 1 would be an empty mask."""
    path = png(tmp_path, "1.2.826.1.2", truth()[1] * np.uint8(255))
    refused(path, series_of(*images), r"black and white mask \(0 and 255\).* add 255 to data.segment", (1,))
    assert masks_of(path, series_of(*images), (1, 255))[0][1].any()


def test_two_label_maps_of_one_series(tmp_path: Path, images: list[Path]) -> None:
    (series,), affine = series_of(*images), grid_of("LPS", (64, 64, 4), (1, 1, 5))
    a, b = truth().transpose(2, 1, 0).copy(), truth().transpose(2, 1, 0).copy()
    a[..., 0], b[..., 1:] = 0, 0
    files = [read_one(nifti(tmp_path / f"{n}.nii.gz", one, affine)) for n, one in enumerate((a, b))]
    read = read_masks(files, series, KEY, ())
    np.testing.assert_array_equal(np.stack([read.masks[s.image] for s in series.slices]), truth())


def test_masks_of_two_kinds_are_left_out_both(tmp_path: Path, images: list[Path], datasets: list[Dataset]) -> None:
    paths = [write_seg(tmp_path / "seg", datasets, truth()), png(tmp_path, "1.2.826.1.2", truth()[1])]
    matched, faults = match_masks([read_one(p) for p in paths], series_of(*images))
    assert (matched, len(faults)) == ({}, 2)
    assert all("in png and seg: which counts is not known" in f.reason for f in faults)


@pytest.mark.parametrize(("name", "kind"), [("m.nrrd", "NRRD"), ("m.seg.nrrd", "NRRD"), ("m.mha", "MetaImage")])
def test_formats_that_are_not_read_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"NRRD0004\n" + bytes(200))
    with pytest.raises(DicomError, match=f"a {kind} file, which is not read; save the mask as DICOM SEG or NIfTI"):
        read_one(tmp_path / name)
