"""Masks as files: one array per image, or one DICOM SEG per series, and a table of all.

In: a SegmentedSeries. Out, in a folder of the hospital's own: `masks/…` as .npy under the images' own paths, `seg/CODE.dcm`, and
`segments.csv`. A DICOM SEG names its patient, as its images do, and paths may: keep the folder where scans may be kept.

Shape suffixes: N frame, Y row, X column.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from client.dicom.faults import Fault
from client.segment.segment import SegmentedImage, SegmentedSeries

COLUMNS = ("file", "frame", "series", "z_mm", "area_mm2")
_PREFIX = "2.25."  # of UIDs made from a hash (PS3.5 B.2)
# What a SEG takes over from its images, and must have, if only empty (PS3.3 A.51.3: patient, general study).
_TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)


def write_arrays(series: SegmentedSeries, folder: Path, out: Path) -> None:
    """Write uint8 masks (rows, columns), or (frames, rows, columns) of a multi-frame file, under the images' paths.

    Args:
      series: segmented.
      folder: that was segmented.
      out: gets the same paths with .npy behind them.
    """
    files: dict[Path, list[SegmentedImage]] = defaultdict(list)
    for one in series.images:
        files[one.image.path].append(one)
    for path, members in files.items():
        frames = members[0].image.frames
        masks_NYX = np.zeros((frames, *members[0].mask.shape), np.uint8)
        for one in members:
            masks_NYX[one.image.frame] = one.mask
        target = out / f"{path.relative_to(folder)}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        if frames > 1 and target.is_file():  # frames of one file may belong to several series
            masks_NYX |= np.load(target)
        np.save(target, masks_NYX if frames > 1 else masks_NYX[0])


def write_seg(series: SegmentedSeries, out: Path, model: dict[str, str]) -> Fault | None:
    """Write a series' masks as DICOM SEG, BINARY, on the images' own pixels (PS3.3 A.51).

    UIDs follow from the images and the model: a second call writes the same object again.

    Args:
      series: with at least one image.
      out: gets NAME.dcm.
      model: name and hash, for the algorithm's identification.
    Returns:
      Why it could not be written; None if it was.
    """
    headers, masks = [], []
    multi = series.images[0].image.frames > 1
    for one in series.images:
        if not multi or not headers:
            headers.append(_header(one.image.path, series.name))
        masks.append(one.mask)
    masks_NYX = np.array(masks)
    try:
        if multi:
            whole_NYX = np.zeros((series.images[0].image.frames, *masks_NYX.shape[1:]), np.uint8)
            whole_NYX[[one.image.frame for one in series.images]] = masks_NYX
            masks_NYX = whole_NYX
        seg = _segmentation(headers, masks_NYX, series, model)
        out.mkdir(parents=True, exist_ok=True)
        seg.save_as(out / f"{series.name}.dcm")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        kind = type(error).__name__  # its text could hold a value of the header
        return Fault(
            f"series {series.name}",
            f"its headers lack what a DICOM SEG needs ({kind}); its masks can be had with --form npy",
        )
    return None


def _header(path: Path, name: str) -> Dataset:
    """An image's header, with what may be missing put in empty."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    for keyword in _TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "" if keyword != "PatientName" else None)
    if not header.get("SpecificCharacterSet"):  # present and empty is nothing to highdicom
        header.pop("SpecificCharacterSet", None)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        if not header.get(keyword):
            setattr(header, keyword, generate_uid(_PREFIX, [keyword, name]))
    return header


def _segmentation(
    headers: list[Dataset], masks_NYX: np.ndarray, series: SegmentedSeries, model: dict[str, str]
) -> Dataset:
    """The object itself."""
    sources = [header.SOPInstanceUID for header in headers]
    description = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Hematoma",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Hematoma,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=f"hemafed {model['name']}", version=model["sha256"][:16], family=codes.DCM.ArtificialIntelligence
        ),
    )
    return highdicom.seg.Segmentation(
        source_images=headers,
        pixel_array=masks_NYX,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        series_instance_uid=generate_uid(_PREFIX, ["series", model["sha256"], *sources]),
        series_number=9001,
        sop_instance_uid=generate_uid(_PREFIX, ["seg", model["sha256"], *sources]),
        instance_number=1,
        manufacturer="hemafed",
        manufacturer_model_name="hemafed-client segment",
        software_versions=model["sha256"][:16],
        device_serial_number="1",
        series_description="Hematoma, research use only",
        omit_empty_frames=bool(masks_NYX.any()),
    )


def write_table(all_series: Iterable[SegmentedSeries], folder: Path, path: Path) -> None:
    """Write a line per image: its path below the folder, frame, series, height and area of the hematoma."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for series in all_series:
            for one in series.images:
                name = one.image.path.relative_to(folder)
                table.writerow([name, one.image.frame, series.name, f"{one.z_mm:.2f}", f"{one.area_mm2:.1f}"])
