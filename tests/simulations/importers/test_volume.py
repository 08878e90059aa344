from __future__ import annotations

import gzip
from io import BytesIO
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from simulations.importers.source import SourceError
from simulations.importers.volume import Volume, ct_images, mask_bytes, read_mask, read_volume, series_of, uid
from tests.simulations.importers.conftest import write_nifti


def read_series(folder: Path) -> list[pydicom.Dataset]:
    """A scan's images in order of their file names."""
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def rotation(x_degree: float, y_degree: float, z_degree: float) -> NDArray[np.float64]:
    a, b, c = np.deg2rad([x_degree, y_degree, z_degree])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def affine_of(directions: NDArray, spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    affine[:3, 3] = [-101.25, 33.5, -690.125]
    return affine


SHEARED = affine_of(np.eye(3), (0.4, 0.5, 5.0))
SHEARED[1, 2] = 1.5  # slices of a tilted gantry, each at its true place

AFFINES = {
    "published": affine_of(np.diag([-1, 1, 1]), (0.4, 0.5, 5.0)),
    "as a scanner's": affine_of(np.diag([-1, -1, 1]), (0.4, 0.5, 5.0)),
    "head first": affine_of(np.diag([-1, -1, -1]), (0.4, 0.5, 2.5)),
    "oblique": affine_of(rotation(17, -8, 25), (0.4, 0.5, 5.0)),
    "axes swapped": affine_of(np.eye(3)[:, [1, 0, 2]], (0.4, 0.5, 5.0)),
    "swapped and turned": affine_of(rotation(5, 3, 100) @ np.diag([1, -1, 1]), (0.4, 0.5, 5.0)),
    "sheared": SHEARED,
}


def volume_of(affine: NDArray) -> Volume:
    rng = np.random.default_rng(3)
    return Volume(rng.integers(-1024, 3071, (5, 7, 4)).astype(np.int16), affine)


def images_of(volume: Volume) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(BytesIO(content)) for content in ct_images(volume, "set", "scan", "patient")]


@pytest.mark.parametrize("name", AFFINES)
def test_every_voxel_keeps_its_value_and_its_place(name: str) -> None:
    """By PS3.3 C.7.6.2.1.1, spelt out: position + column * row direction + row * column direction."""
    volume = volume_of(AFFINES[name])
    seen = 0
    for image in images_of(volume):
        position = np.array(image.ImagePositionPatient, dtype=float)
        along_row, down_column = np.array(image.ImageOrientationPatient, dtype=float).reshape(2, 3)
        between_rows, between_columns = map(float, image.PixelSpacing)
        hu_YX = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        for row, column in np.ndindex(hu_YX.shape):
            place = position + column * between_columns * along_row + row * between_rows * down_column
            ras = place * [-1, -1, 1]
            voxel = np.linalg.solve(volume.affine, [*ras, 1.0])[:3]
            assert np.abs(voxel - np.rint(voxel)).max() < 1e-9
            assert hu_YX[row, column] == volume.hu_IJK[tuple(np.rint(voxel).astype(int))]
            seen += 1
    assert seen == volume.hu_IJK.size


@pytest.mark.parametrize("name", [name for name in AFFINES if name != "sheared"])
def test_highdicom_places_the_series_where_nibabel_does(name: str) -> None:
    """An independent reader's affine (left, posterior, superior; slice, row, column) against NIfTI's."""
    volume = volume_of(AFFINES[name])
    read = highdicom.get_volume_from_series(images_of(volume))
    for index in np.ndindex(read.array.shape):
        ras = (read.affine @ [*index, 1.0])[:3] * [-1, -1, 1]
        voxel = np.rint(np.linalg.solve(volume.affine, [*ras, 1.0])[:3]).astype(int)
        assert read.array[index] == volume.hu_IJK[tuple(voxel)]


@pytest.mark.parametrize("name", AFFINES)
def test_pictures_are_upright_where_they_can_be(name: str) -> None:
    orientation = np.array(images_of(volume_of(AFFINES[name]))[0].ImageOrientationPatient, dtype=float)
    assert orientation[0] > 0.7  # columns to the patient's left
    assert orientation[4] > 0.7  # rows to the back


def test_the_published_grid_by_hand() -> None:
    """-0.4, 0.5, 5 mm from (-101.25, 33.5, -690.125): x runs left already; y runs to the front and is turned, 7 rows."""
    images = images_of(volume_of(AFFINES["published"]))
    assert [list(map(float, image.ImagePositionPatient)) for image in images[:2]] == [
        [101.25, -33.5 - 6 * 0.5, -690.125],
        [101.25, -33.5 - 6 * 0.5, -685.125],
    ]
    assert list(map(float, images[0].ImageOrientationPatient)) == [1, 0, 0, 0, 1, 0]
    assert list(map(float, images[0].PixelSpacing)) == [0.5, 0.4]
    assert (images[0].Rows, images[0].Columns) == (7, 5)
    assert [image.InstanceNumber for image in images] == [1, 2, 3, 4]


