"""Slices of a cache as model input: windowed, resampled and augmented batches.

Shape suffixes: B batch, C channel, Y row, X column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shared.slices import SIDE_PX, SliceCache


@dataclass(frozen=True)
class Batch:
    """A batch as the model and the losses see it.

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


@dataclass(frozen=True)
class Inputs:
    """Slices of a cache at the model's input size, before windowing and augmentation; stays where the slices are.

    Attributes:
      hu: float32 (M, 1, Y, X), clipped to 40 HU around the windows; or the cache's own int16, memory-mapped, where no
        resampling is needed.
      mask: uint8 (M, 1, Y, X).
      place: int64 (N,), where in `hu` and `mask` each slice is.
      label: float32 (N,), 1, 0 or NaN for unknown.
      has_mask: bool (N,).
      windows_hu: (low, high) per channel.
    """

    hu: NDArray[np.float32] | NDArray[np.int16]
    mask: NDArray[np.uint8]
    place: NDArray[np.int64]
    label: NDArray[np.float32]
    has_mask: NDArray[np.bool_]
    windows_hu: tuple[tuple[float, float], ...]

    def __len__(self) -> int:
        return len(self.label)


_CHUNK = 64  # slices resampled at a time


def make_inputs(
    cache: SliceCache, rows: NDArray[np.int64], windows_hu: tuple[tuple[float, float], ...], image_size: int
) -> Inputs:
    """Bring slices to the model's input size, once, so that no epoch does it again.

    Args:
      cache: where from.
      rows: row numbers (N,).
      windows_hu: (low, high) per channel.
      image_size: side of the model's input in pixels; a smaller one than 224 is resampled with antialiasing and held
        in memory, 5 bytes a pixel.
    """
    label, has_mask = cache.label[rows], cache.has_mask[rows]
    if image_size == SIDE_PX:
        return Inputs(cache.hu[:, None], cache.masks[:, None], rows, label, has_mask, windows_hu)
    hu = np.empty((len(rows), 1, image_size, image_size), np.float32)
    mask = np.empty(hu.shape, np.uint8)
    # Air and bone are clipped first: averaged in, they would hide what lies beside them.
    low, high = min(low for low, _ in windows_hu) - 40, max(high for _, high in windows_hu) + 40
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        fine_BCYX = torch.from_numpy(cache.hu[rows[part]].astype(np.float32))[:, None].clamp(low, high)
        hu[part] = functional.interpolate(fine_BCYX, (image_size, image_size), mode="bilinear", antialias=True).numpy()
        fine_BCYX = torch.from_numpy(cache.masks[rows[part]].astype(np.float32))[:, None]
        share_BCYX = functional.interpolate(fine_BCYX, (image_size, image_size), mode="bilinear", antialias=True)
        mask[part] = (share_BCYX > 0.5).numpy()
    return Inputs(hu, mask, np.arange(len(rows)), label, has_mask, windows_hu)


def make_batch(
    inputs: Inputs, chosen: NDArray[np.int64], augmentation: str = "none", generator: torch.Generator | None = None
) -> Batch:
    """Slices as model input.

    Args:
      inputs: where from.
      chosen: numbers (B,) within `inputs`.
      augmentation: as train.augment in the run config.
      generator: draws the augmentation.
    """
    place = inputs.place[chosen]
    hu_BCYX = torch.from_numpy(inputs.hu[place].astype(np.float32, copy=False))
    mask_BCYX = torch.from_numpy(inputs.mask[place].astype(np.float32))
    if augmentation != "none":
        if generator is None:
            raise ValueError(f"train.augment = {augmentation!r} needs a generator to draw from")
        hu_BCYX, mask_BCYX = augment_pose(hu_BCYX, mask_BCYX, generator)
        if augmentation == "scanner":
            hu_BCYX = augment_scanner(hu_BCYX, generator)
    image = torch.cat([((hu_BCYX - low) / (high - low)).clamp(0, 1) for low, high in inputs.windows_hu], dim=1)
    return Batch(
        image=image,
        label=torch.from_numpy(inputs.label[chosen]),
        mask=(mask_BCYX[:, 0] > 0.5).float(),
        has_mask=torch.from_numpy(inputs.has_mask[chosen]),
    )


