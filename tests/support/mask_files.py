"""Masks as hospitals keep them, written for tests, and what the client reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from client.dicom.faults import DicomError, Fault
from client.dicom.headers import read_images
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries, build_series
from client.ingest.scan import FoundFile, scan_file
from client.masks.match import MaskFile, match_masks, read_masks

KEY = Pseudonyms(b"k" * 32)
SHAPE = (64, 64)


def read_one(path: Path) -> MaskFile:
    record = scan_file(FoundFile(path, path.name, "masks", ""), KEY, False)
    if record.fault:
        raise DicomError(record.fault)
    return record.mask


def series_of(*paths: Path) -> list[CtSeries]:
    series, _, faults = build_series(image for path in paths for image in read_images(path, KEY))
    assert faults == []
    return series


def masks_of(
    path: Path, series: list[CtSeries], segments: Sequence[str | int] = ()
) -> tuple[list[np.ndarray | None], list[Fault]]:
    """Per slice from the feet up its mask, None where nobody looked; and the faults."""
    matched, faults = match_masks([read_one(path)], series)
    assert faults == []
    ((name, (mask,)),) = matched.items()
    (one,) = [s for s in series if s.name == name]
    read = read_masks([mask], one, KEY, segments)
    (tally,) = read.tallies
    assert tally.total == mask.pieces or mask.kind == "nifti"  # whose layers may run along another axis
    if not tally.taken and read.faults:
        raise DicomError(read.faults[0].reason)
    assert all(m.dtype == np.uint8 and set(np.unique(m)) <= {0, 1} for m in read.masks.values())
    return [read.masks.get(s.image) for s in one.slices], list(read.faults)


def volume(path: Path, series: list[CtSeries], segments: Sequence[str | int] = ()) -> np.ndarray:
    """Masks of all slices, nothing where nobody looked."""
    masks, _ = masks_of(path, series, segments)
    shape = series[0].slices[0].shape
    return np.stack([np.zeros(shape, np.uint8) if m is None else m for m in masks])


def truth(count: int = 4, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """A blob per slice, none in the last; no symmetry."""
    masks = np.zeros((count, *shape), np.uint8)
    for n in range(count - 1):
        masks[n, 20 + n : 30, 25 : 40 - 2 * n] = 1
    return masks


def describe(number: int, label: str, code: object = codes.SCT.Hematoma) -> SegmentDescription:
    return SegmentDescription(number, label, codes.SCT.MorphologicallyAbnormalStructure, code, "MANUAL")


def write_seg(
    path: Path,
    images: list[Dataset],
    masks: np.ndarray,
    labels: Sequence[str] = ("Hematoma",),
    kind: str = "BINARY",
    syntax: str = ExplicitVRLittleEndian,
    **options: object,
) -> Path:
    seg = Segmentation(
        source_images=images,
        pixel_array=masks,
        segmentation_type=kind,
        segment_descriptions=[describe(n, label) for n, label in enumerate(labels, start=1)],
        series_instance_uid=generate_uid(),
        series_number=9,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="x",
        manufacturer_model_name="x",
        software_versions="1",
        device_serial_number="1",
        transfer_syntax_uid=syntax,
        **options,
    )
    seg.save_as(path)
    return path


def refused(path: Path, series: list[CtSeries], match: str, segments: Sequence[str | int] = ()) -> None:
    with pytest.raises(DicomError, match=match):
        masks_of(path, series, segments)


def grid_of(axes: str, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> np.ndarray:
    """Affine (RAS) of voxels on the series of write_series, stored along e.g. "RAS" or "LPS" or "SPL" from corner to corner."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, letter in enumerate(axes):
        axis = next(n for n, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        sign = 1 if letter in "RAS" else -1
        affine[axis, column] = sign * spacing[axis]
        low = {0: -(shape[0] - 1) * spacing[0], 1: -(shape[1] - 1) * spacing[1], 2: 0.0}[axis]
        high = {0: 0.0, 1: 0.0, 2: (shape[2] - 1) * spacing[2]}[axis]
        affine[axis, 3] = low if sign > 0 else high
    return affine
