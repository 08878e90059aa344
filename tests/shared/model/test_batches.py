from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from shared.model.batches import (
    Batch,
    augment_pose,
    augment_scanner,
    epoch_batches,
    make_batch,
    make_inputs,
    read_batch,
)
from shared.slices import SliceCache

BRAIN = ((0.0, 80.0),)


def made_cache(hu: np.ndarray, masks: np.ndarray | None = None, label: list[float] | None = None) -> SliceCache:
    n = len(hu)
    return SliceCache(
        hu=hu.astype(np.int16),
        masks=np.zeros(hu.shape, np.uint8) if masks is None else masks.astype(np.uint8),
        patient=np.array([f"p{i}" for i in range(n)]),
        label=np.array(label or [0.0] * n, np.float32),
        has_mask=np.ones(n, bool),
        split=np.array(["train"] * n),
    )


def bright_square(copies: int, top: int, left: int, side: int) -> SliceCache:
    """The same slice several times: 1000 HU in a square that is also the mask, 0 HU elsewhere."""
    masks = np.zeros((copies, 224, 224), np.uint8)
    masks[:, top : top + side, left : left + side] = 1
    return made_cache(masks * np.int16(1000), masks, [float(i % 2) for i in range(copies)])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(
    cache: SliceCache,
    rows: np.ndarray,
    windows: tuple[tuple[float, float], ...],
    side: int,
    generator: torch.Generator,
    how: str = "scanner",
) -> Batch:
    return make_batch(make_inputs(cache, rows, windows, side), np.arange(len(rows)), how, generator)