def read_batch(
    cache: SliceCache, rows: NDArray[np.int64], windows_hu: tuple[tuple[float, float], ...], image_size: int
) -> Batch:
    """Slices of a cache as model input, as they are; arguments as for make_inputs."""
    return make_batch(make_inputs(cache, rows, windows_hu, image_size), np.arange(len(rows)))


def augment_pose(hu_BCYX: Tensor, mask_BCYX: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Another pose: left-right flip, rotation up to 20 degrees, scale 0.9 to 1.1, shift up to 6 % of the side, per slice.

    Args:
      hu_BCYX: float32 HU.
      mask_BCYX: float32, same shape; moves with the image.
    Returns:
      New tensors of the same shapes.
    """
    draw = partial(_draw, len(hu_BCYX), generator)
    angle, scale = draw(-20, 20).deg2rad(), draw(0.9, 1.1)
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    rows_x = torch.stack([flip * scale * angle.cos(), -scale * angle.sin(), draw(-0.12, 0.12)], dim=1)
    rows_y = torch.stack([flip * scale * angle.sin(), scale * angle.cos(), draw(-0.12, 0.12)], dim=1)
    grid = functional.affine_grid(torch.stack([rows_x, rows_y], dim=1), list(hu_BCYX.shape), align_corners=False)
    hu_BCYX = functional.grid_sample(hu_BCYX, grid, padding_mode="border", align_corners=False)
    return hu_BCYX, functional.grid_sample(mask_BCYX, grid, align_corners=False)


def augment_scanner(hu_BCYX: Tensor, generator: torch.Generator) -> Tensor:
    """Another scanner: kernel, cupping, calibration, gain and noise, each drawn per slice; the label stays.

    The kernel blurs or sharpens (half a pixel's neighbourhood either way), cupping raises or lowers the
    middle of the picture's edges by up to 6 HU, calibration is off by 5 HU (SD), gain by 5 % (SD), noise has up to 3 HU (SD).

    Returns:
      A new tensor of the same shape.
    """
    B, _, Y, X = hu_BCYX.shape

    def draw(low: float, high: float) -> Tensor:
        return _draw(B, generator, low, high)[:, None, None, None]

    smooth_BCYX = functional.avg_pool2d(functional.pad(hu_BCYX, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    hu_BCYX = hu_BCYX + draw(-0.5, 0.5) * (smooth_BCYX - hu_BCYX)
    y, x = torch.linspace(-1, 1, Y)[:, None], torch.linspace(-1, 1, X)
    hu_BCYX = hu_BCYX + draw(-6, 6) * (y.square() + x.square())
    gain = 1 + 0.05 * torch.randn((B, 1, 1, 1), generator=generator)
    offset = 5 * torch.randn((B, 1, 1, 1), generator=generator)
    noise = torch.randn(hu_BCYX.shape, generator=generator) * draw(0, 3)
    return hu_BCYX * gain + offset + noise


def _draw(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Uniform numbers (count,)."""
    return torch.rand(count, generator=generator) * (high - low) + low


def batches_in(count: int, size: int) -> int:
    """Batches of an epoch: none of one slice, which has no spread that the classification head could normalise by."""
    return min(-(-count // size), max(count // 2, 1))


def epoch_batches(count: int, size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """The numbers below `count` in random order, each exactly once, in even batches of at most `size`; of 3 where `size`
    is 2 and `count` odd."""
    order = torch.randperm(count, generator=generator).numpy()
    for batch in np.array_split(order, batches_in(count, size)):
        yield np.sort(batch)
