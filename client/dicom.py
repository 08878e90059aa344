"""DICOM files to CT series in Hounsfield units with geometry.

In: a folder, searched recursively; file names mean nothing. Out: series, each an ordered list of slices whose pixels
are read one at a time, so memory does not grow with the folder. Everything here stays in the hospital.

Axes: the patient's, x to the left, y posterior, z to the head, in mm (DICOM PS3.3 C.7.6.2.1.1).
Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.uid import JPEG2000, CTImageStorage, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless

AIR_HU = -1024  # what padding outside the reconstructed circle is clamped to
MAX_HU = 3071  # the top of a 12-bit CT scale; metal beyond it carries no information
AXIAL_COSINE = 0.7  # a slice's normal within about 45 degrees of z: tilted gantries pass, sagittal views do not

_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "LossyImageCompression",
]
_OPTIONAL = {"FrameOfReferenceUID", "ImageType", "StudyInstanceUID", "LossyImageCompression"}
# Syntaxes that lose information, or may; JPEG 2000 (.91) passes where the file says that it did not.
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)


class DicomError(ValueError):
    """A file or series cannot be used; the text names no patient."""


@dataclass(frozen=True)
class Fault:
    """One thing that was left out, and why.

    Attributes:
      what: a file below the data folder, or a series UID; for the hospital's own eyes.
      reason: the value found and what was expected.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class CtSlice:
    """Header of one CT image.

    Attributes:
      path: its file.
      sop_uid, series_uid, frame_uid: SOP instance, series and frame of reference.
      patient_id: as in the file; hashed before anything is written.
      shape: rows and columns.
      spacing_mm: distance of rows, distance of columns (PS3.3 10.7.1.3).
      position_mm: centre of the first pixel.
      row_direction, column_direction: unit vectors along a row and down a column.
    """

    path: Path
    sop_uid: str
    series_uid: str
    frame_uid: str
    patient_id: str
    shape: tuple[int, int]
    spacing_mm: tuple[float, float]
    position_mm: tuple[float, float, float]
    row_direction: tuple[float, float, float]
    column_direction: tuple[float, float, float]

    @property
    def height_mm(self) -> float:
        """Position along the slice's normal, towards the head; what slices are ordered by."""
        normal = np.cross(self.row_direction, self.column_direction)
        return float(np.sign(normal[2]) * (normal @ np.array(self.position_mm)))


@dataclass(frozen=True)
class CtSeries:
    """Slices of one series, ordered along the normal."""

    uid: str
    slices: tuple[CtSlice, ...]

    @property
    def spacing_mm(self) -> float:
        """Median distance of neighbouring slices; 0 for a single slice."""
        heights = [s.height_mm for s in self.slices]
        return float(np.median(np.diff(heights))) if len(heights) > 1 else 0.0


