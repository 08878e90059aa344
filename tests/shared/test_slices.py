from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.batches import epoch_batches, make_batch
from shared.slices import COLUMNS, CacheError, SliceCache, read_cache

BRAIN = ((0.0, 80.0),)


def write_cache(folder: Path, slices: int = 3, **changes: int) -> Path:
    """A cache on disk; changes set the length of one part or the format."""
    folder.mkdir()
    lengths = {"hu": slices, "masks": slices, "index": slices, "head": slices, "format": 1} | changes
    np.save(folder / "slices.npy", np.full((lengths["hu"], 224, 224), 40, dtype=np.int16))
    np.save(folder / "masks.npy", np.ones((lengths["masks"], 224, 224), dtype=np.uint8))
    labels, masked, splits = ("1", "0", "") * 2, ("1", "0", "1") * 2, ("train", "val", "test") * 2
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in range(lengths["index"]):
            values = (f"p{row}", f"s{row}", "0.0", "5.0", labels[row], masked[row], splits[row], "")
            writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    (folder / "cache.json").write_text(json.dumps({"format": lengths["format"], "slices": lengths["head"]}))
    return folder


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


def test_a_cache_is_read_as_written(tmp_path: Path) -> None:
    cache = read_cache(write_cache(tmp_path / "cache"))
    assert (cache.hu.shape, cache.hu.dtype, int(cache.hu[2, 5, 5])) == ((3, 224, 224), np.int16, 40)
    assert (cache.masks.dtype, int(cache.masks[0, 0, 0])) == (np.uint8, 1)
    assert isinstance(cache.hu, np.memmap)
    assert cache.patient.tolist() == ["p0", "p1", "p2"]
    assert cache.label[:2].tolist() == [1.0, 0.0]
    assert np.isnan(cache.label[2])
    assert cache.has_mask.tolist() == [True, False, True]


def test_rows_of_splits(tmp_path: Path) -> None:
    cache = read_cache(write_cache(tmp_path / "cache", slices=6))
    assert cache.rows("train").tolist() == [0, 3]
    assert cache.rows("val", "test").tolist() == [1, 2, 4, 5]
    assert cache.rows().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_missing_cache_names_folder_and_next_step(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="hemafed-client ingest") as caught:
        read_cache(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"hu": 2}, r"slices \(2, 224, 224\).*expected \(3, 224, 224\)"),
        ({"masks": 4}, r"masks \(4, 224, 224\)"),
        ({"index": 2}, "index 2 rows"),
        ({"head": 5}, "cache.json 5"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, changes: dict[str, int], text: str) -> None:
    folder = write_cache(tmp_path / "cache", **changes)
    with pytest.raises(CacheError, match=text) as caught:
        read_cache(folder)
    assert str(folder) in str(caught.value)
    assert "hemafed-client ingest" in str(caught.value)


@pytest.mark.parametrize("name", ["slices.npy", "masks.npy", "index.csv"])
def test_a_missing_part_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_cache(tmp_path / "cache")
    (folder / name).unlink()
    with pytest.raises(CacheError, match="hemafed-client ingest") as caught:
        read_cache(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["cache.json", "slices.npy", "masks.npy", "index.csv"])
def test_a_part_that_was_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_cache(tmp_path / "cache")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CacheError, match="hemafed-client ingest") as caught:
        read_cache(folder)
    assert str(folder) in str(caught.value)


