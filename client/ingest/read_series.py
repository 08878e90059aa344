"""One series to the slices of the cache: the work of one worker process.

In: a series, its mask files, what the hematoma's segment is. Out: a Part: HU and masks on the cache's grid, one row per
slice, and what could not be used. A slice that cannot be read is left out with its reason; a series whose values cannot
be HU is left out whole. Full-size pictures are held for a few slices at a time. Stays in the hospital.

Shape suffixes: N slice, Y row, X column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from client.dicom.faults import DicomError, Fault, Kind
from client.dicom.headers import CtSlice
from client.dicom.hounsfield import BINS, histogram, implausible, without_air
from client.dicom.pixels import AIR_HU, clamp_hu, read_hu
from client.dicom.pseudonyms import Pseudonyms
from client.dicom.series import CtSeries
from client.ingest.resample import head_centre, resample, touches_edge, upright_grid
from client.ingest.workers import restart_clock
from client.masks.drawn import Tally
from client.masks.match import MaskFile, SeriesMasks, read_masks
from shared.slices import PIXEL_MM, SIDE_PX

MOST_FOR_CENTRE = 32  # slices that the head's place is measured on, held at full size
OFF_HEAD_HU = -300.0  # a pixel below it lies in air, not in the head
OFF_HEAD_SHARE = 0.1  # of a mask's pixels in a series


@dataclass(frozen=True)
class SeriesJob:
    """Job of a worker: one series.

    Attributes:
      series, masks: the images and the mask files that belong to them.
      pseudonyms: the hospital's, to recognise images that masks refer to.
      segments: site.yaml's data.segment.
    """

    series: CtSeries
    masks: tuple[MaskFile, ...]
    pseudonyms: Pseudonyms
    segments: tuple[str | int, ...]


@dataclass(frozen=True)
class PartRow:
    """One slice of a part.

    Attributes:
      image: keyed hash of the image.
      z_mm: position along the normal.
      has_mask: whether somebody looked for the hematoma in it.
      flags: what is unusual: the series' flags, and "head-cut".
      content: hash of a coarse copy of the slice's HU, equal for equal pictures; "" for a slice of air alone.
    """

    image: str
    z_mm: float
    has_mask: bool
    flags: tuple[str, ...]
    content: str


@dataclass(frozen=True)
class CachedSeries:
    """One series, ready for the cache.

    Attributes:
      series, patient: keyed hashes.
      spacing_mm: distance of slices.
      rows: one per slice.
      faults: what of the series could not be used.
      hu: int16 (N, 224, 224).
      masks: uint8 (N, 224, 224).
      counts: int64 (BINS,), values of the series as read, see client/dicom/hounsfield.py.
      tallies: the account of each of its mask files; () where the series was left out.
      centre_mm: the patient's x and y in the middle of the pictures.
    """

    series: str
    patient: str
    spacing_mm: float
    rows: tuple[PartRow, ...]
    faults: tuple[Fault, ...]
    hu: NDArray[np.int16] = field(repr=False, compare=False)
    masks: NDArray[np.uint8] = field(repr=False, compare=False)
    counts: NDArray[np.int64] = field(repr=False, compare=False)
    tallies: tuple[Tally, ...] = ()
    centre_mm: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def empty(cls, series: str, patient: str, faults: tuple[Fault, ...]) -> CachedSeries:
        """A series of which nothing can be used, its masks neither."""
        nothing = (0, SIDE_PX, SIDE_PX)
        return cls(
            series,
            patient,
            0.0,
            (),
            faults,
            np.zeros(nothing, np.int16),
            np.zeros(nothing, np.uint8),
            np.zeros(BINS, np.int64),
        )


def read_part(job: SeriesJob) -> CachedSeries:
    """Read, check and resample one series; the parts of it that cannot be used are in the result's faults."""
    try:
        return _read_part(job)
    except Exception as error:  # one bad series never stops a hospital's ingest
        full = "too large for this machine's memory; use fewer processes (--workers 1), or export it in parts"
        damaged = "damaged: its images or masks cannot be read; export it again"
        what = Fault(f"series {job.series.name}", full if isinstance(error, MemoryError) else damaged)
        return CachedSeries.empty(job.series.name, job.series.slices[0].patient, (what,))


