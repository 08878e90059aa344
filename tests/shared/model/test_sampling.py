from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.model.sampling import make_sampler


def slices(bleeding: int, labelled: int, others: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and masks: some with blood and no label, some with a label and no blood, some with neither."""
    count = bleeding + labelled + others
    label, masks = np.full(count, np.nan, np.float32), np.zeros((count, 1, 4, 4), np.uint8)
    masks[:bleeding, 0, 1, 2] = 1
    label[bleeding : bleeding + labelled] = 0
    return label, masks


def epoch(sampling: str, seed: int = 0, batch: int = 4, **counts: int) -> list[int]:
    sampler = make_sampler(*slices(**counts), sampling)
    batches = list(sampler.epoch(batch, torch.Generator().manual_seed(seed)))
    assert len(batches) == sampler.steps(batch)
    numbers = [int(n) for chosen in batches for n in chosen]
    assert len(numbers) == len(set(numbers)) == sampler.size
    return sorted(numbers)


def test_all_takes_every_slice() -> None:
    assert epoch("all", bleeding=5, labelled=2, others=30) == list(range(37))


def test_telling_takes_those_with_blood_or_a_label() -> None:
    assert epoch("telling", bleeding=5, labelled=2, others=30) == list(range(7))


def test_balanced_takes_as_many_of_the_others_and_other_ones_in_each_epoch() -> None:
    first, second = (epoch("balanced", seed, bleeding=5, labelled=2, others=30) for seed in (0, 1))
    assert first[:7] == second[:7] == list(range(7))
    assert len(first) == len(second) == 14
    assert first != second
    assert first == epoch("balanced", 0, bleeding=5, labelled=2, others=30)


def test_in_the_long_run_every_other_slice_is_seen() -> None:
    seen = set().union(*(epoch("balanced", seed, bleeding=5, labelled=2, others=30) for seed in range(40)))
    assert seen == set(range(37))


def test_there_may_be_fewer_others_than_telling_slices() -> None:
    assert epoch("balanced", bleeding=8, labelled=2, others=3) == list(range(13))


@pytest.mark.parametrize("sampling", ["balanced", "telling"])
def test_without_anything_telling_every_slice_is_taken(sampling: str) -> None:
    assert epoch(sampling, bleeding=0, labelled=1, others=9) == list(range(10))
