"""Masks changed as other writers and broken exports change them: what comes out is what was drawn, or left out by name.

Frames dropped, doubled, moved, shuffled, references cut; contours reversed, doubled, emptied, moved off their plane, references
cut, shuffled. Per image the result is the mask that was drawn, or none beside a reason; never another mask, nor an empty one in
its place. What a changed file cannot show is left out: a frame that is gone from header and pixels alike is a mask of less.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset

from client.dicom.elements import silence_readers
from client.dicom.faults import DicomError
from client.dicom.series import CtSeries
from client.masks.match import SeriesMasks, match_masks, read_masks
from tests.client.masks.test_rtstruct import centres, rtstruct
from tests.support.dicom_files import write_series
from tests.support.mask_files import KEY, read_one, series_of, truth, write_seg

SEG_CHANGES = (
    "drop",
    "double",
    "move",
    "nudge",
    "shuffle",
    "cut list",
    "cut sources",
    "cut derivation",
    "cut place",
    "cut space",
)
CONTOUR_CHANGES = (
    "drop image",
    "double",
    "reverse",
    "turn",
    "empty",
    "point",
    "off plane",
    "nudge",
    "shuffle",
    "cut list",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silence_readers()
    return tmp_path_factory.mktemp("masks")


@lru_cache
def base(place: Path) -> tuple[CtSeries, Path, Path]:
    """A series with a SEG and an RTSTRUCT of the truth, every image drawn on."""
    images = write_series(place / "images")
    datasets = [pydicom.dcmread(path) for path in images]
    seg = write_seg(place / "whole.dcm", datasets, drawn(), omit_empty_frames=False)
    contours = [(n, c) for n, mask_YX in enumerate(drawn()) for c in centres(mask_YX, 5.0 * n)]
    rt = rtstruct(place / "whole-rt.dcm", datasets, contours)
    (series,) = series_of(*images)
    return series, seg, rt


def drawn() -> np.ndarray:
    masks = truth()
    masks[3, 50:53, 9:14] = 1
    masks[1, 23:26, 28:31] = 0  # a hole
    return masks


def read(path: Path, series: CtSeries) -> tuple[SeriesMasks | None, list[str]]:
    """The masks, and all reasons."""
    try:
        mask = read_one(path)
    except DicomError as error:
        return None, [str(error)]
    matched, faults = match_masks([mask], [series])
    if not matched:
        return None, [f.reason for f in faults]
    found = read_masks([mask], series, KEY, ())
    (tally,) = found.tallies
    assert tally.total == mask.pieces  # the account closes by itself: Tally asserts it
    return found, [f.reason for f in found.faults]


def assert_nothing_changed_silently(path: Path, series: CtSeries) -> None:
    found, reasons = read(path, series)
    if found is None or not found.masks:
        assert reasons
        return
    for image, expected_YX in zip(series.slices, drawn(), strict=True):
        mask_YX = found.masks.get(image.image)
        if mask_YX is None:
            assert reasons, "an image without a mask, and nobody says why"
        else:
            np.testing.assert_array_equal(mask_YX, expected_YX)


def change_seg(ds: Dataset, kind: str, number: int) -> None:
    """One change of a SEG; frames of 64 x 64 bits are 512 bytes."""
    groups, data = list(ds.PerFrameFunctionalGroupsSequence), ds.PixelData
    parts = [data[512 * n : 512 * (n + 1)] for n in range(len(data) // 512)]
    at = number % max(1, len(groups))
    if kind == "drop":
        groups = groups[:at] + groups[at + 1 :]  # the header's frame, not the pixels'
    elif kind == "double" and len(groups) == len(parts):
        groups.append(groups[at])
        parts.append(parts[at])
    elif kind in ("move", "nudge") and groups and "PlanePositionSequence" in groups[at]:
        group = Dataset.from_json(groups[at].to_json())  # doubled frames share theirs
        shift = 0.3 + number % 4 if kind == "move" else 0.04
        position = list(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        position[number % 3] += shift
        group.PlanePositionSequence[0].ImagePositionPatient = position
        groups[at] = group
    elif kind == "shuffle" and len(groups) == len(parts):
        order = np.random.default_rng(number).permutation(len(groups))
        groups, parts = [groups[n] for n in order], [parts[n] for n in order]
    elif kind == "cut list" and "ReferencedSeriesSequence" in ds:
        listed = ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        del listed[number % 5 :]
        if not listed:
            del ds.ReferencedSeriesSequence
    elif kind == "cut sources" and "SourceImageSequence" in ds:
        del ds.SourceImageSequence
    elif kind == "cut derivation" and groups and "DerivationImageSequence" in groups[at]:
        del groups[at].DerivationImageSequence
    elif kind == "cut place" and groups and "PlanePositionSequence" in groups[at]:
        del groups[at].PlanePositionSequence
    elif kind == "cut space" and "FrameOfReferenceUID" in ds:
        del ds.FrameOfReferenceUID
    ds.PerFrameFunctionalGroupsSequence, ds.PixelData = groups, b"".join(parts)
    ds.NumberOfFrames = len(groups)


@given(changes=st.lists(st.tuples(st.sampled_from(SEG_CHANGES), st.integers(0, 99)), min_size=1, max_size=5))
def test_a_changed_seg_is_what_was_drawn_or_left_out_by_name(place: Path, changes: list[tuple[str, int]]) -> None:
    series, seg, _ = base(place)
    ds = pydicom.dcmread(seg)
    for kind, number in changes:
        change_seg(ds, kind, number)
    ds.save_as(place / "changed.dcm")
    assert_nothing_changed_silently(place / "changed.dcm", series)


def change_contours(ds: Dataset, kind: str, number: int) -> None:
    """One change of an RTSTRUCT."""
    contours = ds.ROIContourSequence[0].ContourSequence
    one = contours[number % len(contours)]
    points = np.array(one.ContourData, float).reshape(-1, 3) if one.get("ContourData") else np.zeros((0, 3))
    if kind == "drop image" and "ContourImageSequence" in one:
        del one.ContourImageSequence
    elif kind == "double":
        contours.append(Dataset.from_json(one.to_json()))
    elif kind == "reverse":
        points = points[::-1]
    elif kind == "turn":
        points = np.roll(points, number, axis=0)
    elif kind == "off plane" and len(points):
        points[:, 2] = 5 * np.rint(points[:, 2] / 5) + 0.7 + number % 2  # in no image's plane, however often
    elif kind == "nudge" and len(points):
        points = points + np.array([0.003, -0.003, 0.2])
    elif kind == "point":
        one.ContourGeometricType = "POINT"
    elif kind == "shuffle":
        order = np.random.default_rng(number).permutation(len(contours))
        ds.ROIContourSequence[0].ContourSequence = [contours[n] for n in order]
    elif kind == "cut list" and "ReferencedFrameOfReferenceSequence" in ds:
        del ds.ReferencedFrameOfReferenceSequence
    if kind == "empty":
        points = points[:0]
    one.ContourData = [f"{v:.4f}" for v in points.ravel()]
    one.NumberOfContourPoints = len(points)


def holds_all(ds: Dataset) -> bool:
    """Whether no image has lost one of several contours: then the rest is another drawing, with the loss told."""
    return all(
        c.get("ContourData") and c.ContourGeometricType == "CLOSED_PLANAR"
        for c in ds.ROIContourSequence[0].ContourSequence
    )


@given(changes=st.lists(st.tuples(st.sampled_from(CONTOUR_CHANGES), st.integers(0, 99)), min_size=1, max_size=5))
def test_a_changed_rtstruct_is_what_was_drawn_or_left_out_by_name(place: Path, changes: list[tuple[str, int]]) -> None:
    series, _, rt = base(place)
    ds = pydicom.dcmread(rt)
    for kind, number in changes:
        change_contours(ds, kind, number)
    ds.save_as(place / "changed-rt.dcm")
    if holds_all(ds):
        assert_nothing_changed_silently(place / "changed-rt.dcm", series)
    else:
        _, reasons = read(place / "changed-rt.dcm", series)
        assert reasons, "a contour that cannot be used, and nobody says so"
