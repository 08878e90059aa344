"""RTSTRUCT contours (PS3.3 A.19, C.8.8.6) to hematoma masks.

A contour that cannot be used costs itself, and the images that it alone was drawn on: they get no mask rather than an empty
one. Stays in the hospital. Shape suffixes: P point, Y row, X column.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray

from client.dicom.elements import word
from client.dicom.faults import DicomError
from client.dicom.headers import CtSlice, normal_of
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries
from client.masks.drawn import ABSENT, OTHER_SEGMENT, Drawn, choose_segments
from client.masks.polygons import Points, encloses_nothing, fill, opposed

PLANE_TOLERANCE_MM = 0.5  # between a contour's points and its image's plane
BEYOND_PX = 1.0  # a contour may run around its picture's outermost pixels
_AGAIN = "export the contours again"
_OPPOSED = "on images with one contour twice in opposite directions, which is a ring or a repetition"
_EMPTY, _FINE = "without points", "that enclose no pixel's centre"
_KINDS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


@dataclass(frozen=True)
class _Contour:
    """One contour of a chosen region.

    Attributes:
      roi: number of its region.
      image: the image it was drawn on; None if that is not there.
      points: in the image's pixels; no rows for one that cannot be used.
      exclusive: it counts by the odd number of contours around a pixel.
      lost: why it cannot be used, "" if it can.
    """

    roi: int
    image: CtSlice | None
    points: Points
    exclusive: bool = False
    lost: str = ""


def contour_references(ds: pydicom.Dataset) -> tuple[set[str], set[str]]:
    """SOP instance UIDs of an RTSTRUCT's images (PS3.3 C.8.8.5): all, and those that contours name.

    Raises:
      DicomError: none.
    """
    listed = {
        str(image.get("ReferencedSOPInstanceUID", ""))
        for frame in ds.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
        for image in series.get("ContourImageSequence") or []
    }
    sources = {
        str(image.get("ReferencedSOPInstanceUID", ""))
        for _, contour in _contours(ds)
        for image in contour.get("ContourImageSequence") or []
    }
    if not (listed | sources) - {""}:
        raise DicomError(
            f"refers to no image; expected ReferencedSOPInstanceUID in ContourImageSequence: {_AGAIN} with their references"
        )
    return (listed | sources) - {""}, sources - {""}


def contour_count(ds: pydicom.Dataset) -> int:
    """Contours in a file, of all regions."""
    return sum(1 for _ in _contours(ds))


def _contours(ds: pydicom.Dataset) -> Iterator[tuple[int, pydicom.Dataset]]:
    """Region's number and contour."""
    for roi in ds.get("ROIContourSequence") or []:
        for contour in roi.get("ContourSequence") or []:
            yield int(roi.get("ReferencedROINumber") if roi.get("ReferencedROINumber") is not None else -1), contour


def read_contours(path: Path, series: CtSeries, pseudonyms: Pseudonyms, segments: Sequence[str | int]) -> Drawn:
    """Masks of a series' images; see client/masks/match.py read_masks."""
    ds = pydicom.dcmread(path)
    names = _regions(ds)
    chosen = choose_segments(names, segments)
    drawn = [(roi, contour) for roi, contour in _contours(ds) if roi in chosen]
    if not drawn:
        raise DicomError(
            f"its region has no contours (ROIContourSequence); expected at least one: {_AGAIN}, or remove the file"
        )
    _check_space(ds, chosen, drawn, series, pseudonyms)
    _check_writer(ds, series)
    listed, _ = contour_references(ds)
    hashes = {pseudonyms.of("image", uid) for uid in listed}
    looked = {s.image for s in series.slices if hashes & {s.instance, *s.copies}}
    contours = [_read_contour(roi, contour, series, pseudonyms) for roi, contour in drawn]
    contours = _without_opposed(contours)
    usable = [c for c in contours if not c.lost]
    total = contour_count(ds)
    left = Counter[str](c.lost for c in contours if c.lost)
    left[OTHER_SEGMENT] = total - len(drawn)
    taken = Counter[str](c.image.image for c in usable if c.image)
    if not usable:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.items() if count and reason != OTHER_SEGMENT)
        raise DicomError(
            f"none of its region's {len(drawn)} contours can be used ({reasons}); expected CLOSED_PLANAR ones"
        )
    blind = {c.image.image for c in contours if c.lost and c.image} - taken.keys()
    return Drawn(_masks(usable, names), frozenset((looked | taken.keys()) - blind), total, taken, left)


