"""A NIfTI volume as a CT series, its mask beside it.

In: a CT volume in HU and a mask on its grid, as the sets publish them. Out: one CT Image Storage file per layer of the
third voxel axis, and the mask under the series' UID. Values and places are kept: a voxel has the same HU and the same
place in the patient in both. UIDs come from the set's and the scan's name, so a second import writes the same bytes.

NIfTI's axes run to the right, to the front and to the head (RAS), DICOM's to the left, to the back and to the head
(PS3.3 C.7.6.2.1.1). Shape suffixes: I, J, K voxel axes, Y row, X column.
"""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from simulations.importers.source import SourceError

SAME_PLACE = 0.05  # of a voxel: how far a mask's corners may lie from its image's; ingest allows 0.1
RIGHT_ANGLE = 1e-3  # cosine between a picture's axes; DICOM can only express a right angle
WHOLE = 0.01  # how far a label may be from a whole number: some masks are stored with a scale that misses it
_TO_DICOM = np.diag([-1.0, -1.0, 1.0, 1.0])
_NAMESPACE = uuid.UUID("5b3c5d0e-5a0c-5f6b-9d0c-6f2d4d0f6a11")  # never change: imported UIDs depend on it


@dataclass(frozen=True)
class Volume:
    """A CT volume.

    Attributes:
      hu_IJK: int16.
      affine: (4, 4), voxel to mm in NIfTI's axes.
    """

    hu_IJK: NDArray[np.int16]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class Mask:
    """A label map on a volume's grid.

    Attributes:
      labels_IJK: uint8, 0 for none.
      as_stored: its file holds these very numbers; otherwise they were rounded.
    """

    labels_IJK: NDArray[np.uint8]
    as_stored: bool


@dataclass(frozen=True)
class Series:
    """UIDs of an imported series.

    Attributes:
      uid: of the series.
      images: SOP instance UID of each layer of the third voxel axis.
    """

    uid: str
    images: tuple[str, ...]


def uid(*names: object) -> str:
    """A UID made from names, by way of a name-based UUID (PS3.5 B.2): the same names give the same UID."""
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(map(str, names))).int}")


def series_of(data_set: str, scan: str, layers: int) -> Series:
    """The UIDs of a scan."""
    return Series(uid(data_set, scan, "series"), tuple(uid(data_set, scan, "image", k) for k in range(layers)))


def read_volume(path: Path) -> Volume:
    """A NIfTI CT volume, rounded to whole HU.

    Raises:
      SourceError: no NIfTI, not three-dimensional, values that are no HU, or axes that DICOM cannot express.
    """
    values_IJK, affine = _read(path)
    if not np.isfinite(values_IJK).all():
        count = int((~np.isfinite(values_IJK)).sum())
        raise SourceError(f"{count} values are not finite, expected HU")
    low, high = float(values_IJK.min()), float(values_IJK.max())
    if low < -32768 or high > 32767:
        raise SourceError(f"values from {low:g} to {high:g}, expected HU between -32768 and 32767")
    across, down = affine[:3, 0], affine[:3, 1]
    cosine = abs(across @ down) / (np.linalg.norm(across) * np.linalg.norm(down))
    if cosine > RIGHT_ANGLE:
        raise SourceError(
            f"its first two axes meet at {np.degrees(np.arccos(cosine)):.1f} degrees, expected a right angle"
        )
    return Volume(np.rint(values_IJK).astype(np.int16), affine)


def read_mask(path: Path, volume: Volume, binary: bool) -> Mask:
    """A NIfTI label map on a volume's grid.

    Args:
      path: the file.
      volume: the CT that it belongs to.
      binary: whether every number but 0 means the same, and becomes 1.
    Raises:
      SourceError: another shape or affine than the volume's, or numbers that are no labels.
    """
    values_IJK, affine = _read(path)
    if values_IJK.shape != volume.hu_IJK.shape:
        raise SourceError(f"mask of shape {values_IJK.shape}, its image has {volume.hu_IJK.shape}")
    off = _distance(affine, volume)
    if off > SAME_PLACE:
        raise SourceError(f"mask lies up to {off:.2g} voxels off its image by their affines, expected {SAME_PLACE}")
    if not np.isfinite(values_IJK).all() or values_IJK.min() < -WHOLE or values_IJK.max() > 255 + WHOLE:
        raise SourceError("mask with values below 0, above 255 or not finite, expected labels")
    rounded_IJK = np.rint(values_IJK)
    if np.abs(values_IJK - rounded_IJK).max() > WHOLE:
        raise SourceError("mask with values between whole numbers, expected labels")
    as_stored = bool((values_IJK == rounded_IJK).all())
    labels_IJK = rounded_IJK.astype(np.uint8)
    if binary:
        as_stored = as_stored and labels_IJK.max() <= 1
        labels_IJK = (labels_IJK > 0).astype(np.uint8)
    return Mask(labels_IJK, as_stored)


