"""Headers of CT images: one record per slice, with geometry and without identifiers.

In: DICOM files, whose names mean nothing. Out: CtSlice records that client/series.py orders and client/pixels.py reads.
Patients, studies, series and images become keyed hashes here, at the file's edge; names, dates and UIDs go no further.
Everything stays in the hospital.

Axes: the patient's, x to the left, y posterior, z to the head, in mm (DICOM PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
)

from client.dicom import (
    DicomError,
    DicomFile,
    class_name,
    integer,
    numbers,
    optional_number,
    pseudonym,
    read_dicom,
    text,
    texts,
    word,
)

SIDES_PX = (16, 2048)  # rows and columns of a CT image; larger ones are not made by any scanner
AXIAL_COSINE = 0.7  # a slice's normal within about 45 degrees of z: tilted gantries pass, sagittal views do not
CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

# Syntaxes that always lose information, and those that may; the latter pass where the file says that it did not.
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
_PERHAPS_LOSSY = (JPEG2000, HTJ2K)
# Words in ImageType of what is computed from CT images and is no CT image (PS3.3 C.8.2.1.1.1, C.8.15.2.1.3).
_MAPS = re.compile(
    r"PERFUSION|CBF|CBV|MTT|TTP|TMAX|DRAIN|FLOW|MIP|MINIP|MAX_IP|MIN_IP|VOLUME_RENDER|VRT|SSD|SURFACE|PROJECTION|"
    r"SCREEN|VNC|IODINE|EFF_ATOMIC|ELECTRON|MONO_?E|SUBTRACT|FUSION|CURVED"
)
_BONE = re.compile(r"BONE|KNOCHEN|OSSEU|OSSO|HUESO|PETROUS|FELSENBEIN|SHARP|EAR\b", re.IGNORECASE)
_PIXEL_DATA = {"little": b"\xe0\x7f\x10\x00", "big": b"\x7f\xe0\x00\x10"}


Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)  # a big export has a million of them
class CtSlice:
    """One CT image, or one frame of a multi-frame image, without its pixels.

    Attributes:
      path: its file.
      file: the file's keyed hash, for messages.
      frame: frame in the file, from 0.
      image: keyed hash of the SOP instance, with ".1" and so on for the frames of a multi-frame image.
      series, study, patient: keyed hashes.
      space: keyed hash of the frame of reference; "" if the file has none.
      shape: rows and columns.
      spacing_mm: distance of rows, distance of columns (PS3.3 10.7.1.3).
      position_mm: centre of the first pixel.
      row_direction, column_direction: unit vectors along a row and down a column.
      thickness_mm: SliceThickness, 0 if absent; never taken for the distance of slices.
      tilt_degree: GantryDetectorTilt, 0 if absent.
      syntax: transfer syntax.
      pixel_offset: where Pixel Data begins in the file; -1 in a deflated file.
      frames, bits_allocated, bits_stored, signed: how pixels are stored (PS3.5 8.1).
      slope, intercept: HU = slope * stored + intercept (PS3.3 C.11.1).
      padding: least and largest stored value that stands for no measurement (PS3.3 C.7.5.1.1.2); None without.
      kernel: ConvolutionKernel.
      scanner: maker and model.
      body: BodyPartExamined; shown, never decided on.
      contrast: the file names a contrast agent.
      derived: ImageType begins with DERIVED.
      bone: SeriesDescription speaks of a bone reconstruction.
      lossy: lossy compressed, taken because site.yaml accepts it.
    """

    path: Path
    file: str
    frame: int
    image: str
    series: str
    study: str
    patient: str
    space: str
    shape: tuple[int, int]
    spacing_mm: tuple[float, float]
    position_mm: tuple[float, float, float]
    row_direction: tuple[float, float, float]
    column_direction: tuple[float, float, float]
    thickness_mm: float
    tilt_degree: float
    syntax: str
    pixel_offset: int
    frames: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    kernel: str
    scanner: str
    body: str
    contrast: bool
    derived: bool
    bone: bool
    lossy: bool

    @property
    def instance(self) -> str:
        """Keyed hash of the SOP instance: the image without its frame."""
        return self.image.partition(".")[0]

    @property
    def height_mm(self) -> float:
        """Position along the slice's normal, towards the head; what slices are ordered by."""
        x, y, z = normal_of(self.row_direction, self.column_direction)
        along = x * self.position_mm[0] + y * self.position_mm[1] + z * self.position_mm[2]
        return math.copysign(1.0, z) * along


