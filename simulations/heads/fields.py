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
    """

    values: Tensor

    def at(self, points: Tensor) -> Tensor:
        """Values at points (Y, X, 3) in MNI152 mm; (C, Y, X)."""
        low, high = (torch.tensor(edge) for edge in _BOX_MM)
        grid = 2 * (points - low) / (high - low) - 1
        return F.grid_sample(self.values, grid[None, None], padding_mode="border", align_corners=True)[0, :, 0]


def random_field(rng: np.random.Generator, length_mm: float, channels: int = 1) -> Field:
    """A field whose values change over about `length_mm`."""
    sizes = [high - low for low, high in zip(*_BOX_MM, strict=True)]
    cells = [max(int(size / length_mm) + 2, 3) for size in reversed(sizes)]
    coarse = torch.from_numpy(rng.standard_normal((1, channels, *cells), dtype=np.float32))
    fine = F.interpolate(coarse, size=tuple(2 * c for c in cells), mode="trilinear", align_corners=True)
    return Field(1.4 * fine)  # linear interpolation averages; about unit variance again


def soft(signed: Tensor, width: float = 0.5) -> Tensor:
    """1 where positive, 0 where negative, linear over an edge of twice the width."""
    return (0.5 + signed / (2 * width)).clamp(0, 1)


def bump(value: Tensor, width: float) -> Tensor:
    """1 at zero, falling to 0 over about the width on both sides."""
    return torch.exp(-((value / width) ** 2))
