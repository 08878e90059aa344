"""DICOM segmentations to one hematoma mask per slice.

A mask belongs to an image when the SEG refers to it by SOP instance UID, never by order or file name. An image
that the SEG's series lists but no frame shows has an empty mask: somebody looked and found nothing.

Everything here stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import SegmentationStorage

from client.dicom import CtSeries, DicomError, Fault, find_files, read_dataset

PLACE_TOLERANCE_MM = 0.1  # between a frame's corner and its image's; writers round positions


@dataclass(frozen=True)
class MaskFile:
    """A segmentation and the images it speaks of.

    Attributes:
      path: the SEG file.
      series_uid: the series it refers to.
      sop_uids: the images that were looked at.
    """

    path: Path
    series_uid: str
    sop_uids: frozenset[str]


def find_masks(folder: Path | None) -> tuple[dict[str, MaskFile], list[Fault]]:
    """All segmentations below a folder.

    Args:
      folder: the hospital's masks; None for a hospital without.
    Returns:
      Series UID -> its SEG, and what was left out with the reason.
    """
    masks: dict[str, MaskFile] = {}
    faults = []
    for path in find_files(folder) if folder else ():
        name = str(path.relative_to(folder))
        try:
            mask = _read_references(path)
        except DicomError as error:
            faults.append(Fault(name, str(error)))
            continue
        if mask.series_uid in masks:
            other = masks[mask.series_uid].path.relative_to(folder)
            faults.append(Fault(name, f"refers to the same series as {other}; expected one SEG per series"))
            continue
        masks[mask.series_uid] = mask
    return masks, faults


def _read_references(path: Path) -> MaskFile:
    """Which images a SEG refers to (PS3.3 A.51, C.12.4)."""
    ds = read_dataset(path)
    if ds.get("SOPClassUID") != SegmentationStorage:
        raise DicomError(f"SOP class {getattr(ds.get('SOPClassUID'), 'name', None)!r}, expected Segmentation Storage")
    series = ds.get("ReferencedSeriesSequence") or []
    if len(series) != 1:
        raise DicomError(f"refers to {len(series)} series, expected 1 in ReferencedSeriesSequence")
    segments = [str(s.get("SegmentLabel", "")) for s in ds.get("SegmentSequence") or []]
    if len(segments) != 1:
        raise DicomError(f"{len(segments)} segments {segments}, expected the hematoma alone")
    series_uid = series[0].get("SeriesInstanceUID")
    images = [item.get("ReferencedSOPInstanceUID") for item in series[0].get("ReferencedInstanceSequence") or []]
    if not series_uid or not images or not all(images):
        raise DicomError(
            "refers to a series or image without UID; expected SeriesInstanceUID and ReferencedSOPInstanceUID"
        )
    return MaskFile(path, str(series_uid), frozenset(map(str, images)))


def _frame_places(seg: pydicom.Dataset) -> dict[str, list[tuple[float, ...]]]:
    """Where the frames lie that are derived from each image (PS3.3 C.7.6.16.2.3, C.7.6.16.2.6)."""
    places: dict[str, list[tuple[float, ...]]] = {}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        for derivation in frame.get("DerivationImageSequence") or []:
            for source in derivation.get("SourceImageSequence") or []:
                places.setdefault(str(source.ReferencedSOPInstanceUID), []).append(tuple(float(v) for v in position))
    return places


def read_masks(mask: MaskFile, series: CtSeries) -> dict[str, NDArray[np.uint8]]:
    """Masks of a series' images.

    Args:
      mask: a SEG that refers to this series.
      series: the images; the masks come in their pixel grid.
    Returns:
      SOP instance UID -> uint8 (Y, X) of 0 and 1, for every image of the series that the SEG speaks of.
    Raises:
      DicomError: the SEG refers to an image that is not there, or to another grid or frame of reference.
    """
    by_uid = {s.sop_uid: s for s in series.slices}
    absent = mask.sop_uids - by_uid.keys()
    if absent:
        raise DicomError(
            f"mask refers to {len(absent)} images that are not among the series' {len(by_uid)}; "
            "export the whole series, or remove the mask"
        )
    wanted = sorted(mask.sop_uids)
    try:
        seg = highdicom.seg.segread(mask.path)
        number = int(seg.SegmentSequence[0].SegmentNumber)
        # Many writers do not declare that a frame lies where its image lies; _check_places looks for itself.
        pixels_NYX = seg.get_pixels_by_source_instance(
            wanted,
            segment_numbers=[number],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
            ignore_spatial_locations=True,
        )
        places = _frame_places(seg)
    except Exception as error:  # highdicom raises many types for a damaged SEG
        raise DicomError(f"mask cannot be decoded ({type(error).__name__}: {str(error)[:120]})") from error
    frame = str(seg.get("FrameOfReferenceUID", ""))
    masks = {}
    for uid, pixels_YX in zip(wanted, pixels_NYX, strict=True):
        for position_mm in places.get(uid, ()):
            if np.abs(np.subtract(position_mm, by_uid[uid].position_mm)).max() > PLACE_TOLERANCE_MM:
                raise DicomError(
                    f"a frame of the mask lies at {position_mm} mm, its image at {by_uid[uid].position_mm}"
                )
        image = by_uid[uid]
        if pixels_YX.shape != image.shape:
            raise DicomError(f"mask is {pixels_YX.shape} pixels, its image {image.shape}; expected the same grid")
        if frame and image.frame_uid and frame != image.frame_uid:
            raise DicomError("mask has another frame of reference than its image; expected the same")
        masks[uid] = (pixels_YX > 0).astype(np.uint8)
    return masks
