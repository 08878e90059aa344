"""DICOM segmentations (PS3.3 A.51) to hematoma masks.

BINARY, FRACTIONAL and LABELMAP, overlapping segments, gapped frames, and frames as 3D Slicer, OHIF and dcmqi write them: with
or without references to the images that they were drawn on. A frame's position decides where it belongs; what it names must
agree. Stays in the hospital.

Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import UID, SegmentationStorage

from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries
from client.masks.drawn import ABSENT, NOWHERE, OTHER_SEGMENT, Drawn, choose_segments
from client.masks.seg_frames import Frame, frames_of

LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")  # Label Map Segmentation Storage, unknown to pydicom 3.0
SEG_CLASSES = (SegmentationStorage, LABEL_MAP_STORAGE)
PLACE_TOLERANCE_MM = 0.1  # between a frame's corner and its image's; writers round positions
SPACING_TOLERANCE = 0.001  # share of the pixel spacing
DIRECTION_TOLERANCE = 0.002  # of a cosine; the images' own may differ by rounding
FRACTION = 0.5  # from here on a fractional segment's pixel is hematoma
_BACKGROUND = "DCM:125040"  # a label map describes its background as a segment


@dataclass(frozen=True)
class SegHead:
    """References of a segmentation to its images.

    Attributes:
      listed: SOP instance UIDs that it was made on (PS3.3 C.12.4, C.7.6.16.2.6).
      sources: those that its frames name; a subset.
      places: positions of its frames, (x, y, z) one after the other; only of one that names no image.
      space: FrameOfReferenceUID.
    """

    listed: frozenset[str]
    sources: frozenset[str]
    places: tuple[float, ...]
    space: str


def seg_head(seg: pydicom.Dataset) -> SegHead:
    """Read the references of a segmentation from its header.

    Raises:
      DicomError: it names no image, and does not say where all its frames lie.
    """
    groups = seg.get("PerFrameFunctionalGroupsSequence") or []
    sources = {uid for group in groups for uid, _ in _named(group)}
    listed = {
        str(item.get("ReferencedSOPInstanceUID", ""))
        for series in seg.get("ReferencedSeriesSequence") or []
        for item in series.get("ReferencedInstanceSequence") or []
    } | {str(item.get("ReferencedSOPInstanceUID", "")) for item in seg.get("SourceImageSequence") or []}
    listed = (listed | sources) - {""}
    places: set[tuple[float, ...]] = set()
    if not listed:
        shared = next(iter(seg.get("SharedFunctionalGroupsSequence") or []), pydicom.Dataset())
        places = {_numbers(group, shared, "PlanePositionSequence", "ImagePositionPatient", 3) for group in groups}
        if not places:
            raise DicomError("refers to no image and has no frames; export the mask again with its references")
    flat = tuple(value for place in sorted(places) for value in place)
    return SegHead(frozenset(listed), frozenset(sources - {""}), flat, str(seg.get("FrameOfReferenceUID", "")))


def read_seg(path: Path, series: CtSeries, pseudonyms: Pseudonyms, segments: Sequence[str | int]) -> Drawn:
    """Masks of a series' images; see client/masks/match.py read_masks."""
    seg = pydicom.dcmread(path)
    groups = list(seg.get("PerFrameFunctionalGroupsSequence") or [])
    if not groups:
        raise DicomError(
            "without PerFrameFunctionalGroupsSequence, so where its frames lie is not known; export it again"
        )
    shared = next(iter(seg.get("SharedFunctionalGroupsSequence") or []), pydicom.Dataset())
    names = _segments(seg)
    chosen = choose_segments(names, segments)
    _check_space(seg, series, pseudonyms)
    listed = {pseudonyms.of("image", uid) for uid in seg_head(seg).listed}
    by_instance = _by_instance(series)
    looked = {image.image for name in listed for image in by_instance.get(name, ())}
    masks: dict[str, dict[str, NDArray[np.uint8]]] = {}
    taken, left = Counter[str](), Counter[str]()
    frames, regions = frames_of(seg, len(groups)), _regions(seg, names, chosen)
    for number, group in enumerate(groups):
        wanted = _wanted(group, shared, names, chosen, number) if _kind(seg) != "LABELMAP" else chosen
        if not wanted:
            left[OTHER_SEGMENT] += 1
            continue
        image, reason = _place(group, shared, series, by_instance, pseudonyms)
        if reason or image is None:
            left[reason] += 1
            continue
        stored_YX = frames(number)
        if stored_YX.shape != image.shape:
            raise DicomError(f"mask is {stored_YX.shape} pixels, its image {image.shape}; expected the same")
        taken[image.image] += 1
        looked.add(image.image)
        for segment, mask_YX in regions(stored_YX, wanted):
            found = masks.setdefault(segment, {})
            found[image.image] = found[image.image] | mask_YX if image.image in found else mask_YX
    _check_lost(taken, left)
    if left[NOWHERE]:  # of which image these are is not known: an empty mask could be any of them
        looked &= taken.keys()
    return Drawn(masks, frozenset(looked), len(groups), taken, left)


