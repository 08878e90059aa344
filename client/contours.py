"""RTSTRUCT contours (PS3.3 A.19, C.8.8.6) to hematoma masks.

A pixel is in the mask when its centre is inside the contour; of several contours on one image, what an odd number of
them encloses, so that an inner contour is a hole. Stays in the hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray

from client.dicom import DicomError, pseudonym, word
from client.images import CtSlice
from client.seg import choose_segments
from client.series import CtSeries

PLANE_TOLERANCE_MM = 0.5  # between a contour's points and its image's plane


def contour_references(ds: pydicom.Dataset) -> set[str]:
    """SOP instance UIDs of the images that contours were drawn on (PS3.3 C.8.8.5)."""
    uids = {
        str(image.get("ReferencedSOPInstanceUID", ""))
        for frame in ds.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
        for image in series.get("ContourImageSequence") or []
    }
    uids |= {
        str(image.get("ReferencedSOPInstanceUID", ""))
        for roi in ds.get("ROIContourSequence") or []
        for contour in roi.get("ContourSequence") or []
        for image in contour.get("ContourImageSequence") or []
    }
    if not uids or "" in uids:
        raise DicomError("refers to no image; expected ReferencedSOPInstanceUID in ContourImageSequence")
    return uids


def read_contours(
    path: Path, series: CtSeries, key: bytes, segments: Sequence[str | int]
) -> dict[str, NDArray[np.uint8]]:
    """Masks of a series' images; see client/masks.py read_mask."""
    ds = pydicom.dcmread(path)
    if any(s.frames > 1 for s in series.slices):
        raise DicomError(
            "contours on a multi-frame image are not read; export the images one by one, or the mask as SEG"
        )
    regions = {int(item.ROINumber): (str(item.ROIName),) for item in ds.StructureSetROISequence}
    chosen = choose_segments(regions, segments)
    _check_frame(ds, chosen, series, key)
    listed = {pseudonym(key, "image", uid) for uid in contour_references(ds)}
    masks = {s.image: np.zeros(s.shape, np.uint8) for s in series.slices if s.image in listed}
    for roi in ds.ROIContourSequence:
        if int(roi.ReferencedROINumber) not in chosen:
            continue
        region = {name: np.zeros_like(mask_YX) for name, mask_YX in masks.items()}
        for contour in roi.get("ContourSequence") or []:
            if contour.ContourGeometricType not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
                raise DicomError(f"a contour of type {word(str(contour.ContourGeometricType))}, expected CLOSED_PLANAR")
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            image = _image_of(contour, points, series, key)
            if image is not None:
                region.setdefault(image.image, np.zeros(image.shape, np.uint8))
                region[image.image] ^= fill_polygon(points, image)
        for name, region_YX in region.items():
            masks[name] = masks.get(name, np.zeros_like(region_YX)) | region_YX
    return masks


def _check_frame(ds: pydicom.Dataset, chosen: list[int], series: CtSeries, key: bytes) -> None:
    """Whether the contours are in their images' frame of reference, where that is what places them.

    Some writers (rt-utils among them) invent a frame of reference; contours that name their images are then placed by
    these and must lie in their planes.
    """
    frames = {
        str(item.get("ReferencedFrameOfReferenceUID", ""))
        for item in ds.StructureSetROISequence
        if int(item.ROINumber) in chosen
    }
    names = {pseudonym(key, "space", frame) for frame in frames if frame}
    unnamed = any(
        not contour.get("ContourImageSequence")
        for roi in ds.ROIContourSequence
        if int(roi.ReferencedROINumber) in chosen
        for contour in roi.get("ContourSequence") or []
    )
    if unnamed and any(s.space and names and s.space not in names for s in series.slices):
        raise DicomError("contours have another frame of reference than their images, and name none; expected the same")


def _image_of(contour: pydicom.Dataset, points: NDArray[np.float64], series: CtSeries, key: bytes) -> CtSlice | None:
    """The image that a contour was drawn on: the one it names, else the one in whose plane it lies; None if not there."""
    named = contour.get("ContourImageSequence")
    if named:
        name = pseudonym(key, "image", str(named[0].ReferencedSOPInstanceUID))
        image = next((s for s in series.slices if s.image == name), None)
    else:
        image = min(series.slices, key=lambda s: _away_mm(points, s))
    if image is not None and _away_mm(points, image) > PLANE_TOLERANCE_MM:
        raise DicomError(f"a contour lies {_away_mm(points, image):.1f} mm from its image's plane, expected in it")
    return image


def _away_mm(points: NDArray[np.float64], image: CtSlice) -> float:
    """Largest distance of points from an image's plane."""
    normal = np.cross(image.row_direction, image.column_direction)
    return float(np.abs((points - image.position_mm) @ normal).max())


def fill_polygon(points: NDArray[np.float64], image: CtSlice) -> NDArray[np.uint8]:
    """Pixels whose centres are inside a closed polygon.

    Args:
      points: float64 (P, 3), patient's mm.
      image: gives the pixel grid.
    Returns:
      uint8 (Y, X) of 0 and 1.
    """
    offset = points - image.position_mm
    columns = offset @ np.array(image.row_direction) / image.spacing_mm[1]
    rows = offset @ np.array(image.column_direction) / image.spacing_mm[0]
    mask_YX = np.zeros(image.shape, np.uint8)
    top, left = max(0, int(np.floor(rows.min()))), max(0, int(np.floor(columns.min())))
    bottom, right = (min(n, int(np.ceil(v.max())) + 1) for n, v in zip(image.shape, (rows, columns), strict=True))
    if top >= bottom or left >= right:
        return mask_YX
    box = np.mgrid[top:bottom, left:right].reshape(2, -1)
    inside = Polygon(np.stack([columns, rows], axis=1), closed=False).contains_points(box[::-1].T)
    mask_YX[top:bottom, left:right] = inside.reshape(bottom - top, right - left)
    return mask_YX
