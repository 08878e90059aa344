"""Headers of CT images: one record per slice, with geometry and without identifiers.

In: DICOM files, whose names mean nothing. Out: CtSlice records that client/dicom/series.py orders and client/dicom/pixels.py reads.
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

import pydicom
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from client.dicom.elements import (
    DicomFile,
    class_name,
    identifier,
    numbers,
    optional_number,
    read_dicom,
    text,
    texts,
    word,
)
from client.dicom.faults import DicomError, Kind
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.refusals import check_image_type, check_kind, check_pixels, check_plane, check_syntax, storage

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)

# Words of a SeriesDescription that mean a bone reconstruction, and not parts of words: a YEAR has an EAR in it.
_BONE = re.compile(
    r"(?<![^\W\d_])(BONE(PLUS)?S?|\w*KNOCHEN\w*|FELSENBEIN\w*|OSSEU(X|SE)S?|OSSO|OSE[AO]|HUESO|PETRO(US|SAL)|SHARP|EARS?|IAC)(?![^\W\d_])",
    re.IGNORECASE,
)
# What ContrastBolusAgent says where no agent was given.
_NO_AGENT = re.compile(
    r"[\W_0]*|(NO|NONE|NON(?!.?IONIC)|NIL|NOT|W/?O|WITHOUT|OHNE|SANS|SIN|SENZA|KEINE?S?|NEIN|NINGUN[AO]?|NATIVE?|PLAIN|UNENHANCED|N/?A)\b.*",
    re.IGNORECASE,
)


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
      padding: least and largest stored value that means no measurement (PS3.3 C.7.5.1.1.2); None without.
      kernel: ConvolutionKernel.
      scanner: maker and model.
      body: BodyPartExamined; shown, never decided on.
      contrast: the file names a contrast agent.
      derived: ImageType begins with DERIVED.
      bone: SeriesDescription speaks of a bone reconstruction.
      lossy: lossy compressed, taken because site.yaml accepts it.
      person: keyed hash of birth date and sex; "" if the file has neither. One patient is one person.
      copies: keyed hashes of other SOP instances that were sent with the same picture.
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
    person: str = ""
    copies: tuple[str, ...] = ()

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


def read_images(path: Path, pseudonyms: Pseudonyms, accept_lossy: bool = False, code: str = "") -> tuple[CtSlice, ...]:
    """The CT images of one file: one, or every frame of a multi-frame image.

    Args:
      path: a DICOM file.
      code: what messages call the file.
      pseudonyms: the hospital's.
      accept_lossy: whether lossy images pass, marked.
    Raises:
      DicomError: not DICOM, not an axial CT image, damaged, or a tag is missing, malformed or contradicts the file.
    """
    return images_of(read_dicom(path), path, pseudonyms, accept_lossy, code)


def images_of(
    file: DicomFile, path: Path, pseudonyms: Pseudonyms, accept_lossy: bool, code: str, nameless: bool = False
) -> tuple[CtSlice, ...]:
    """read_images for a file that is open already.

    With `nameless`, a file that does not say whose it is stands for itself, as its own patient, study and series.
    """
    ds = file.ds
    try:
        # Some public sets (RSNA) lost the element; the file's meta group has it too (PS3.10 7.1).
        sop_class = text(ds, "SOPClassUID") or str(ds.file_meta.get("MediaStorageSOPClassUID", ""))
        if sop_class not in CT_CLASSES:
            raise DicomError(f"{class_name(sop_class)}, expected CT Image Storage", Kind.NO_HEAD_CT)
        check_kind(ds)
        groups = [ds] if sop_class == CTImageStorage else _frames(ds)
        lossy = check_syntax(ds, accept_lossy)
        stored = storage(ds, len(groups)) | {"lossy": lossy, "file": code}
        names = {name: identifier(ds, name) or (code if nameless else "") for name in _NAMES}
        _check_names(names)
        check_pixels(file, path, stored)
        return tuple(
            _slice(file, path, number, group, pseudonyms, stored, names) for number, group in enumerate(groups)
        )
    except DicomError:
        raise
    except Exception as error:  # pydicom decodes when asked, and fails in many ways
        raise DicomError("an element of its header is damaged and cannot be decoded; export the file again") from error


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
            check_image_type(texts(flat, "FrameType"))
        groups.append(flat)
    declared = int(text(ds, "NumberOfFrames") or 0)
    if declared != len(groups):
        raise DicomError(f"NumberOfFrames {declared}, {len(groups)} are described")
    return groups


_NAMES = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


def _check_names(names: Mapping[str, str]) -> None:
    """Refuse an image that does not say whose it is, or what it belongs to (PS3.3 C.7.1.1, A.3)."""
    missing = [name for name in _NAMES[1:] if not names[name]]
    if missing:
        raise DicomError(
            f"without {', '.join(missing)}; expected in every CT image (PS3.3 A.3): export it again, or have the anonymiser replace "
            "UIDs and not remove them"
        )
    if not names["PatientID"]:
        raise DicomError(
            "PatientID is empty, so patients cannot be told apart, and one could be trained and tested on; have the anonymiser "
            "give each patient an ID of its own, the same in all of the patient's images"
        )


def _slice(
    file: DicomFile,
    path: Path,
    number: int,
    group: pydicom.Dataset,
    pseudonyms: Pseudonyms,
    stored: Mapping[str, Any],
    names: Mapping[str, str],
) -> CtSlice:
    """One image; `group` is the file's dataset or what a multi-frame image says of this frame."""
    ds = file.ds
    if text(group, "RescaleType").upper() not in ("", "HU", "US"):
        raise DicomError(f"RescaleType {word(text(group, 'RescaleType'))}, expected HU")
    along = numbers(group, "ImageOrientationPatient", 6)
    spacing = numbers(group, "PixelSpacing", 2)
    slope, intercept = numbers(group, "RescaleSlope", 1)[0], numbers(group, "RescaleIntercept", 1)[0]
    check_plane(along[:3], along[3:], normal_of(along[:3], along[3:]))
    if not all(0.1 <= value <= 5 for value in spacing):
        raise DicomError(f"PixelSpacing {spacing} mm, expected 0.1 to 5")
    if not 0 < slope <= 100 or abs(intercept) > 32768:
        raise DicomError(
            f"RescaleSlope {slope:g}, RescaleIntercept {intercept:g}; expected what makes HU, as 1 and -1024: export it again"
        )
    space = text(ds, "FrameOfReferenceUID")
    instance = pseudonyms.of("image", names["SOPInstanceUID"])
    maker, model = text(ds, "Manufacturer"), text(ds, "ManufacturerModelName")
    person = f"{text(ds, 'PatientBirthDate')}|{text(ds, 'PatientSex')}"
    return CtSlice(
        path=path,
        frame=number,
        image=instance if stored["frames"] == 1 else f"{instance}.{number + 1}",
        series=pseudonyms.of("series", names["SeriesInstanceUID"]),
        study=pseudonyms.of("study", names["StudyInstanceUID"]),
        patient=pseudonyms.of("patient", names["PatientID"]),
        space=pseudonyms.of("space", space) if space else "",
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
        contrast=not _NO_AGENT.fullmatch(text(ds, "ContrastBolusAgent")),
        derived=text(ds, "ImageType").upper() == "DERIVED",
        bone=bool(_BONE.search(text(ds, "SeriesDescription"))),
        person=pseudonyms.of("person", person) if person.strip("|") else "",
        **stored,
    )