def normal_of(row: Vector, column: Vector) -> Vector:
    """The vector product of two directions: what a picture's plane is normal to. Plain numbers are faster than arrays."""
    return (
        row[1] * column[2] - row[2] * column[1],
        row[2] * column[0] - row[0] * column[2],
        row[0] * column[1] - row[1] * column[0],
    )


def read_images(path: Path, key: bytes, accept_lossy: bool = False, code: str = "") -> tuple[CtSlice, ...]:
    """The CT images of one file: one, or every frame of a multi-frame image.

    Args:
      path: a DICOM file.
      code: what messages call the file.
      key: the hospital's secret for keyed hashes.
      accept_lossy: whether lossy images pass, marked.
    Raises:
      DicomError: not DICOM, not an axial CT image, damaged, or a tag is missing, malformed or contradicts the file.
    """
    return images_of(read_dicom(path), path, key, accept_lossy, code)


def images_of(file: DicomFile, path: Path, key: bytes, accept_lossy: bool, code: str) -> tuple[CtSlice, ...]:
    """read_images for a file that is open already."""
    ds = file.ds
    try:
        # Some public sets (RSNA) lost the element; the file's meta group has it too (PS3.10 7.1).
        sop_class = text(ds, "SOPClassUID") or str(ds.file_meta.get("MediaStorageSOPClassUID", ""))
        if sop_class not in CT_CLASSES:
            raise DicomError(f"{class_name(sop_class)}, expected CT Image Storage")
        _check_kind(ds)
        groups = [ds] if sop_class == CTImageStorage else _frames(ds)
        lossy = _check_syntax(ds, accept_lossy)
        stored = _storage(ds, len(groups)) | {"lossy": lossy, "file": code}
        _check_pixels(file, path, stored)
        return tuple(_slice(file, path, number, group, key, stored) for number, group in enumerate(groups))
    except DicomError:
        raise
    except Exception as error:  # pydicom decodes when asked, and fails in many ways
        raise DicomError(f"a header element cannot be decoded ({type(error).__name__})") from error


def _check_kind(ds: pydicom.Dataset) -> None:
    """Refuse what is filed as CT and is no axial CT image in HU."""
    if text(ds, "Modality") != "CT":
        raise DicomError(f"Modality {word(text(ds, 'Modality'))}, expected CT")
    _check_image_type(texts(ds, "ImageType"))
    if text(ds, "BurnedInAnnotation").upper() == "YES":
        raise DicomError("BurnedInAnnotation YES: text is drawn into the picture, expected an untouched image")
    if (integer(ds, "SamplesPerPixel") or 0) != 1:
        raise DicomError(f"SamplesPerPixel {integer(ds, 'SamplesPerPixel')}, expected 1: a colour picture is not CT")
    if not text(ds, "PhotometricInterpretation").startswith("MONOCHROME"):
        raise DicomError(
            f"PhotometricInterpretation {word(text(ds, 'PhotometricInterpretation'))}, expected MONOCHROME2"
        )


def _check_image_type(values: tuple[str, ...]) -> None:
    """Refuse localizers, computed maps and screenshots (PS3.3 C.8.2.1.1.1)."""
    kinds = [value.upper() for value in values]
    if "LOCALIZER" in kinds:
        raise DicomError("a localizer, expected an axial image")
    computed = next((value for value in kinds[2:] if _MAPS.search(value)), None)
    if computed:
        raise DicomError(f"ImageType {word(computed)}: a computed map or a screenshot, expected an axial image in HU")


