"""Smooth random functions of place, and soft edges.

Shape suffixes: Y row, X column, C channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BOX_MM = ((-110.0, -150.0, -110.0), (110.0, 114.0, 130.0))  # of random fields, MNI152


@dataclass(frozen=True)
class Field:
    """A smooth random function of place.

    Attributes:
      values: float32 (1, C, Z, Y, X) on a coarse grid over the head, standard deviation about 1.
      every: of so many points in a row of a plane one is looked up; the others lie between.
    """

    values: Tensor
    every: int = 1

    def at(self, points: Tensor) -> Tensor:
        """Values at points (Y, X, 3) in MNI152 mm, Y and X multiples of 8; (C, Y, X)."""
        low, high = (torch.tensor(edge) for edge in _BOX_MM)
        some = points[self.every // 2 :: self.every, self.every // 2 :: self.every]
        grid = 2 * (some - low) / (high - low) - 1
        values = F.grid_sample(self.values, grid[None, None], padding_mode="border", align_corners=True)[0, :, 0]
        if self.every == 1:
            return values
        return F.interpolate(values[None], scale_factor=self.every, mode="bilinear", align_corners=False)[0]


def random_field(rng: np.random.Generator, length_mm: float, channels: int = 1) -> Field:
    """A field whose values change over about `length_mm`."""
    sizes = [high - low for low, high in zip(*_BOX_MM, strict=True)]
    cells = [max(int(size / length_mm) + 2, 3) for size in reversed(sizes)]
    coarse = torch.from_numpy(rng.standard_normal((1, channels, *cells), dtype=np.float32))
    fine = F.interpolate(coarse, size=tuple(2 * c for c in cells), mode="trilinear", align_corners=True)
    every = 8 if length_mm > 30 else 4 if length_mm > 10 else 2
    return Field(1.4 * fine, every)  # linear interpolation averages; about unit variance again


def soft(signed: Tensor, width: float = 0.5) -> Tensor:
    """1 where positive, 0 where negative, linear over an edge of twice the width."""
    return (0.5 + signed / (2 * width)).clamp(0, 1)


def bump(value: Tensor, width: float) -> Tensor:
    """1 at zero, falling to 0 over about the width on both sides."""
    return torch.exp(-((value / width) ** 2).clamp(max=20))  # denormal numbers are slow
