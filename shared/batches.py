"""Slices of a cache as model input: windowed, resampled and augmented batches.

Shape suffixes: B batch, C channel, Y row, X column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shared.slices import SIDE_PX, SliceCache


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