def _check_syntax(ds: pydicom.Dataset, accept_lossy: bool) -> bool:
    """Whether the image is lossy; refuse what cannot be decoded or contradicts the file."""
    syntax = UID(str(ds.file_meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax:
        raise DicomError("without a known TransferSyntaxUID; expected in the file's meta group (PS3.10 7.1)")
    implicit, little = ds.original_encoding
    if (implicit, little) != (syntax.is_implicit_VR, syntax.is_little_endian):
        raise DicomError(f"the header names {syntax.name}, its elements are written otherwise; export the file again")
    declared = text(ds, "LossyImageCompression")
    lossy = declared == "01" or syntax in _LOSSY or (syntax in _PERHAPS_LOSSY and declared != "00")
    if lossy and not accept_lossy:
        raise DicomError(
            f"lossy compression ({syntax.name}), expected a lossless export: it changes HU; "
            "data.accept_lossy: true in site.yaml takes it and marks its slices"
        )
    try:
        decodable = get_decoder(syntax).is_available
    except NotImplementedError:
        decodable = False
    if not decodable:
        raise DicomError(f"no decoder for {syntax.name}; export as Explicit VR Little Endian or a lossless syntax")
    return lossy


def _storage(ds: pydicom.Dataset, frames: int) -> dict[str, object]:
    """How pixels are stored (PS3.5 8.1.1, PS3.3 C.8.2.1)."""
    rows, columns = integer(ds, "Rows") or 0, integer(ds, "Columns") or 0
    if not (SIDES_PX[0] <= rows <= SIDES_PX[1] and SIDES_PX[0] <= columns <= SIDES_PX[1]):
        raise DicomError(f"{rows} x {columns} pixels, expected {SIDES_PX[0]} to {SIDES_PX[1]} rows and columns")
    allocated, stored, high = (integer(ds, name) or 0 for name in ("BitsAllocated", "BitsStored", "HighBit"))
    signed = integer(ds, "PixelRepresentation")
    if allocated != 16 or not 9 <= stored <= 16 or high != stored - 1 or signed not in (0, 1):
        raise DicomError(
            f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}, PixelRepresentation {signed}; expected 16, "
            "9 to 16, BitsStored - 1, and 0 or 1: other pictures hold no HU"
        )
    padding = integer(ds, "PixelPaddingValue", bool(signed))
    limit = integer(ds, "PixelPaddingRangeLimit", bool(signed))
    ends = sorted(value for value in (padding, padding if limit is None else limit) if value is not None)
    return {
        "shape": (rows, columns),
        "frames": frames,
        "bits_allocated": allocated,
        "bits_stored": stored,
        "signed": bool(signed),
        "padding": (ends[0], ends[-1]) if padding is not None else None,
    }


def _check_pixels(file: DicomFile, path: Path, stored: Mapping[str, Any]) -> None:
    """Whether Pixel Data follows the header, and is as long as the header says; a deflated file is looked at when read."""
    if file.pixel_offset < 0:
        return
    syntax = file.ds.file_meta.TransferSyntaxUID
    order, head = "little" if syntax.is_little_endian else "big", file.pixel_head
    if head[:4] != _PIXEL_DATA[order]:
        raise DicomError("no Pixel Data after the header: cut, or damaged")
    start = 8 if syntax.is_implicit_VR else 12
    length = int.from_bytes(head[start - 4 : start], order)
    if syntax.is_encapsulated != (length == 0xFFFFFFFF):
        raise DicomError(f"the header names {syntax.name}, Pixel Data is written otherwise; export the file again")
    if syntax.is_encapsulated:
        return
    expected = stored["shape"][0] * stored["shape"][1] * stored["frames"] * stored["bits_allocated"] // 8
    if length != expected:
        raise DicomError(f"Pixel Data of {length} bytes, expected {expected} for {stored['shape']} pixels")
    if file.pixel_offset + start + length > file.size:
        raise DicomError(f"cut: {file.size - file.pixel_offset - start} bytes of pixels, expected {expected}")
    if not _ends_well(path, file.pixel_offset + start + length, file.size, order):
        raise DicomError("bytes after Pixel Data that are no element: the file was damaged; export it again")


def _ends_well(path: Path, end: int, size: int, order: str) -> bool:
    """Whether Pixel Data is followed by nothing, or by an element that may follow it (signatures, padding; PS3.3 A.1)."""
    if end == size:
        return True
    with open(path, "rb") as file:
        file.seek(end)
        tag = file.read(4)
    return len(tag) == 4 and int.from_bytes(tag[:2], order) >= 0xFFFA and size - end >= 8


def _frames(ds: pydicom.Dataset) -> list[pydicom.Dataset]:
    """Per frame of a multi-frame image, what a single image says at its top (PS3.3 C.7.6.16, C.8.15)."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    groups = []
    for own in ds.PerFrameFunctionalGroupsSequence:
        flat = pydicom.Dataset()
        for group in (shared, own):
            for sequence in group:
                if sequence.VR == "SQ" and len(sequence.value) == 1:
                    flat.update(sequence.value[0])
        if "FrameType" in flat:
            _check_image_type(texts(flat, "FrameType"))
        groups.append(flat)
    declared = int(text(ds, "NumberOfFrames") or 0)
    if declared != len(groups):
        raise DicomError(f"NumberOfFrames {declared}, {len(groups)} are described")
    return groups


def _slice(
    file: DicomFile, path: Path, number: int, group: pydicom.Dataset, key: bytes, stored: Mapping[str, Any]
) -> CtSlice:
    """One image; `group` is the file's dataset or what a multi-frame image says of this frame."""
    ds = file.ds
    names = {name: text(ds, name) for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
    missing = [name for name, value in names.items() if not value]
    if missing:
        raise DicomError(f"without {', '.join(missing)}; expected in every CT image (PS3.3 A.3)")
    if text(group, "RescaleType").upper() not in ("", "HU", "US"):
        raise DicomError(f"RescaleType {word(text(group, 'RescaleType'))}, expected HU")
    along = numbers(group, "ImageOrientationPatient", 6)
    spacing = numbers(group, "PixelSpacing", 2)
    slope, intercept = numbers(group, "RescaleSlope", 1)[0], numbers(group, "RescaleIntercept", 1)[0]
    _check_plane(along[:3], along[3:])
    if not all(0.1 <= value <= 5 for value in spacing):
        raise DicomError(f"PixelSpacing {spacing} mm, expected 0.1 to 5")
    if not 0 < slope <= 100 or abs(intercept) > 32768:
        raise DicomError(
            f"RescaleSlope {slope:g}, RescaleIntercept {intercept:g}; expected what makes HU, as 1 and -1024"
        )
    space = text(ds, "FrameOfReferenceUID")
    instance = pseudonym(key, "image", names["SOPInstanceUID"])
    maker, model = text(ds, "Manufacturer"), text(ds, "ManufacturerModelName")
    return CtSlice(
        path=path,
        frame=number,
        image=instance if stored["frames"] == 1 else f"{instance}.{number + 1}",
        series=pseudonym(key, "series", names["SeriesInstanceUID"]),
        study=pseudonym(key, "study", names["StudyInstanceUID"]),
        patient=pseudonym(key, "patient", names["PatientID"]),
        space=pseudonym(key, "space", space) if space else "",
        spacing_mm=spacing,
        position_mm=numbers(group, "ImagePositionPatient", 3),
        row_direction=along[:3],
        column_direction=along[3:],
        thickness_mm=optional_number(group, "SliceThickness"),
        tilt_degree=optional_number(ds, "GantryDetectorTilt"),
        syntax=str(ds.file_meta.TransferSyntaxUID),
        pixel_offset=file.pixel_offset,
        slope=slope,
        intercept=intercept,
        kernel=word(text(group, "ConvolutionKernel")),
        scanner=f"{word(maker)} {word(model)}",
        body=word(text(ds, "BodyPartExamined")),
        contrast=bool(text(ds, "ContrastBolusAgent")),
        derived=text(ds, "ImageType").upper() == "DERIVED",
        bone=bool(_BONE.search(text(ds, "SeriesDescription"))),
        **stored,
    )


def _check_plane(row: tuple[float, ...], column: tuple[float, ...]) -> None:
    """Refuse directions that are no right angle, and planes that are not axial (PS3.3 C.7.6.2.1.1)."""
    normal = normal_of(row, column)
    lengths = [math.hypot(*row), math.hypot(*column), math.hypot(*normal)]
    if not all(0.98 < value < 1.02 for value in lengths):
        raise DicomError("ImageOrientationPatient is malformed, expected two unit vectors at a right angle")
    if abs(normal[2]) < AXIAL_COSINE:
        raise DicomError(f"normal {np.round(normal, 2).tolist()}, expected an axial slice (near [0, 0, 1])")