def _check_lost(taken: Counter[str], left: Counter[str]) -> None:
    """Refuse a mask of which nothing, or the smaller part, lies on the images: the rest is where it is by chance."""
    lost = next((reason for reason in left if reason != OTHER_SEGMENT), "")
    if (lost and not taken) or left[NOWHERE] > taken.total():
        raise DicomError(
            f"{left[lost]} of {left[lost] + taken.total()} frames of its segment are {lost}: is it a mask of another export, or of a "
            "volume that a program straightened (tilted gantry, uneven distances)? draw it on the images themselves"
        )


def _by_instance(series: CtSeries) -> dict[str, list[CtSlice]]:
    """SOP instance -> its images in a series, under every name that they were sent with."""
    found: dict[str, list[CtSlice]] = {}
    for one in series.slices:
        for name in (one.instance, *one.copies):
            found.setdefault(name, []).append(one)
    return found


def _kind(seg: pydicom.Dataset) -> str:
    """BINARY, FRACTIONAL or LABELMAP."""
    kind = str(seg.get("SegmentationType", ""))
    if seg.SOPClassUID == LABEL_MAP_STORAGE:
        kind = "LABELMAP"
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise DicomError("SegmentationType is none of BINARY, FRACTIONAL and LABELMAP; export the mask again")
    return kind


def _segments(seg: pydicom.Dataset) -> dict[int, tuple[str, ...]]:
    """Number -> label and code, as far as they are there, of a file's segments."""
    found: dict[int, tuple[str, ...]] = {}
    for item in seg.get("SegmentSequence") or []:
        code = next(iter(item.get("SegmentedPropertyTypeCodeSequence") or []), pydicom.Dataset())
        value = str(code.get("CodeValue", "") or code.get("LongCodeValue", ""))
        coded = f"{code.get('CodingSchemeDesignator', '')}:{value}" if value else ""
        number = item.get("SegmentNumber")
        if number is None or int(number) in found:
            raise DicomError("two segments have one SegmentNumber, or one has none; expected one each: export it again")
        if coded != _BACKGROUND:
            found[int(number)] = tuple(filter(None, (str(item.get("SegmentLabel", "") or ""), coded)))
    if not found:
        raise DicomError("describes no segment; expected a SegmentSequence: export the mask again")
    return found


def _check_space(seg: pydicom.Dataset, series: CtSeries, pseudonyms: Pseudonyms) -> None:
    """Refuse a mask in another frame of reference than its images, where both say theirs."""
    space = str(seg.get("FrameOfReferenceUID", ""))
    if space and any(s.space not in ("", pseudonyms.of("space", space)) for s in series.slices):
        raise DicomError(
            "mask has another frame of reference than its images; expected the same: draw it on these images"
        )