def test_the_files_are_valid_ct_images() -> None:
    images = images_of(volume_of(AFFINES["oblique"]))
    first = images[0]
    assert first.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert first.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID
    assert (first.BitsAllocated, first.BitsStored, first.HighBit, first.PixelRepresentation) == (16, 16, 15, 1)
    assert (first.RescaleSlope, first.RescaleIntercept, first.RescaleType) == (1, 0, "HU")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        value = first[keyword].value
        assert value.is_valid
        assert value.startswith("2.25.")
    # Type 2 of the CT image's modules: present, empty where a NIfTI does not tell (PS3.3 A.3).
    assert {
        *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "SeriesNumber", "Manufacturer"),
        *("PositionReferenceIndicator", "InstanceNumber", "SliceThickness", "KVP", "AcquisitionNumber"),
    } <= set(first.dir())
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    assert len({image.SeriesInstanceUID for image in images}) == 1
    for image in images:  # decimal strings of at most 16 characters (PS3.5 6.2)
        numbers = [*image.ImagePositionPatient, *image.ImageOrientationPatient, *image.PixelSpacing]
        assert all(len(str(number)) <= 16 for number in numbers)


def test_uids_come_from_the_names_and_bytes_repeat() -> None:
    volume = volume_of(AFFINES["oblique"])
    assert list(ct_images(volume, "set", "scan", "p")) == list(ct_images(volume, "set", "scan", "p"))
    assert uid("set", "scan", "series") == uid("set", "scan", "series")
    assert series_of("set", "scan", 2) != series_of("set", "other", 2)
    assert series_of("set", "scan", 2) != series_of("other", "scan", 2)
    # Pinned: a change would make every imported hospital another one.
    assert uid("physionet-ich", "049", "series") == "2.25.128863158839636175542988835062854633339"


def test_values_are_rounded_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    values = np.array([[[-1024.4]], [[12.5]], [[40.51]]])
    write_nifti(path, values, np.eye(4))
    assert read_volume(path).hu_IJK.ravel().tolist() == [-1024, 12, 41]
    write_nifti(path, np.full((2, 2, 2), 40000.0), np.eye(4))
    with pytest.raises(SourceError, match="values from 40000 to 40000, expected HU between -32768 and 32767"):
        read_volume(path)
    write_nifti(path, np.full((2, 2, 2), np.inf), np.eye(4))
    with pytest.raises(SourceError, match="8 values are not finite"):
        read_volume(path)
    write_nifti(path, np.zeros((2, 2), np.int16), np.eye(4))
    with pytest.raises(SourceError, match=r"NIfTI of shape \(2, 2\) and type int16, expected three dimensions"):
        read_volume(path)
    write_nifti(path, np.zeros((2, 2, 2, 1), np.int16), np.eye(4))
    assert read_volume(path).hu_IJK.shape == (2, 2, 2)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError, match="cannot be read as NIfTI"):
        read_volume(path)


def test_axes_that_dicom_cannot_express_are_refused(tmp_path: Path) -> None:
    skewed = np.eye(4)
    skewed[0, 1] = 0.2
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), skewed)
    image.to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(SourceError, match=r"meet at 78\.7 degrees, expected a right angle"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_mask_lies_on_its_image(tmp_path: Path) -> None:
    volume, path = volume_of(AFFINES["oblique"]), tmp_path / "m.nii.gz"
    labels = np.zeros(volume.hu_IJK.shape, np.uint8)
    labels[1, 2, 3] = 4
    write_nifti(path, labels, volume.affine)
    mask = read_mask(path, volume, binary=False)
    assert mask.as_stored
    assert np.array_equal(mask.labels_IJK, labels)
    binary = read_mask(path, volume, binary=True)
    assert not binary.as_stored
    assert (binary.labels_IJK[1, 2, 3], binary.labels_IJK.sum()) == (1, 1)
    content = mask_bytes(binary, volume)
    assert content[4:8] == bytes(4)  # gzip's time, which would change the bytes
    written = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    assert np.array_equal(written.get_fdata(), binary.labels_IJK)
    assert np.allclose(written.affine, volume.affine, atol=1e-4)
    nearly = volume.affine.copy()
    nearly[:3, 3] += 0.01 * nearly[:3, 0]  # a hundredth of a voxel, as headers in float32 may be off
    write_nifti(path, labels, nearly)
    assert np.array_equal(read_mask(path, volume, binary=False).labels_IJK, labels)
    turned = volume.affine @ np.diag([1, 1, -1, 1])
    write_nifti(path, labels, turned)
    with pytest.raises(SourceError, match=r"mask lies up to 6 voxels off its image by their affines, expected 0\.05"):
        read_mask(path, volume, binary=False)
    write_nifti(path, labels[:, :, :3], volume.affine)
    with pytest.raises(SourceError, match=r"mask of shape \(5, 7, 3\), its image has \(5, 7, 4\)"):
        read_mask(path, volume, binary=False)
    write_nifti(path, np.full(labels.shape, -1, np.int16), volume.affine)
    with pytest.raises(SourceError, match="mask with values below 0"):
        read_mask(path, volume, binary=False)