def _read_part(job: SeriesJob) -> CachedSeries:
    """read_part, for what is foreseen."""
    series = job.series
    found = read_masks(job.masks, series, job.pseudonyms, job.segments, restart_clock)
    faults = list(found.faults)
    held = _held(series, faults)
    measured = [(s, held[s.image]) for s in series.slices if held.get(s.image) is not None]
    centre_mm = head_centre(measured) if measured else (0.0, 0.0)
    del measured
    counts: dict[tuple[float, float], NDArray[np.int64]] = {}  # by rescale: one of several may be wrong
    hu, masks, rows, rescales = [], [], [], []
    inside = off = 0
    for one, hu_YX in _slices(series, held, centre_mm, faults):
        rescales.append((one.slope, one.intercept))
        counts[rescales[-1]] = counts.get(rescales[-1], 0) + histogram(hu_YX)
        slice_YX = np.rint(resample(clamp_hu(hu_YX), one, centre_mm, fill=AIR_HU)).astype(np.int16)
        mask_YX = found.masks.get(one.image)
        small_YX = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        if mask_YX is not None and mask_YX.any():
            small_YX = (resample(mask_YX, one, centre_mm, fill=0) > 0.5).astype(np.uint8)
            inside, off = inside + int(mask_YX.sum()), off + int((hu_YX[mask_YX > 0] < OFF_HEAD_HU).sum())
        flags = (*series.flags, "head-cut") if touches_edge(slice_YX) else series.flags
        rows.append(PartRow(one.image, round(one.height_mm, 2), mask_YX is not None, flags, _content(slice_YX)))
        hu.append(slice_YX)
        masks.append(small_YX)
    good = _plausible(job.series, rows, rescales, counts, faults)
    if off > OFF_HEAD_SHARE * inside:
        faults.append(
            Fault(
                f"series {series.name}",
                f"{off} of {inside} pixels of its mask lie in air; the mask may belong to another series",
                Kind.OFF_HEAD,
            )
        )
    shape = (len(good), SIDE_PX, SIDE_PX)
    rows = [rows[n] for n in good]
    return CachedSeries(
        series=series.name,
        patient=series.slices[0].patient,
        spacing_mm=series.spacing_mm,
        rows=tuple(rows),
        faults=tuple(faults),
        hu=np.array([hu[n] for n in good], np.int16).reshape(shape),
        masks=np.array([masks[n] for n in good], np.uint8).reshape(shape),
        counts=sum(counts.values(), np.zeros(BINS, np.int64)),
        tallies=_accounts(found, {row.image for row in rows}),
        centre_mm=centre_mm,
    )


def _plausible(
    series: CtSeries,
    rows: list[PartRow],
    rescales: list[tuple[float, float]],
    counts: dict[tuple[float, float], NDArray[np.int64]],
    faults: list[Fault],
) -> list[int]:
    """Numbers of the rows whose values can be HU: all of a series or none, but that rescales are looked at one by one."""
    reason = implausible(sum(counts.values(), np.zeros(BINS, np.int64))) if rows else None
    wrong = {rescale for rescale, one in counts.items() if len(counts) > 1 and without_air(one)}
    if reason and wrong and len(wrong) < len(counts):
        rest = [one for rescale, one in counts.items() if rescale not in wrong]
        reason = implausible(sum(rest, np.zeros(BINS, np.int64)))
    if reason:
        faults.append(Fault(f"series {series.name}", reason))
        return []
    names = {s.image: image_name(s) for s in series.slices}
    for row, (slope, intercept) in zip(rows, rescales, strict=True):
        if (slope, intercept) in wrong:
            reason = (
                f"no air near -1000 HU with its RescaleSlope {slope:g} and RescaleIntercept {intercept:g}, which are not those of all "
                "slices of its series; export the series again"
            )
            faults.append(Fault(names[row.image], reason, Kind.OUTLIER))
    return [n for n, rescale in enumerate(rescales) if rescale not in wrong]