def _regions(seg: pydicom.Dataset, names: Mapping[int, tuple[str, ...]], chosen: Sequence[int]):
    """Return the function that turns a frame's stored values into masks: (values, segments) -> segment's name and uint8 (Y, X)."""
    kind, called = _kind(seg), {n: (names[n] or (str(n),))[0].casefold() for n in chosen}
    most = int(seg.get("MaximumFractionalValue") or 0)
    if kind == "FRACTIONAL" and most <= 0:
        raise DicomError("a FRACTIONAL segmentation without MaximumFractionalValue; export the mask again")
    known = np.array([0, int(seg.get("PixelPaddingValue") or 0), *_numbers_of(seg)])

    def regions(stored_YX: Frame, wanted: Sequence[int]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        if kind == "LABELMAP":
            strange = np.setdiff1d(stored_YX, known)
            if strange.size:
                raise DicomError(
                    f"a label map with the number {strange[0]}, which no segment has; export the mask again"
                )
            for number in wanted:
                yield called[number], (stored_YX == number).astype(np.uint8)
        else:
            if kind == "BINARY" and stored_YX.max() > 1:
                raise DicomError(f"a BINARY segmentation with the value {stored_YX.max()}; expected 0 and 1")
            inside_YX = stored_YX >= FRACTION * most if kind == "FRACTIONAL" else stored_YX > 0
            yield called[wanted[0]], inside_YX.astype(np.uint8)

    return regions


def _numbers_of(seg: pydicom.Dataset) -> list[int]:
    """Numbers of all segments, the background's too."""
    return [int(item.SegmentNumber) for item in seg.SegmentSequence]


def _wanted(
    group: pydicom.Dataset, shared: pydicom.Dataset, names: Mapping[int, object], chosen: Sequence[int], number: int
) -> list[int]:
    """The segment of a frame if it is one of the chosen (PS3.3 C.8.20.3.1)."""
    item = _macro(group, shared, "SegmentIdentificationSequence")
    segment = None if item is None else item.get("ReferencedSegmentNumber")
    if segment is None or int(segment) not in names:
        raise DicomError(f"frame {number + 1} is of no segment that the file describes; export the mask again")
    return [int(segment)] if int(segment) in chosen else []


def _named(group: pydicom.Dataset) -> list[tuple[str, tuple[int, ...]]]:
    """Images that a frame says it was made on: SOP instance UID, and frames of it."""
    return [
        (
            str(source.get("ReferencedSOPInstanceUID", "")),
            tuple(np.atleast_1d(source.get("ReferencedFrameNumber", ())).astype(int)),
        )
        for derivation in group.get("DerivationImageSequence") or []
        for source in derivation.get("SourceImageSequence") or []
    ]


def _place(
    group: pydicom.Dataset,
    shared: pydicom.Dataset,
    series: CtSeries,
    by_instance: Mapping[str, Sequence[CtSlice]],
    pseudonyms: Pseudonyms,
) -> tuple[CtSlice | None, str]:
    """The image that a frame lies on and "", else None and why the frame is left out.

    Source: PS3.3 C.7.6.16.2.1 to C.7.6.16.2.6.
    """
    position = _numbers(group, shared, "PlanePositionSequence", "ImagePositionPatient", 3)
    named = [(pseudonyms.of("image", uid), frames) for uid, frames in _named(group) if uid]
    candidates: Sequence[CtSlice] = series.slices
    if named:
        candidates = [
            image
            for name, frames in named
            for image in by_instance.get(name, ())
            if image.frames == 1 or not frames or image.frame + 1 in frames
        ]
    if not candidates:
        return None, ABSENT
    away_mm, image = min(
        ((float(np.abs(np.subtract(position, s.position_mm)).max()), s) for s in candidates), key=lambda pair: pair[0]
    )
    if away_mm > PLACE_TOLERANCE_MM:
        if not named:
            return None, NOWHERE
        raise DicomError(
            f"a frame of the mask lies {away_mm:.1f} mm from its image, expected the same place; draw it on the images themselves, "
            "not on a volume that a program straightened"
        )
    measures = _numbers(group, shared, "PixelMeasuresSequence", "PixelSpacing", 2)
    along = _numbers(group, shared, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    if not np.allclose(measures, image.spacing_mm, rtol=SPACING_TOLERANCE):
        raise DicomError(f"mask has pixels of {list(measures)} mm, its image {image.spacing_mm}; expected the same")
    if not np.allclose(along, (*image.row_direction, *image.column_direction), atol=DIRECTION_TOLERANCE):
        raise DicomError("mask has another orientation than its image; expected the same")
    return image, ""


def _macro(group: pydicom.Dataset, shared: pydicom.Dataset, name: str) -> pydicom.Dataset | None:
    """A functional group's first item, of the frame or shared."""
    return next(iter(group.get(name) or shared.get(name) or []), None)


def _numbers(
    group: pydicom.Dataset, shared: pydicom.Dataset, macro: str, keyword: str, count: int
) -> tuple[float, ...]:
    """Read `count` numbers of a functional group."""
    item = _macro(group, shared, macro)
    values = None if item is None else item.get(keyword)
    try:
        found = tuple(float(value) for value in values) if values is not None else ()
    except (TypeError, ValueError):
        found = ()
    if len(found) != count or not np.isfinite(found).all():
        raise DicomError(f"a frame without {keyword} ({macro}), so where it lies is not known; export the mask again")
    return found
