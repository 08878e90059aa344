"""Rendered slices as the DICOM files that a hospital's PACS would export.

Valid CT Image and Segmentation objects; UIDs and dates are made from the seed, so the same seed gives the same bytes.
Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import highdicom
import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from simulations.heads.scanner import MATRIX, Scanner
from simulations.phantom.hospitals import Hospital
from simulations.phantom.render import Slice

_DATE, _TIME = "20240101", "120000"
TRANSFER_SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg2000": JPEG2000Lossless,
    "jpegls": JPEGLSLossless,
}


def uid(*parts: object) -> str:
    """A UID made from names, derived from a UUID (PS3.5 B.2): the same parts give the same UID."""
    digest = hashlib.sha256("/".join(map(str, ("hemafed", *parts))).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


@dataclass(frozen=True)
class SlicePlace:
    """Position of a slice, as decimal strings of a DICOM file (PS3.3 C.7.6.2.1.1).

    Attributes:
      position_mm: centre of the first pixel.
      column_direction: unit vector down a column; rows run along x.
      spacing_mm: of rows and of columns.
    """

    position_mm: tuple[str, str, str]
    column_direction: tuple[str, str, str]
    spacing_mm: str


def slice_place(scanner: Scanner, z_mm: float) -> SlicePlace:
    """A slice whose centre lies on the table's axis at z and whose rows follow the gantry's tilt."""
    tilt = np.deg2rad(scanner.tilt_degree)
    step = scanner.field_of_view_mm / MATRIX
    first = (step - scanner.field_of_view_mm) / 2
    corner = np.array([first, 0.0, z_mm]) + first * np.array([0.0, np.cos(tilt), np.sin(tilt)])
    return SlicePlace(
        position_mm=tuple(f"{v:.4f}" for v in corner),
        column_direction=("0", f"{np.cos(tilt):.8f}", f"{np.sin(tilt):.8f}"),
        spacing_mm=f"{step:.6f}",
    )


def ct_image(hospital: Hospital, seed: int, number: int, index: int, z_mm: float, rendered: Slice) -> Dataset:
    """One CT image (PS3.3 A.3), encoded in the hospital's transfer syntax."""
    scanner = hospital.scanner
    place = slice_place(scanner, z_mm)
    intercept = 0 if hospital.signed else -1024
    signed = hospital.signed or (scanner.padding_hu or 0) < intercept
    stored = rendered.hu_YX.astype(np.int32) - intercept
    stored = stored if signed else stored.clip(0)  # an unsigned scale ends at -1024 HU, as scanners' do

    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = uid(seed, hospital.name, number, index)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = _DATE
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = _TIME
    ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = hospital.maker
    ds.ManufacturerModelName = "Phantom"
    ds.ReferringPhysicianName = ""
    ds.SeriesDescription = "HEAD W/O BRAIN"
    ds.PatientName = f"Phantom^{hospital.number:02d}{number:03d}"
    ds.PatientID = f"{hospital.name}-{number:03d}"
    ds.PatientBirthDate = ""
    ds.PatientSex = ""
    ds.BodyPartExamined = "HEAD"
    ds.SliceThickness = scanner.thickness_mm
    ds.KVP = 120
    ds.GantryDetectorTilt = scanner.tilt_degree
    ds.ConvolutionKernel = f"H{round(100 * scanner.noise_peak_per_mm)}"
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = uid(seed, hospital.name, number, "study")
    ds.SeriesInstanceUID = uid(seed, hospital.name, number, "series")
    ds.FrameOfReferenceUID = uid(seed, hospital.name, number, "frame")
    ds.StudyID = "1"
    ds.SeriesNumber = 2
    ds.AcquisitionNumber = 1
    ds.InstanceNumber = hospital.slices - index  # head to feet, as scanners number; the reader must not rely on it
    ds.PositionReferenceIndicator = ""
    ds.ImagePositionPatient = list(place.position_mm)
    ds.ImageOrientationPatient = ["1", "0", "0", *place.column_direction]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = rendered.hu_YX.shape
    ds.PixelSpacing = [place.spacing_mm] * 2
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(signed)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = intercept, 1, "HU"
    if scanner.padding_hu is not None:
        ds.add_new("PixelPaddingValue", "SS" if signed else "US", int(scanner.padding_hu) - intercept)
    ds.WindowCenter, ds.WindowWidth = 40, 80
    pixels = stored.astype(np.int16 if signed else np.uint16)
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = _file_meta(ds.SOPClassUID, ds.SOPInstanceUID)
    syntax = TRANSFER_SYNTAXES[hospital.transfer_syntax]
    if syntax.is_encapsulated:
        ds.compress(syntax, pixels, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def _file_meta(sop_class: str, sop_instance: str) -> FileMetaDataset:
    """File meta information (PS3.10 7.1), little endian explicit until compressed."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = sop_instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid("implementation")
    return meta


def segmentation(images: list[Dataset], masks_NYX: np.ndarray, hospital: Hospital, seed: int, number: int) -> Dataset:
    """The reader's mask of one series as DICOM SEG, BINARY, a frame for every image, empty or not (PS3.3 A.51).

    A frame without a pixel says that somebody looked there; an image without a frame says nothing.
    """
    description = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Hematoma",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Hematoma,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    plain = [_uncompressed_header(image) for image in images]
    seg = highdicom.seg.Segmentation(
        source_images=plain,
        pixel_array=masks_NYX.astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=[float(v) for v in images[0].PixelSpacing],
            slice_thickness=hospital.scanner.thickness_mm,
            spacing_between_slices=hospital.scanner.spacing_mm,
        ),
        omit_empty_frames=False,
        series_instance_uid=uid(seed, hospital.name, number, "seg-series"),
        series_number=100,
        sop_instance_uid=uid(seed, hospital.name, number, "seg"),
        instance_number=1,
        manufacturer="hemafed",
        manufacturer_model_name="phantom",
        software_versions="1",
        device_serial_number="1",
    )
    # highdicom stamps the clock and draws a random UID; the same seed must give the same bytes.
    for element in ("ContentDate", "InstanceCreationDate", "SeriesDate"):
        if element in seg:
            setattr(seg, element, _DATE)
    for element in ("ContentTime", "InstanceCreationTime", "SeriesTime"):
        if element in seg:
            setattr(seg, element, _TIME)
    for equipment in seg.ContributingEquipmentSequence:
        if "ContributionDateTime" in equipment:
            equipment.ContributionDateTime = _DATE + _TIME
    organization = uid(seed, hospital.name, number, "dimension")
    seg.DimensionOrganizationSequence[0].DimensionOrganizationUID = organization
    for item in seg.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
    return seg


def _uncompressed_header(image: Dataset) -> Dataset:
    """An image's header without its pixels, for highdicom to refer to."""
    header = Dataset()
    for element in image:
        if element.keyword != "PixelData":
            header.add(element)
    header.file_meta = _file_meta(image.SOPClassUID, image.SOPInstanceUID)
    return header