def _without_opposed(contours: list[_Contour]) -> list[_Contour]:
    """The contours, those of an image lost where it cannot be known whether two of them are a ring."""
    groups: dict[tuple[int, str], list[_Contour]] = defaultdict(list)
    for one in contours:
        if not one.lost and not one.exclusive:
            groups[one.roi, one.image.image].append(one)
    lost = {image for (_, image), members in groups.items() if opposed([c.points for c in members])}
    return [replace(c, lost=_OPPOSED) if not c.lost and c.image.image in lost else c for c in contours]


def _check_writer(ds: pydicom.Dataset, series: CtSeries) -> None:
    """Refuse what rt-utils (1.2.7) writes wrongly: it takes a series for a straight, even grid and swaps oblong pixels' sides."""
    if "rt-utils" not in f"{ds.get('Manufacturer', '')} {ds.get('ManufacturerModelName', '')}".lower():
        return
    gaps = np.diff([s.height_mm for s in series.slices])
    down_mm, right_mm = series.slices[0].spacing_mm
    wrong = {
        "its slices are shifted against each other, as with a tilted gantry": series.sheared_mm > PLANE_TOLERANCE_MM,
        "its slices are at uneven distances": len(gaps) > 1 and np.ptp(gaps) > PLANE_TOLERANCE_MM,
        f"its pixels are oblong ({down_mm:g} x {right_mm:g} mm)": not np.isclose(down_mm, right_mm, rtol=1e-3),
    }
    reason = next((text for text, holds in wrong.items() if holds), "")
    if reason:
        raise DicomError(
            f"written by rt-utils, which misplaces contours on this series: {reason}; save the mask as DICOM SEG with highdicom, or "
            "slice by slice as SOPInstanceUID.png"
        )


def _regions(ds: pydicom.Dataset) -> dict[int, tuple[str, ...]]:
    """Number -> name of the regions (PS3.3 C.8.8.5)."""
    found = {}
    for item in ds.get("StructureSetROISequence") or []:
        if item.get("ROINumber") is None:
            raise DicomError(f"a region without ROINumber; expected one each: {_AGAIN}")
        found[int(item.ROINumber)] = tuple(filter(None, [str(item.get("ROIName", "") or "")]))
    if not found:
        raise DicomError(f"describes no region (StructureSetROISequence); expected the hematoma's: {_AGAIN}")
    return found


def _masks(contours: Sequence[_Contour], names: dict[int, tuple[str, ...]]) -> dict[str, dict[str, NDArray[np.uint8]]]:
    """Region's name -> image name -> mask of its contours."""
    groups: dict[tuple[int, str, bool], list[_Contour]] = defaultdict(list)
    for one in contours:
        groups[one.roi, one.image.image, one.exclusive].append(one)
    masks: dict[str, dict[str, NDArray[np.uint8]]] = defaultdict(dict)
    for (roi, image, exclusive), members in groups.items():
        mask_YX = fill([c.points for c in members], members[0].image.shape, exclusive)
        found = masks[(names[roi] or (str(roi),))[0].casefold()]
        found[image] = found[image] | mask_YX if image in found else mask_YX
    return masks