def _accounts(found: SeriesMasks, used: set[str]) -> tuple[Tally, ...]:
    """The accounts of a series' mask files; a piece on a slice that is not used is left out with it."""
    tallies = []
    for tally in found.tallies:
        gone = sum(count for image, count in found.pieces.get(tally.file, {}).items() if image not in used)
        tallies.append(tally.left_out(gone, "on slices that could not be used"))
    return tuple(tallies)


def _content(slice_YX: NDArray[np.int16]) -> str:
    """Hash of a coarse copy of a slice; "" for a slice of air alone, which is nobody's."""
    coarse = np.ascontiguousarray(slice_YX[::4, ::4])
    return hashlib.blake2b(coarse, digest_size=8).hexdigest() if coarse.max() > OFF_HEAD_HU else ""


def _held(series: CtSeries, faults: list[Fault]) -> dict[str, NDArray[np.float32] | None]:
    """Slices that the head's place is measured on: all of a short series, some of a long one, evenly."""
    picked = np.unique(np.linspace(0, len(series.slices) - 1, MOST_FOR_CENTRE).astype(int))
    return {series.slices[i].image: _read(series.slices[i], faults) for i in picked}


def _slices(
    series: CtSeries,
    held: dict[str, NDArray[np.float32] | None],
    centre_mm: tuple[float, float],
    faults: list[Fault],
) -> Iterator[tuple[CtSlice, NDArray[np.float32]]]:
    """Every slice that can be used, in order; those that are held are not read again."""
    for one in series.slices:
        hu_YX = held.pop(one.image) if one.image in held else _read(one, faults)
        beside_mm = _beside_mm(one, centre_mm)
        if hu_YX is not None and beside_mm > SIDE_PX * PIXEL_MM / 2:
            reason = f"its picture lies {beside_mm:.4g} mm beside the head of its series; expected around it"
            faults.append(Fault(image_name(one), reason))
        elif hu_YX is not None:
            yield one, hu_YX


def _beside_mm(one: CtSlice, centre_mm: tuple[float, float]) -> float:
    """Return how far a place is outside a slice's picture, along the axis where it is farther; 0 or less inside."""
    grid = upright_grid(one)
    shape = one.shape[::-1] if grid.transposed else one.shape
    offset_mm = grid.offset_mm(centre_mm)
    return max(
        max(-offset, offset - n * spacing) for offset, n, spacing in zip(offset_mm, shape, grid.spacing_mm, strict=True)
    )


def _read(one: CtSlice, faults: list[Fault]) -> NDArray[np.float32] | None:
    """A slice's HU; None, and a fault, if it cannot be read."""
    restart_clock()
    try:
        return read_hu(one)
    except DicomError as error:
        faults.append(Fault(image_name(one), str(error)))
        return None


def middle_slice(series: CtSeries) -> NDArray[np.int16] | None:
    """A series' middle slice on the cache's grid, whatever its values, to be looked at; None if it cannot be read."""
    one = series.slices[len(series.slices) // 2]
    try:
        hu_YX = clamp_hu(read_hu(one))
    except DicomError:
        return None
    return np.rint(resample(hu_YX, one, head_centre([(one, hu_YX)]), fill=AIR_HU)).astype(np.int16)


def image_name(one: CtSlice) -> str:
    """Return the name of an image in messages."""
    return f"file {one.file} frame {one.frame + 1}" if one.frames > 1 else f"file {one.file}"


def can_read(image: CtSlice) -> bool:
    """Whether one image can be read; for finding the one that ends its process."""
    try:
        read_hu(image)
    except DicomError:
        return False
    return True