def test_windows_by_hand() -> None:
    hu = np.zeros((2, 224, 224))
    hu[1, 0, :5] = [-100, 0, 40, 80, 200]
    batch = make_batch(made_cache(hu, hu > 50), np.array([1]), ((0.0, 80.0), (-20.0, 180.0)), 224)
    assert batch.image.shape == (1, 2, 224, 224)
    torch.testing.assert_close(batch.image[0, 0, 0, :5], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(batch.image[0, 1, 0, :5], torch.tensor([0.0, 0.1, 0.3, 0.5, 1.0]))
    assert batch.mask[0, 0, :5].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert batch.mask.sum() == 2


def test_a_batch_holds_the_rows_it_was_asked_for() -> None:
    hu = np.arange(4)[:, None, None] * np.full((4, 224, 224), 10)
    cache = made_cache(hu, label=[1.0, 0.0, float("nan"), 1.0])
    batch = make_batch(cache, np.array([2, 3]), BRAIN, 224)
    assert batch.image.mean((1, 2, 3)).tolist() == pytest.approx([0.25, 0.375])
    assert torch.isnan(batch.label[0])
    assert batch.label[1] == 1


@pytest.mark.parametrize("side", [96, 112, 224])
def test_resampling_keeps_the_range(side: int) -> None:
    hu = np.random.default_rng(0).integers(-1000, 3000, (2, 224, 224))
    batch = make_batch(made_cache(hu, hu > 40), np.array([0, 1]), ((0.0, 80.0), (-20.0, 180.0)), side)
    assert batch.image.shape == (2, 2, side, side)
    assert batch.image.min() >= 0
    assert batch.image.max() <= 1
    assert set(batch.mask.unique().tolist()) <= {0.0, 1.0}
    even = make_batch(made_cache(np.full((1, 224, 224), 20)), np.array([0]), BRAIN, side)
    torch.testing.assert_close(even.image, torch.full((1, 1, side, side), 0.25))


def test_air_does_not_hide_the_brain_beside_it() -> None:
    hu = np.full((1, 224, 224), -1000)
    hu[:, :, 112:] = 40
    row = make_batch(made_cache(hu), np.array([0]), BRAIN, 112).image[0, 0, 50]
    # Pixel 56 weighs columns 111 to 114 with 1, 3, 3, 1 eighths; air is clipped to -40: (-40 + 7 x 40) / 8 = 30 HU.
    assert row[54:59].tolist() == pytest.approx([0.0, 0.0, 0.375, 0.5, 0.5], abs=1e-5)


def test_half_the_mask_survives_half_the_resolution() -> None:
    masks = np.zeros((1, 224, 224))
    masks[:, 60:100, 80:120] = 1
    mask = make_batch(made_cache(np.zeros((1, 224, 224)), masks), np.array([0]), BRAIN, 112).mask
    assert mask[0, 30:50, 40:60].all()
    assert mask.sum() == 400


def test_without_a_generator_nothing_is_augmented() -> None:
    cache = bright_square(2, 60, 60, 40)
    batch = make_batch(cache, np.array([0, 1]), ((0.0, 1000.0),), 224)
    assert torch.equal(batch.image[:, 0], torch.from_numpy(cache.masks).float())
    assert torch.equal(batch.mask, torch.from_numpy(cache.masks).float())


@pytest.mark.parametrize("side", [96, 224])
def test_the_mask_moves_with_the_image(side: int) -> None:
    cache = bright_square(16, 70, 50, 60)
    rows = np.arange(16)
    still = make_batch(cache, rows, ((0.0, 1000.0),), side).mask
    batch = make_batch(cache, rows, ((0.0, 1000.0),), side, seeded(0))
    bright = batch.image[:, 0] > 0.5
    mask = batch.mask > 0
    union = (bright | mask).sum((1, 2))
    assert ((bright & mask).sum((1, 2)) / union).min() > 0.9
    assert (batch.mask * still).sum((1, 2)).min() < 0.5 * still[0].sum()  # it did move
    assert batch.label.tolist() == [0.0, 1.0] * 8


def test_how_far_an_augmented_slice_may_go() -> None:
    batch = make_batch(bright_square(64, 48, 48, 24), np.arange(64), ((0.0, 1000.0),), 224, seeded(1))
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
    batch = make_batch(made_cache(np.full((64, 224, 224), 40)), np.arange(64), BRAIN, 224, seeded(2))
    hu = batch.image * 80
    means, spreads = hu.mean((1, 2, 3)), hu.std((1, 2, 3))
    # SD of the mean: sqrt(3^2 + (0.05 x 40)^2) = 3.6 HU; noise up to 3 HU.
    assert 2.5 < means.std() < 4.7
    assert abs(means.mean() - 40) < 2
    assert spreads.max() < 3.1
    assert spreads.max() - spreads.min() > 2


def test_the_generator_decides_the_augmentation() -> None:
    cache, rows = bright_square(4, 60, 60, 40), np.arange(4)
    first = make_batch(cache, rows, BRAIN, 96, seeded(7))
    again = make_batch(cache, rows, BRAIN, 96, seeded(7))
    other = make_batch(cache, rows, BRAIN, 96, seeded(8))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.image, other.image)
    assert not torch.equal(first.image[0], first.image[1])


@pytest.mark.parametrize(("slices", "size", "lengths"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 16, [2]), (0, 4, [])])
def test_an_epoch_visits_each_row_once(slices: int, size: int, lengths: list[int]) -> None:
    rows = np.arange(slices) * 10 + 3
    batches = list(epoch_batches(rows, size, seeded(0)))
    assert [len(batch) for batch in batches] == lengths
    assert sorted(row for batch in batches for row in batch) == rows.tolist()


def test_epochs_differ_and_repeat() -> None:
    rows, generator = np.arange(40), seeded(0)
    first = [batch.tolist() for batch in epoch_batches(rows, 8, generator)]
    second = [batch.tolist() for batch in epoch_batches(rows, 8, generator)]
    again = [batch.tolist() for batch in epoch_batches(rows, 8, seeded(0))]
    assert first == again
    assert first != second