def _read(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    """Values (I, J, K) after NIfTI's own scale, and the affine."""
    try:
        image = nibabel.load(path)
        values, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, dtype=np.float64)
    except Exception as error:  # nibabel, gzip and zlib raise many types
        raise SourceError(f"cannot be read as NIfTI ({type(error).__name__})") from error
    if values.ndim > 3 and values.shape[3:] == (1,) * (values.ndim - 3):
        values = values.reshape(values.shape[:3])
    if values.ndim != 3 or values.size == 0 or not np.issubdtype(values.dtype, np.number):
        raise SourceError(
            f"NIfTI of shape {values.shape} and type {values.dtype}, expected three dimensions of numbers"
        )
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise SourceError("NIfTI with an affine that cannot be inverted, expected one that places voxels in mm")
    return values, affine


def _distance(affine: NDArray[np.float64], volume: Volume) -> float:
    """Return how far an affine moves a volume's corners from their own place, in voxels."""
    last = np.array(volume.hu_IJK.shape) - 1
    corners = np.array([[*(last * corner), 1.0] for corner in np.ndindex(2, 2, 2)]).T
    off = np.linalg.solve(volume.affine, affine @ corners) - corners
    return float(np.abs(off[:3]).max())


def mask_bytes(mask: Mask, volume: Volume) -> bytes:
    """A label map as .nii.gz, on the volume's own affine; always the same bytes."""
    image = nibabel.Nifti1Image(mask.labels_IJK, volume.affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)


def ct_images(volume: Volume, data_set: str, scan: str, patient: str) -> Iterator[bytes]:
    """The CT image of each layer of the third voxel axis, as DICOM files.

    Args:
      volume: in HU.
      data_set: its name.
      scan: the scan's name in the set.
      patient: becomes the PatientID.
    """
    series = series_of(data_set, scan, volume.hu_IJK.shape[2])
    axes = _TO_DICOM @ volume.affine
    across, down, flipped = _picture(axes)
    shared = _shared(data_set, scan, patient, series)
    shared.Rows, shared.Columns = volume.hu_IJK.shape[down], volume.hu_IJK.shape[across]
    lengths = np.linalg.norm(axes[:3, :3], axis=0)
    shared.PixelSpacing = _decimals([lengths[down], lengths[across]])
    signs = np.where(flipped, -1.0, 1.0)
    shared.ImageOrientationPatient = _decimals([*(signs[a] * axes[:3, a] / lengths[a] for a in (across, down))])
    for k, image_uid in enumerate(series.images):
        first = np.array([(n - 1) * turned for n, turned in zip(volume.hu_IJK.shape[:2], flipped, strict=True)] + [k])
        layer_YX = volume.hu_IJK[:, :, k].T if across == 0 else volume.hu_IJK[:, :, k]
        layer_YX = layer_YX[:: int(signs[down]), :: int(signs[across])]
        yield _file(shared, image_uid, k + 1, (axes @ [*first, 1.0])[:3], layer_YX)


def _picture(axes: NDArray[np.float64]) -> tuple[int, int, tuple[bool, bool]]:
    """Return which voxel axis runs along a row and which down a column, and which of the two are reversed.

    Columns run to the patient's left and rows to the back where they can, as a scanner's do.
    """
    cosines = axes[:3, :2] / np.linalg.norm(axes[:3, :2], axis=0)
    across = int(abs(cosines[0, 1]) > abs(cosines[0, 0]))
    down = 1 - across
    turned = {across: bool(cosines[0, across] < 0), down: bool(cosines[1, down] < 0)}
    return across, down, (turned[0], turned[1])


def _decimals(values: list) -> list[str]:
    """Numbers as decimal strings of up to 16 characters (PS3.5 6.2)."""
    return [format_number_as_ds(float(value) + 0.0) for value in np.ravel(values)]


def _shared(data_set: str, scan: str, patient: str, series: Series) -> Dataset:
    """Build the dataset that all images of a series share (PS3.3 A.3): mandatory attributes, empty if a NIfTI lacks them."""
    ds = Dataset()
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = ds.ReferringPhysicianName = ""
    ds.DerivationDescription = "Converted from NIfTI"
    ds.PatientName = ds.PatientID = patient
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", "By the publisher of the data set"
    ds.SliceThickness = ds.KVP = None
    ds.PatientPosition = ""
    ds.StudyInstanceUID = uid(data_set, scan, "study")
    ds.SeriesInstanceUID = series.uid
    ds.StudyID = ds.PositionReferenceIndicator = ""
    ds.SeriesNumber, ds.AcquisitionNumber = 1, None
    ds.FrameOfReferenceUID = uid(data_set, scan, "frame of reference")
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "HU"
    return ds


def _file(
    shared: Dataset, image_uid: str, number: int, position_mm: NDArray[np.float64], layer_YX: NDArray[np.int16]
) -> bytes:
    """One image as a DICOM file (PS3.10 7)."""
    ds = Dataset(shared)
    ds.SOPInstanceUID = image_uid
    ds.InstanceNumber = number
    ds.ImagePositionPatient = _decimals([position_mm])
    ds.add_new("PixelData", "OW", np.ascontiguousarray(layer_YX, dtype="<i2").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, image_uid
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # pydicom's own would change the bytes with its version.
    ds.file_meta.ImplementationClassUID, ds.file_meta.ImplementationVersionName = uid("implementation"), "HEMAFED"
    with BytesIO() as file:
        ds.save_as(file, enforce_file_format=True)
        return file.getvalue()