def test_windows_by_hand() -> None:
    hu = np.zeros((2, 224, 224))
    hu[1, 0, :5] = [-100, 0, 40, 80, 200]
    batch = read_batch(made_cache(hu, hu > 50), np.array([1]), ((0.0, 80.0), (-20.0, 180.0)), 224)
    assert batch.image.shape == (1, 2, 224, 224)
    torch.testing.assert_close(batch.image[0, 0, 0, :5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(batch.image[0, 1, 0, :5], torch.tensor([0.0, 0.1, 0.3, 0.5, 1.0]))
    assert batch.mask[0, 0, :5].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert batch.mask.sum() == 2


def test_a_batch_holds_the_rows_it_was_asked_for() -> None:
    hu = np.arange(4)[:, None, None] * np.full((4, 224, 224), 10)
    cache = made_cache(hu, label=[1.0, 0.0, float("nan"), 1.0])
    batch = read_batch(cache, np.array([2, 3]), BRAIN, 224)
    assert batch.image.mean((1, 2, 3)).tolist() == pytest.approx([0.25, 0.375])
    assert torch.isnan(batch.label[0])
    assert batch.label[1] == 1


@pytest.mark.parametrize("side", [96, 112, 224])
def test_resampling_keeps_the_range(side: int) -> None:
    hu = np.random.default_rng(0).integers(-1000, 3000, (2, 224, 224))
    batch = read_batch(made_cache(hu, hu > 40), np.array([0, 1]), ((0.0, 80.0), (-20.0, 180.0)), side)
    assert batch.image.shape == (2, 2, side, side)
    assert batch.image.min() >= 0
    assert batch.image.max() <= 1
    assert set(batch.mask.unique().tolist()) <= {0.0, 1.0}
    even = read_batch(made_cache(np.full((1, 224, 224), 20)), np.array([0]), BRAIN, side)
    torch.testing.assert_close(even.image, torch.full((1, 1, side, side), 0.25))


def test_air_does_not_hide_the_brain_beside_it() -> None:
    hu = np.full((1, 224, 224), -1000)
    hu[:, :, 112:] = 40
    row = read_batch(made_cache(hu), np.array([0]), BRAIN, 112).image[0, 0, 50]
    # Pixel 56 weighs columns 111 to 114 with 1, 3, 3, 1 eighths; air is clipped to -40: (-40 + 7 x 40) / 8 = 30 HU.
    assert row[54:59].tolist() == pytest.approx([0.0, 0.0, 0.375, 0.5, 0.5], abs=1e-5)


def test_half_the_mask_survives_half_the_resolution() -> None:
    masks = np.zeros((1, 224, 224))
    masks[:, 60:100, 80:120] = 1
    mask = read_batch(made_cache(np.zeros((1, 224, 224)), masks), np.array([0]), BRAIN, 112).mask
    assert mask[0, 30:50, 40:60].all()
    assert mask.sum() == 400


def test_without_a_generator_nothing_is_augmented() -> None:
    cache = bright_square(2, 60, 60, 40)
    batch = read_batch(cache, np.array([0, 1]), ((0.0, 1000.0),), 224)
    assert torch.equal(batch.image[:, 0], torch.from_numpy(cache.masks).float())
    assert torch.equal(batch.mask, torch.from_numpy(cache.masks).float())


@pytest.mark.parametrize("side", [96, 224])
def test_the_mask_moves_with_the_image(side: int) -> None:
    cache = bright_square(16, 70, 50, 60)
    rows = np.arange(16)
    still = read_batch(cache, rows, ((0.0, 1000.0),), side).mask
    batch = augmented(cache, rows, ((0.0, 1000.0),), side, seeded(0))
    bright = batch.image[:, 0] > 0.5
    mask = batch.mask > 0
    union = (bright | mask).sum((1, 2))
    assert ((bright & mask).sum((1, 2)) / union).min() > 0.9
    assert (batch.mask * still).sum((1, 2)).min() < 0.5 * still[0].sum()  # it did move
    assert batch.label.tolist() == [0.0, 1.0] * 8


def test_how_far_an_augmented_slice_may_go() -> None:
    batch = augmented(bright_square(64, 48, 48, 24), np.arange(64), ((0.0, 1000.0),), 224, seeded(1))
    mask = batch.mask
    area = mask.sum((1, 2))
    # Scale 0.9 to 1.1: between 576 / 1.1^2 and 576 / 0.9^2 pixels, and a few at the edges.
    assert area.min() > 450
    assert area.max() < 740
    assert area.max() - area.min() > 100
    place = torch.arange(224.0)
    y = (mask.sum(2) * place).sum(1) / area
    x = (mask.sum(1) * place).sum(1) / area
    assert y.max() < 112  # never upside down
    assert y.std() > 5
    assert 16 < (x < 112).sum() < 48  # flipped about every second time


def test_brightness_varies_from_slice_to_slice() -> None:
    batch = augmented(made_cache(np.full((64, 224, 224), 40)), np.arange(64), BRAIN, 224, seeded(2))
    hu = batch.image * 80
    means, spreads = hu.mean((1, 2, 3)), hu.std((1, 2, 3))
    # SD of the mean: calibration 5, gain 0.05 x 40, cupping up to 6 x 2/3 evenly: sqrt(25 + 4 + 5.3) = 5.9 HU.
    assert 4.2 < means.std() < 7.6
    assert abs(means.mean() - 40) < 3
    assert spreads.max() < 5.5  # noise up to 3, and cupping of up to 6 HU in the corners
    assert spreads.max() - spreads.min() > 2


def test_the_generator_decides_the_augmentation() -> None:
    cache, rows = bright_square(4, 60, 60, 40), np.arange(4)
    first = augmented(cache, rows, BRAIN, 96, seeded(7))
    again = augmented(cache, rows, BRAIN, 96, seeded(7))
    other = augmented(cache, rows, BRAIN, 96, seeded(8))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)
    assert not torch.equal(first.image[0], first.image[1])


@pytest.mark.parametrize(
    ("slices", "size", "lengths"), [(7, 3, [3, 2, 2]), (6, 3, [3, 3]), (9, 8, [5, 4]), (2, 16, [2]), (5, 2, [3, 2])]
)
def test_an_epoch_visits_each_row_once(slices: int, size: int, lengths: list[int]) -> None:
    batches = list(epoch_batches(slices, size, seeded(0)))
    assert [len(batch) for batch in batches] == lengths
    assert sorted(row for batch in batches for row in batch) == list(range(slices))


def test_epochs_differ_and_repeat() -> None:
    generator = seeded(0)
    first = [batch.tolist() for batch in epoch_batches(40, 8, generator)]
    second = [batch.tolist() for batch in epoch_batches(40, 8, generator)]
    again = [batch.tolist() for batch in epoch_batches(40, 8, seeded(0))]
    assert first == again
    assert first != second


@pytest.mark.parametrize("side", [96, 224])
def test_inputs_are_made_once_and_batches_chosen_from_them(side: int) -> None:
    hu = np.random.default_rng(1).integers(-100, 200, (6, 224, 224))
    cache = made_cache(hu, hu > 60, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    rows = np.array([5, 1, 4])
    inputs = make_inputs(cache, rows, BRAIN, side)
    assert len(inputs) == 3
    chosen, direct = make_batch(inputs, np.array([2, 0])), read_batch(cache, np.array([4, 5]), BRAIN, side)
    for part in ("image", "label", "mask", "has_mask"):
        assert torch.equal(getattr(chosen, part), getattr(direct, part))


def test_at_full_size_all_slices_stay_where_they_are() -> None:
    cache = bright_square(3, 60, 60, 40)
    inputs = make_inputs(cache, cache.rows(), BRAIN, 224)
    assert np.shares_memory(inputs.hu, cache.hu)
    assert np.shares_memory(inputs.mask, cache.masks)


def test_another_pose_leaves_an_even_picture_alone() -> None:
    even = torch.full((8, 1, 32, 32), 40.0)
    turned, mask = augment_pose(even, torch.ones_like(even), seeded(0))
    torch.testing.assert_close(turned, even)
    assert mask.shape == even.shape
    assert not torch.equal(augment_scanner(even, seeded(0)), even)


def test_pose_and_scanner_turn_alike() -> None:
    cache = bright_square(4, 70, 50, 60)
    pose, scanner = (
        augmented(cache, np.arange(4), ((0.0, 1000.0),), 96, seeded(3), how) for how in ("pose", "scanner")
    )
    assert torch.equal(pose.mask, scanner.mask)
    assert not torch.equal(pose.image, scanner.image)


def test_a_rescan_smooths_and_sharpens_an_edge() -> None:
    edge = torch.zeros(200, 1, 9, 16)
    edge[..., 8:] = 100.0
    step = (augment_scanner(edge, seeded(4))[:, 0, 4, 8] - augment_scanner(edge, seeded(4))[:, 0, 4, 7]) / 100
    # The 3 x 3 mean makes the step a third: from 1 - 0.5 x 2/3 to 1 + 0.5 x 2/3, times a gain near 1, and noise.
    assert step.min() < 0.75
    assert step.max() > 1.25
    assert 0.5 < step.min() < step.max() < 1.6


def test_at_full_size_the_hu_is_untouched() -> None:
    hu = np.random.default_rng(2).integers(-1000, 3000, (4, 224, 224))
    cache = made_cache(hu, hu > 60)
    inputs = make_inputs(cache, np.array([3, 1]), BRAIN, 224)
    assert inputs.hu.dtype == np.int16
    np.testing.assert_array_equal(inputs.hu[inputs.place, 0], hu[[3, 1]])
    np.testing.assert_array_equal(inputs.mask[inputs.place, 0], hu[[3, 1]] > 60)
    image = read_batch(cache, np.array([3, 1]), ((-1000.0, 3000.0),), 224).image[:, 0]
    torch.testing.assert_close(image, torch.from_numpy(hu[[3, 1]] + 1000).float() / 4000)


def test_a_smaller_size_is_clipped_then_averaged_with_antialiasing() -> None:
    hu = np.random.default_rng(3).integers(-1000, 3000, (70, 224, 224))  # more than are resampled at a time
    inputs = make_inputs(made_cache(hu, hu > 60), np.arange(70), ((0.0, 80.0), (-20.0, 180.0)), 96)

    def small(slices: np.ndarray) -> torch.Tensor:
        whole_BCYX = torch.from_numpy(slices.astype(np.float32))[:, None]
        return functional.interpolate(whole_BCYX, (96, 96), mode="bilinear", antialias=True)

    # 40 HU around both windows: -60 to 220.
    np.testing.assert_array_equal(inputs.hu, small(hu.clip(-60, 220)).numpy())
    np.testing.assert_array_equal(inputs.mask, (small(hu > 60) > 0.5).numpy())


def test_at_full_size_all_slices_of_a_file_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "slices.npy", np.full((3, 224, 224), 40, np.int16))
    cache = replace(bright_square(3, 60, 60, 40), hu=np.load(tmp_path / "slices.npy", mmap_mode="r"))
    inputs = make_inputs(cache, cache.rows(), BRAIN, 224)
    assert isinstance(inputs.hu, np.memmap)
    assert make_batch(inputs, np.array([2])).image.mean().item() == pytest.approx(0.5)


@pytest.mark.parametrize("side", [96, 224])
def test_all_slices_in_another_order_keep_their_labels(side: int) -> None:
    levels = np.array([0, 20, 40])
    cache = made_cache(levels[:, None, None] * np.ones((3, 224, 224)), label=[0.0, 20.0, 40.0])
    batch = read_batch(cache, np.array([2, 0, 1]), BRAIN, side)
    torch.testing.assert_close(batch.image.mean((1, 2, 3)) * 80, batch.label)


def test_how_far_another_scanner_may_differ() -> None:
    count = 1000
    # Of the same draws: a picture of 0 HU shows cupping, calibration and noise, one of 100 HU the gain besides.
    zero, hundred = (augment_scanner(torch.full((count, 1, 32, 32), v), seeded(5))[:, 0] for v in (0.0, 100.0))
    gain = ((hundred - zero) / 100).mean((1, 2))
    torch.testing.assert_close((hundred - zero) / 100, gain[:, None, None].expand(count, 32, 32), rtol=0, atol=1e-4)
    assert gain.mean().item() == pytest.approx(1, abs=0.006)
    assert gain.std().item() == pytest.approx(0.05, abs=0.004)

    y, x = torch.linspace(-1, 1, 32)[:, None], torch.linspace(-1, 1, 32)
    shapes = torch.stack([torch.ones(32, 32), y.square() + x.square()], dim=-1).flatten(0, 1)
    fitted = torch.linalg.lstsq(shapes, zero.flatten(1).T).solution
    offset, cupping = fitted[0], fitted[1] / gain
    assert offset.mean().item() == pytest.approx(0, abs=0.5)
    assert offset.std().item() == pytest.approx(5, abs=0.4)
    # Evenly from -6 to 6 HU; the fit is off by 3 / 32 / 0.4 = 0.23 HU (SD) where there is most noise.
    assert cupping.std().item() == pytest.approx(12 / 12**0.5, abs=0.25)
    assert cupping.abs().max() < 7
    noise = (zero.flatten(1).T - shapes @ fitted).std(0)
    assert noise.max() < 3.3
    assert noise.min() < 0.1
    assert noise.mean().item() == pytest.approx(1.5, abs=0.1)


def test_another_scanner_repeats_with_its_generator() -> None:
    picture = torch.full((4, 1, 16, 16), 40.0)
    first = augment_scanner(picture, seeded(6))
    assert torch.equal(first, augment_scanner(picture, seeded(6)))
    assert not torch.equal(first, augment_scanner(picture, seeded(7)))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(picture, torch.full((4, 1, 16, 16), 40.0))  # a new tensor came back


@pytest.mark.parametrize("how", ["pose", "scanner"])
def test_augmentation_sees_neither_label_nor_mask(how: str) -> None:
    with_lesion = bright_square(4, 60, 60, 40)
    without = replace(with_lesion, masks=np.zeros_like(with_lesion.masks), label=1 - with_lesion.label)
    one, other = (
        augmented(cache, np.arange(4), ((0.0, 1000.0),), 96, seeded(8), how) for cache in (with_lesion, without)
    )
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.label, 1 - other.label)


def test_pose_leaves_brightness_alone() -> None:
    cache = made_cache(np.full((8, 224, 224), 40))
    torch.testing.assert_close(
        augmented(cache, np.arange(8), BRAIN, 224, seeded(9), "pose").image, torch.full((8, 1, 224, 224), 0.5)
    )
