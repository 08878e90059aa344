"""Which slices an epoch trains on: in whole series most show no blood, and few the marker.

A slice counts as telling if somebody outlined blood in it, or labelled it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.model.batches import batches_in, epoch_batches

SAMPLINGS = ("balanced", "all", "telling")


@dataclass(frozen=True)
class Sampler:
    """An epoch's slices.

    Attributes:
      always: int64, numbers of the slices that every epoch has.
      others: int64, numbers of those that each epoch draws from anew.
      drawn: how many of these it takes.
    """

    always: NDArray[np.int64]
    others: NDArray[np.int64]
    drawn: int

    @property
    def size(self) -> int:
        """Slices of an epoch."""
        return len(self.always) + self.drawn

    def steps(self, batch: int) -> int:
        """Batches of an epoch."""
        return batches_in(self.size, batch)

    def epoch(self, batch: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
        """Numbers of the slices of each batch of an epoch, in random order, each slice at most once."""
        chosen = self.others[torch.randperm(len(self.others), generator=generator).numpy()[: self.drawn]]
        numbers = np.sort(np.concatenate([self.always, chosen]))
        for places in epoch_batches(len(numbers), batch, generator):
            yield numbers[places]

    def round(self, batch: int, epochs: int, steps: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
        """Batches of a round: of so many epochs, or epoch after epoch until so many steps are taken, where steps is not 0."""
        numbers = itertools.count() if steps else range(epochs)
        batches = (chosen for _ in numbers for chosen in self.epoch(batch, generator))
        return itertools.islice(batches, steps or None)

    def round_steps(self, batch: int, epochs: int, steps: int) -> int:
        """Batches of a round."""
        return steps or epochs * self.steps(batch)


def make_sampler(label: NDArray[np.float32], masks: NDArray[np.uint8], sampling: str) -> Sampler:
    """How slices are drawn for an epoch.

    Args:
      label: float (N,), 1, 0 or NaN; of the training slices.
      masks: uint8 (N, ..., Y, X), 1 in the hematoma.
      sampling: "all" takes every slice; "telling" those alone that show blood or have a label, as the paper does
        (arXiv:2505.06185); "balanced" these, and as many of the others.
    """
    every = np.arange(len(label))
    telling = np.array([mask.any() for mask in masks], np.bool_) | ~np.isnan(label)
    if sampling == "all" or telling.sum() < 2:
        return Sampler(every, every[:0], 0)
    others = every[~telling]
    drawn = min(len(others), int(telling.sum())) if sampling == "balanced" else 0
    return Sampler(every[telling], others, drawn)
