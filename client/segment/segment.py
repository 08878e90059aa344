"""A folder of head CT to masks of hematoma: the model's answer on every image's own pixels.

In: any folder with DICOM and a model file. Images are read as ingest reads them, each series of a study for itself; images of a
series that does not hold together are taken one by one. Out: per image the probability of every pixel, thresholded, small
spots left away. What cannot be read is named with its reason. Everything stays in the hospital.

Shape suffixes: N slice, C window, Y row, X column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from client.check.check import pseudonyms_of
from client.dicom.faults import Fault
from client.dicom.headers import CtSlice
from client.dicom.series import CtSeries, build_series
from client.ingest.read_series import CachedSeries, SeriesJob
from client.ingest.resample import restore
from client.ingest.scan import FileRecord, FoundFile, read_records, walk
from client.ingest.survey import read_parts
from client.ingest.workers import WorkerPool
from shared.config import ModelSettings
from shared.errors import HemafedError
from shared.model.batches import read_batch
from shared.model.scoring import best_device
from shared.model.swin import MultiTaskSwin, autocast
from shared.site import Site
from shared.slices import SIDE_PX, SliceCache

BATCH = 16
Progress = Callable[[str, int, int], None]


class SegmentError(HemafedError, ValueError):
    """A folder cannot be segmented; names what is wrong and the next step."""


@dataclass(frozen=True)
class Choices:
    """What counts as hematoma.

    Attributes:
      threshold: least probability of a pixel.
      least_mm2: smaller connected spots of a slice are left away.
    """

    threshold: float = 0.4
    least_mm2: float = 30.0


@dataclass(frozen=True)
class SegmentedImage:
    """One image and its mask.

    Attributes:
      image: which.
      z_mm: position along the normal.
      area_mm2: of the hematoma.
      mask: uint8 (Y, X), 1 in the hematoma, on the image's own pixels as stored.
      small_hu, small_mask: int16 and uint8 (224, 224), the same on the model's grid, to be looked at.
    """

    image: CtSlice
    z_mm: float
    area_mm2: float
    mask: NDArray[np.uint8] = field(repr=False)
    small_hu: NDArray[np.int16] = field(repr=False)
    small_mask: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class SegmentedSeries:
    """One series with the masks of its images.

    Attributes:
      name: keyed hash.
      spacing_mm: distance of slices; the slice's thickness where there is but one.
      images: in order, from the feet up.
      faults: what of it could not be used.
    """

    name: str
    spacing_mm: float
    images: tuple[SegmentedImage, ...]
    faults: tuple[Fault, ...]

    @property
    def volume_ml(self) -> float:
        """Volume of the hematoma."""
        return sum(one.area_mm2 for one in self.images) * self.spacing_mm / 1000


def segment_folder(
    folder: Path,
    model: MultiTaskSwin,
    settings: ModelSettings,
    choices: Choices,
    workers: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[SegmentedSeries | Fault]:
    """Segment every head CT image below a folder.

    Args:
      folder: with DICOM files, in any order and depth; nothing is written there.
      model, settings: encoder and segmentation decoder, and the windows it takes.
      choices: what counts as hematoma.
      workers: processes that read; by default one per core.
      progress: called with "headers" or "series", how many are done, and how many there are.
    Yields:
      Series as they are done, and a Fault for whatever was left out before.
    Raises:
      SegmentError: no such folder.
    """
    if not folder.is_dir():
        raise SegmentError(f"{folder} is no folder; name the one with the DICOM files")
    folder = folder.resolve()
    nowhere = folder / ".hemafed"
    site = Site("segment", "held-out", folder, None, None, nowhere, nowhere, accept_lossy=True)
    pseudonyms, _ = pseudonyms_of(site)
    device = best_device()
    model.to(device).eval()
    with WorkerPool(workers) as crew:
        files = walk(site, pseudonyms)
        pairs = read_records(
            site, pseudonyms, files, {}, crew, lambda *count: progress("headers", *count), nameless=True
        )
        yield from (_fault(file, record) for file, record in pairs if not record.images)
        series = _series([image for _, record in pairs for image in record.images])
        jobs = [SeriesJob(one, (), pseudonyms, ()) for one in series]
        for done, (job, part) in enumerate(zip(jobs, read_parts(jobs, crew), strict=True), start=1):
            yield _segment_series(job.series, part, model, settings, choices, device)
            progress("series", done, len(jobs))


def _fault(file: FoundFile, record: FileRecord) -> Fault:
    """Why a file holds nothing to segment."""
    return Fault(f"file {file.code}", record.fault or "a mask, expected a CT image", record.kind)


def _series(images: list[CtSlice]) -> list[CtSeries]:
    """Series of images; those that hold together with no others are a series of one each.

    An image is its file and frame here, whatever its header calls it: nothing that can be read is left out.
    """
    own = [replace(image, image=f"{image.file}.{image.frame}") for image in images]
    whole, _, _ = build_series(own)
    taken = {image.image for series in whole for image in series.slices}
    rest = [image for image in own if image.image not in taken]
    return [*whole, *(CtSeries(f"{image.series}.{number}", (image,)) for number, image in enumerate(rest, start=1))]


def _segment_series(
    series: CtSeries,
    part: CachedSeries,
    model: MultiTaskSwin,
    settings: ModelSettings,
    choices: Choices,
    device: torch.device,
) -> SegmentedSeries:
    """Masks of one series."""
    by_name = {image.image: image for image in series.slices}
    images = []
    for start in range(0, len(part.rows), BATCH):
        rows, hu_NYX = part.rows[start : start + BATCH], part.hu[start : start + BATCH]
        for row, hu_YX, probability_YX in zip(
            rows, hu_NYX, probabilities(model, settings, hu_NYX, device), strict=True
        ):
            image = by_name[row.image]
            own_YX = restore(probability_YX, image, part.centre_mm)
            pixel_mm2 = image.spacing_mm[0] * image.spacing_mm[1]
            mask_YX = without_spots(own_YX > choices.threshold, choices.least_mm2 / pixel_mm2)
            small_YX = without_spots(probability_YX > choices.threshold, choices.least_mm2)
            area_mm2 = float(mask_YX.sum()) * pixel_mm2
            images.append(SegmentedImage(image, row.z_mm, area_mm2, mask_YX, hu_YX, small_YX))
    spacing_mm = series.spacing_mm or series.slices[0].thickness_mm
    return SegmentedSeries(series.name, spacing_mm, tuple(images), part.faults)


@torch.no_grad()
def probabilities(
    model: MultiTaskSwin, settings: ModelSettings, hu_NYX: NDArray[np.int16], device: torch.device
) -> NDArray[np.float32]:
    """Probability of hematoma per pixel; the mean of each slice's and its mirror image's.

    Args:
      model, settings: what answers, and its windows.
      hu_NYX: int16 (N, 224, 224), on the cache's grid.
      device: where the model is.
    Returns:
      float32 (N, 224, 224).
    """
    count = len(hu_NYX)
    cache = SliceCache(
        hu=hu_NYX,
        masks=np.zeros((count, SIDE_PX, SIDE_PX), np.uint8),
        patient=np.full(count, ""),
        label=np.full(count, np.nan, np.float32),
        has_mask=np.zeros(count, np.bool_),
        split=np.full(count, "test"),
    )
    image = read_batch(cache, np.arange(count), settings.windows(), model.shape.image_size).image.to(device)
    total = torch.zeros(count, *image.shape[2:], device=device)
    for mirrored in (False, True):
        with autocast("fp32", device):
            logit = model.seg(model.encode(image.flip(-1) if mirrored else image))[:, 0].float()
        total += (logit.flip(-1) if mirrored else logit).sigmoid() / 2
    return functional.interpolate(total[:, None], size=(SIDE_PX, SIDE_PX), mode="bilinear")[:, 0].cpu().numpy()


def without_spots(mask_YX: NDArray[np.bool_], least_px: float) -> NDArray[np.uint8]:
    """A mask without its connected parts of fewer than so many pixels."""
    parts, count = ndimage.label(mask_YX, np.ones((3, 3)))
    if not count:
        return np.zeros(mask_YX.shape, np.uint8)
    large = np.bincount(parts.ravel()) >= least_px
    large[0] = False
    return large[parts].astype(np.uint8)