def _check_space(
    ds: pydicom.Dataset,
    chosen: Sequence[int],
    drawn: Sequence[tuple[int, pydicom.Dataset]],
    series: CtSeries,
    pseudonyms: Pseudonyms,
) -> None:
    """Whether the contours are in their images' frame of reference, where that is what places them.

    Some writers (rt-utils among them) invent a frame of reference; contours that name their images are then placed by
    these and must lie in their planes.
    """
    frames = {
        str(item.get("ReferencedFrameOfReferenceUID", ""))
        for item in ds.StructureSetROISequence
        if int(item.ROINumber) in chosen
    }
    names = {pseudonyms.of("space", frame) for frame in frames if frame}
    unnamed = any(not contour.get("ContourImageSequence") for _, contour in drawn)
    if unnamed and any(s.space and names and s.space not in names for s in series.slices):
        raise DicomError(
            f"contours have another frame of reference than their images, and name none; expected the same: {_AGAIN}"
        )


def _read_contour(roi: int, contour: pydicom.Dataset, series: CtSeries, pseudonyms: Pseudonyms) -> _Contour:
    """A contour in its image's pixels, or why it cannot be used."""
    points = _points(contour)
    image = _image_of(contour, points, series, pseudonyms)
    kind, none = str(contour.get("ContourGeometricType", "")), np.zeros((0, 2))
    if not len(points):
        return _Contour(roi, image, none, lost=_EMPTY)
    if kind not in _KINDS:
        return _Contour(roi, image, none, lost=f"of type {word(kind)}, not {_KINDS[0]}")
    if image is None:
        return _Contour(roi, image, none, lost=ABSENT)
    away_mm = _away_mm(points, image)
    if away_mm > PLANE_TOLERANCE_MM:
        raise DicomError(
            f"a contour lies {away_mm:.1f} mm from its image's plane, expected in it: is it of another series? {_AGAIN}"
        )
    offset = points - image.position_mm
    rows = offset @ np.array(image.column_direction) / image.spacing_mm[0]
    columns = offset @ np.array(image.row_direction) / image.spacing_mm[1]
    pixels = np.stack([rows, columns], axis=1)
    beyond = float(np.maximum(-pixels, pixels - np.array(image.shape) + 1).max())
    if beyond > BEYOND_PX:
        raise DicomError(f"a contour reaches {beyond:.0f} pixels beyond its picture, expected within it: {_AGAIN}")
    lost = _FINE if encloses_nothing(pixels, image.shape) else ""
    return _Contour(roi, image, pixels, kind == _KINDS[1], lost)


def _points(contour: pydicom.Dataset) -> NDArray[np.float64]:
    """A contour's points, float64 (P, 3), patient's mm."""
    data = contour.get("ContourData")
    try:
        values = np.atleast_1d(np.array([] if data is None or data == "" else data, dtype=float))
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if values.size % 3 or not np.isfinite(values).all():
        raise DicomError(f"a contour of {values.size} numbers, expected three for each point: {_AGAIN}")
    return values.reshape(-1, 3)


def _image_of(
    contour: pydicom.Dataset, points: NDArray[np.float64], series: CtSeries, pseudonyms: Pseudonyms
) -> CtSlice | None:
    """The image that a contour was drawn on: the one it names, else the one in whose plane it lies; None if not there."""
    candidates: Sequence[CtSlice] = series.slices
    named = contour.get("ContourImageSequence")
    if named:
        hashes = {pseudonyms.of("image", str(item.get("ReferencedSOPInstanceUID", ""))) for item in named}
        candidates = [s for s in series.slices if hashes & {s.instance, *s.copies}]
    elif not len(points):
        return None
    if not len(points):
        return candidates[0] if len(candidates) == 1 else None
    return min(candidates, key=lambda s: _away_mm(points, s), default=None)


def _away_mm(points: NDArray[np.float64], image: CtSlice) -> float:
    """Largest distance of points from an image's plane."""
    normal = np.array(normal_of(image.row_direction, image.column_direction))
    return float(np.abs((points - image.position_mm) @ normal).max())
