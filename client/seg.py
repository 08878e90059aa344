"""DICOM segmentations (PS3.3 A.51) to hematoma masks.

BINARY, FRACTIONAL and LABELMAP, overlapping segments and gapped frames in any encoding: highdicom reads them; what is
added here is the choice of the segment and the checks of place. Stays in the hospital.

Shape suffixes: N image, Y row, X column, S segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import UID, SegmentationStorage

from client.dicom import DicomError, pseudonym, word
from client.images import CtSlice
from client.series import CtSeries

LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")  # Label Map Segmentation Storage, unknown to pydicom 3.0
SEG_CLASSES = (SegmentationStorage, LABEL_MAP_STORAGE)
PLACE_TOLERANCE_MM = 0.1  # between a frame's corner and its image's; writers round positions
SPACING_TOLERANCE = 0.001  # share of the pixel spacing
DIRECTION_TOLERANCE = 0.001
FRACTION = 0.5  # from here on a fractional segment's pixel is hematoma
_BACKGROUND = ("DCM", "125040")  # a label map describes its background as a segment


def seg_references(ds: pydicom.Dataset) -> set[str]:
    """SOP instance UIDs that a segmentation was made on (PS3.3 C.12.4)."""
    uids = {
        str(item.get("ReferencedSOPInstanceUID", ""))
        for series in ds.get("ReferencedSeriesSequence") or []
        for item in series.get("ReferencedInstanceSequence") or []
    }
    if not uids or "" in uids:
        raise DicomError("refers to no image; expected ReferencedSOPInstanceUID in ReferencedSeriesSequence")
    return uids


def read_seg(path: Path, series: CtSeries, key: bytes, segments: Sequence[str | int]) -> dict[str, NDArray[np.uint8]]:
    """Masks of a series' images; see client/masks.py read_mask."""
    seg = highdicom.seg.segread(path)
    chosen = _choose(seg, segments)
    by_name = {s.image: s for s in series.slices}
    frame = str(seg.get("FrameOfReferenceUID", ""))
    if frame and any(s.space not in ("", pseudonym(key, "space", frame)) for s in series.slices):
        raise DicomError("mask has another frame of reference than its images; expected the same")
    _check_places(seg, by_name, key)
    # Many writers do not declare that a frame lies where its image lies; _check_places has looked.
    options = {
        "segment_numbers": chosen,
        "assert_missing_frames_are_empty": True,
        "ignore_spatial_locations": True,
        "rescale_fractional": True,
    }
    uids = {pseudonym(key, "image", uid): uid for uid in seg_references(seg)}
    masks = {}
    for name, sources in _sources(uids, series).items():
        if sources is None:
            pixels_NYXS = seg.get_pixels_by_source_instance([uids[name]], **options)
            names = [name]
        else:
            pixels_NYXS = seg.get_pixels_by_source_frame(uids[name], [s.frame + 1 for s in sources], **options)
            names = [s.image for s in sources]
        for image, pixels_YXS in zip(names, pixels_NYXS, strict=True):
            if pixels_YXS.shape[:2] != by_name[image].shape:
                raise DicomError(
                    f"mask is {pixels_YXS.shape[:2]} pixels, its image {by_name[image].shape}; expected the same"
                )
            masks[image] = (pixels_YXS >= FRACTION).any(axis=-1).astype(np.uint8)
    return masks


def _sources(uids: dict[str, str], series: CtSeries) -> dict[str, list[CtSlice] | None]:
    """Instance -> its frames in the series, None for a single image; only what is in the series."""
    frames: dict[str, list[CtSlice] | None] = {}
    for one in series.slices:
        if one.instance in uids:
            frames[one.instance] = None if one.frames == 1 else [*(frames.get(one.instance) or []), one]
    return frames


def _choose(seg: highdicom.seg.Segmentation, segments: Sequence[str | int]) -> list[int]:
    """Numbers of the segments that are the hematoma."""
    found = {}
    for item in seg.SegmentSequence:
        code = item.SegmentedPropertyTypeCodeSequence[0]
        names = (code.CodingSchemeDesignator, str(code.get("CodeValue", "")))
        if names != _BACKGROUND:
            found[int(item.SegmentNumber)] = (str(item.SegmentLabel), ":".join(names))
    return choose_segments(found, segments)


def choose_segments(found: dict[int, tuple[str, ...]], segments: Sequence[str | int]) -> list[int]:
    """Which of a file's segments are the hematoma.

    Args:
      found: number -> its names.
      segments: data.segment of site.yaml; () if the hospital did not say.
    Raises:
      DicomError: none of several was named, or none of those named is there.
    """
    if not segments and len(found) == 1:
        return list(found)
    wanted = {str(s).casefold() for s in segments}
    chosen = [n for n, names in found.items() if wanted & {str(n), *(name.casefold() for name in names)}]
    if chosen:
        return chosen
    shown = "; ".join(" ".join((str(n), *map(word, names))) for n, names in list(found.items())[:8]) or "none"
    said = f"data.segment {list(segments)} is not among them" if segments else "expected one, the hematoma"
    raise DicomError(f"{len(found)} segments ({shown}): {said}; name it in site.yaml, as data.segment: Hematoma")


def _check_places(seg: pydicom.Dataset, by_name: dict[str, CtSlice], key: bytes) -> None:
    """Whether each frame lies where its image lies (PS3.3 C.7.6.16.2.1 to C.7.6.16.2.6)."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    for group in seg.PerFrameFunctionalGroupsSequence:
        for source in [
            s for d in group.get("DerivationImageSequence") or [] for s in d.get("SourceImageSequence") or []
        ]:
            instance = pseudonym(key, "image", str(source.ReferencedSOPInstanceUID))
            numbers = source.get("ReferencedFrameNumber")
            image = by_name.get(instance if numbers is None else f"{instance}.{np.ravel(numbers)[0]}") or by_name.get(
                instance
            )
            if image is None:
                continue
            measures = _macro(group, shared, "PixelMeasuresSequence").PixelSpacing
            along = _macro(group, shared, "PlaneOrientationSequence").ImageOrientationPatient
            position = _macro(group, shared, "PlanePositionSequence").ImagePositionPatient
            away = np.abs(np.subtract(position, image.position_mm)).max()
            if away > PLACE_TOLERANCE_MM:
                raise DicomError(f"a frame of the mask lies {away:.1f} mm from its image, expected the same place")
            if not np.allclose(measures, image.spacing_mm, rtol=SPACING_TOLERANCE):
                raise DicomError(
                    f"mask has pixels of {list(measures)} mm, its image {image.spacing_mm}; expected the same"
                )
            if not np.allclose(along, (*image.row_direction, *image.column_direction), atol=DIRECTION_TOLERANCE):
                raise DicomError("mask has another orientation than its image; expected the same")


def _macro(group: pydicom.Dataset, shared: pydicom.Dataset, name: str) -> pydicom.Dataset:
    """A functional group's only item, of the frame or shared."""
    return (group.get(name) or shared.get(name))[0]
