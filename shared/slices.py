"""The slice cache: what a hospital's ingest writes and everything else reads.

A cache folder holds `slices.npy` (N, 224, 224) int16 HU and `masks.npy` (N, 224, 224) uint8, both memory-
mapped, `index.csv` (one row per slice) and `cache.json` (format, settings, source manifest, counts). A slice
is 224 mm wide at 1 mm per pixel, centred on the head, so a lesion has the same size in pixels everywhere.
Windowing happens when a batch is made: a new window needs no new ingest.

Nothing here identifies a patient: patients and series are keyed hashes made by client/ingest.py.

Shape suffixes: N slice, B batch, C channel, Y row, X column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

FORMAT_VERSION = 1
SIDE_PX = 224
PIXEL_MM = 1.0
COLUMNS = ("patient", "series", "z_mm", "spacing_mm", "label", "has_mask", "split", "flags")
SPLITS = ("train", "val", "test")


class CacheError(ValueError):
    """A slice cache is missing, damaged or of another format; names the folder and the next step."""


@dataclass(frozen=True)
class SliceCache:
    """A hospital's slices.

    Attributes:
      hu: int16 (N, 224, 224), Hounsfield units, memory-mapped.
      masks: uint8 (N, 224, 224), 1 in the hematoma, memory-mapped.
      patient: str (N,), keyed hash.
      label: float32 (N,), 1 with hypodensity, 0 without, NaN unknown.
      has_mask: bool (N,), whether somebody looked for the hematoma in this slice.
      split: str (N,), train, val or test; one per patient.
    """

    hu: NDArray[np.int16]
    masks: NDArray[np.uint8]
    patient: NDArray[np.str_]
    label: NDArray[np.float32]
    has_mask: NDArray[np.bool_]
    split: NDArray[np.str_]

    def rows(self, *splits: str) -> NDArray[np.int64]:
        """Row numbers of the slices of these splits, in order of the index; all slices without an argument."""
        return np.nonzero(np.isin(self.split, splits or SPLITS))[0]

    def counts(self) -> dict[str, int]:
        """Patients, slices and positive slices."""
        return {
            "patients": len(np.unique(self.patient)),
            "slices": len(self.label),
            "positives": int(np.nansum(self.label)),
        }


@dataclass(frozen=True)
class Batch:
    """What the model and the losses see.

    Attributes:
      image: float32 (B, C, Y, X), windowed to [0, 1], one channel per window.
      label: float32 (B,), 1, 0 or NaN for unknown.
      mask: float32 (B, Y, X), 1 in the hematoma.
      has_mask: bool (B,).
    """

    image: Tensor
    label: Tensor
    mask: Tensor
    has_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(t.to(device) for t in (self.image, self.label, self.mask, self.has_mask)))


def read_cache(folder: Path) -> SliceCache:
    """Open a slice cache.

    Args:
      folder: as written by ingest.
    Raises:
      CacheError: a file is missing, of another format version, or the parts do not belong together.
    """
    again = "run 'hemafed-client ingest SITE_YAML' to write it"
    if not (folder / "cache.json").is_file():
        raise CacheError(f"no slice cache in {folder}; {again}")
    try:
        head = json.loads((folder / "cache.json").read_text())
        if head["format"] != FORMAT_VERSION:
            raise CacheError(f"slice cache {folder} has format {head['format']!r}, expected {FORMAT_VERSION}; {again}")
        hu = np.load(folder / "slices.npy", mmap_mode="r")
        masks = np.load(folder / "masks.npy", mmap_mode="r")
        with open(folder / "index.csv", newline="") as file:
            index = list(csv.DictReader(file))
    except CacheError:
        raise
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CacheError(f"slice cache {folder} is damaged ({type(error).__name__}); {again}") from error
    expected = (len(index), SIDE_PX, SIDE_PX)
    if hu.shape != expected or masks.shape != expected or head["slices"] != len(index):
        raise CacheError(
            f"slice cache {folder}: slices {hu.shape}, masks {masks.shape}, index {len(index)} rows, "
            f"cache.json {head['slices']}; expected {expected} for all; {again}"
        )
    splits = {row["split"] for row in index}
    if not splits <= set(SPLITS):
        raise CacheError(f"slice cache {folder}: splits {sorted(splits)}, expected {', '.join(SPLITS)}; {again}")
    return SliceCache(
        hu=hu,
        masks=masks,
        patient=np.array([row["patient"] for row in index], dtype=np.str_),
        label=np.array([float(row["label"] or "nan") for row in index], dtype=np.float32),
        has_mask=np.array([row["has_mask"] == "1" for row in index], dtype=np.bool_),
        split=np.array([row["split"] for row in index], dtype=np.str_),
    )


def make_batch(
    cache: SliceCache,
    rows: NDArray[np.int64],
    windows_hu: tuple[tuple[float, float], ...],
    image_size: int,
    generator: torch.Generator | None = None,
) -> Batch:
    """Slices of a cache as model input.

    Args:
      cache: where from.
      rows: row numbers (B,).
      windows_hu: (low, high) per channel.
      image_size: side of the model's input in pixels; a smaller one than 224 is resampled with antialiasing.
      generator: draws the augmentation; None leaves slices as they are.
    """
    hu_BCYX = torch.from_numpy(cache.hu[rows].astype(np.float32))[:, None]
    mask_BCYX = torch.from_numpy(cache.masks[rows].astype(np.float32))[:, None]
    if image_size != SIDE_PX:
        size = (image_size, image_size)
        # Air and bone are clipped first: averaged in, they would hide what lies beside them.
        hu_BCYX = hu_BCYX.clamp(min(low for low, _ in windows_hu) - 40, max(high for _, high in windows_hu) + 40)
        hu_BCYX = functional.interpolate(hu_BCYX, size, mode="bilinear", antialias=True)
        mask_BCYX = functional.interpolate(mask_BCYX, size, mode="bilinear", antialias=True)
    if generator is not None:
        hu_BCYX, mask_BCYX = augment(hu_BCYX, mask_BCYX, generator)
    image = torch.cat([((hu_BCYX - low) / (high - low)).clamp(0, 1) for low, high in windows_hu], dim=1)
    return Batch(
        image=image,
        label=torch.from_numpy(cache.label[rows]),
        mask=(mask_BCYX[:, 0] > 0.5).float(),
        has_mask=torch.from_numpy(cache.has_mask[rows]),
    )


def augment(hu_BCYX: Tensor, mask_BCYX: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What may differ between scanners and poses without changing the label.

    Left-right flip, rotation up to 20 degrees, scale 0.9 to 1.1, shift up to 6 % of the side; then a calibration
    error (SD 3 HU), gain (SD 5 %) and noise (up to 3 HU), each drawn per slice.

    Args:
      hu_BCYX: float32 HU.
      mask_BCYX: float32, same shape; moves with the image.
    Returns:
      New tensors of the same shapes.
    """
    B = len(hu_BCYX)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(B, generator=generator) * (high - low) + low

    angle, scale = draw(-20, 20).deg2rad(), draw(0.9, 1.1)
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    rows_x = torch.stack([flip * scale * angle.cos(), -scale * angle.sin(), draw(-0.12, 0.12)], dim=1)
    rows_y = torch.stack([flip * scale * angle.sin(), scale * angle.cos(), draw(-0.12, 0.12)], dim=1)
    grid = functional.affine_grid(torch.stack([rows_x, rows_y], dim=1), list(hu_BCYX.shape), align_corners=False)
    hu_BCYX = functional.grid_sample(hu_BCYX, grid, padding_mode="border", align_corners=False)
    mask_BCYX = functional.grid_sample(mask_BCYX, grid, align_corners=False)

    def per_slice(values: Tensor) -> Tensor:
        return values[:, None, None, None]

    gain = 1 + 0.05 * torch.randn(B, generator=generator)
    offset = 3 * torch.randn(B, generator=generator)
    noise = torch.randn(hu_BCYX.shape, generator=generator) * per_slice(draw(0, 3))
    return hu_BCYX * per_slice(gain) + per_slice(offset) + noise, mask_BCYX


def epoch_batches(rows: NDArray[np.int64], size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """The rows in random order, in batches of at most `size`; each row exactly once."""
    order = torch.randperm(len(rows), generator=generator).numpy()
    for start in range(0, len(rows), size):
        yield rows[np.sort(order[start : start + size])]