def find_files(folder: Path) -> Iterator[Path]:
    """Every regular file below a folder, in order of its path; hidden files and links are passed over."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            yield path


def read_series(folder: Path) -> tuple[list[CtSeries], list[Fault]]:
    """All CT series below a folder.

    Args:
      folder: the hospital's images.
    Returns:
      Series in order of their UID, and what was left out: files that are no DICOM, no CT image, or lack a tag.
    """
    by_series: dict[str, list[CtSlice]] = defaultdict(list)
    faults, seen = [], {}
    for path in find_files(folder):
        name = str(path.relative_to(folder))
        try:
            header = read_header(path)
        except DicomError as error:
            faults.append(Fault(name, str(error)))
            continue
        if header.sop_uid in seen:
            faults.append(Fault(name, f"SOPInstanceUID is that of {seen[header.sop_uid]}; expected one file per image"))
            continue
        seen[header.sop_uid] = name
        by_series[header.series_uid].append(header)
    series = []
    for uid, slices in sorted(by_series.items()):
        ordered = tuple(sorted(slices, key=lambda s: (s.height_mm, s.sop_uid)))
        heights = np.array([s.height_mm for s in ordered])
        if len(heights) > 1 and np.diff(heights).min() < 0.01:
            faults.append(
                Fault(uid, f"two of {len(ordered)} slices at one position; expected one slice each; export them again")
            )
        elif len({(s.row_direction, s.column_direction) for s in ordered}) > 1:
            faults.append(Fault(uid, "slices of different orientation; expected one orientation per series"))
        else:
            series.append(CtSeries(uid, ordered))
    return series, faults


def read_header(path: Path) -> CtSlice:
    """Header of one file, without its pixels.

    Raises:
      DicomError: not DICOM, not a CT image, or a tag that the geometry needs is missing or malformed.
    """
    ds = read_dataset(path, _TAGS)
    if ds.get("SOPClassUID") != CTImageStorage:
        raise DicomError(f"SOP class {getattr(ds.get('SOPClassUID'), 'name', None)!r}, expected CT Image Storage")
    missing = [tag for tag in _TAGS if tag not in _OPTIONAL and not ds.get(tag)]
    if missing:
        raise DicomError(f"without {', '.join(missing)}; expected in every CT image (PS3.3 A.3)")
    syntax, lossy = ds.file_meta.get("TransferSyntaxUID", ""), str(ds.get("LossyImageCompression", ""))
    if lossy == "01" or syntax in _LOSSY or (syntax == JPEG2000 and lossy != "00"):
        name = getattr(syntax, "name", syntax)
        raise DicomError(
            f"lossy compression ({name}, LossyImageCompression {lossy!r}); expected a lossless export: it changes HU"
        )
    try:
        along = _numbers(ds.ImageOrientationPatient, 6).reshape(2, 3)
        header = CtSlice(
            path=path,
            sop_uid=str(ds.SOPInstanceUID),
            series_uid=str(ds.SeriesInstanceUID),
            frame_uid=str(ds.get("FrameOfReferenceUID", "")),
            patient_id=str(ds.PatientID),
            shape=(int(ds.Rows), int(ds.Columns)),
            spacing_mm=tuple(_numbers(ds.PixelSpacing, 2).tolist()),
            position_mm=tuple(_numbers(ds.ImagePositionPatient, 3).tolist()),
            row_direction=tuple(float(v) for v in along[0]),
            column_direction=tuple(float(v) for v in along[1]),
        )
    except (TypeError, ValueError) as error:
        raise DicomError("PixelSpacing, ImagePositionPatient or ImageOrientationPatient is malformed") from error
    if int(ds.SamplesPerPixel) != 1:
        raise DicomError(f"SamplesPerPixel {ds.SamplesPerPixel}, expected 1: a colour picture is not CT")
    if str((list(ds.get("ImageType") or []) + [""] * 3)[2]).upper() == "LOCALIZER":
        raise DicomError("a localizer, expected an axial image")
    normal = np.cross(header.row_direction, header.column_direction)
    if not 0.98 < np.linalg.norm(normal) < 1.02 or abs(normal[2]) < AXIAL_COSINE:
        raise DicomError(f"normal {np.round(normal, 2).tolist()}, expected an axial slice (near [0, 0, 1])")
    if min(abs(header.row_direction[0]), abs(header.column_direction[1])) < AXIAL_COSINE:
        raise DicomError(f"rows run along {header.row_direction}, expected left to right: the picture lies on its side")
    if not all(0.1 <= v <= 5 for v in header.spacing_mm):
        raise DicomError(f"PixelSpacing {header.spacing_mm} mm, expected 0.1 to 5")
    return header


def read_dataset(path: Path, tags: list[str] | None = None) -> pydicom.Dataset:
    """A file's elements without its pixels, every one of them decoded.

    Raises:
      DicomError: not DICOM, or damaged anywhere in what was asked for.
    """
    try:
        ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        for element in ds.iterall():  # pydicom decodes when asked, and a cut element fails only then
            element.value  # noqa: B018
    except InvalidDicomError as error:
        raise DicomError("not a DICOM file (no 'DICM' prefix)") from error
    except Exception as error:  # zlib.error, struct.error, BytesLengthException and others, by where it is cut
        raise DicomError(f"cannot be read as DICOM ({type(error).__name__})") from error
    return ds


def _numbers(value: object, count: int) -> NDArray[np.float64]:
    """A multi-valued element as exactly `count` finite numbers."""
    numbers = np.array(value, dtype=float)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{count} finite numbers expected")
    return numbers


def read_hu(path: Path) -> NDArray[np.float32]:
    """Pixels of one CT image after rescale, before any clamping.

    Args:
      path: a CT image in any transfer syntax that pydicom's decoders know.
    Returns:
      float32 (Y, X), Hounsfield units as stored; padding keeps its stored value.
    Raises:
      DicomError: no rescale, or the pixels cannot be decoded.
    Source: DICOM PS3.3 C.11.1 (output = slope * stored + intercept).
    """
    try:
        ds = pydicom.dcmread(path)
        stored = ds.pixel_array
    except Exception as error:  # decoders raise types of their own
        raise DicomError(f"pixels cannot be decoded ({type(error).__name__})") from error
    if "RescaleSlope" not in ds or "RescaleIntercept" not in ds:
        raise DicomError("without RescaleSlope or RescaleIntercept; expected both in a CT image (PS3.3 C.8.2.1)")
    return stored.astype(np.float32) * np.float32(ds.RescaleSlope) + np.float32(ds.RescaleIntercept)


def clamp_hu(hu_YX: NDArray[np.float32]) -> NDArray[np.float32]:
    """Padding (often -2000, -2048 or -3024) to air's -1024, metal to 3071 HU."""
    return np.clip(hu_YX, AIR_HU, MAX_HU)
