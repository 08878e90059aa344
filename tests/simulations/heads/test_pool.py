from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulations.heads import pool
from simulations.heads.pool import SLICES, draw_patient, draw_pool


@pytest.fixture(scope="module")
def drawn() -> list[dict[str, np.ndarray]]:
    return [draw_patient(np.random.default_rng(seed)) for seed in range(6)]


def test_slices_are_heads_on_the_caches_grid(drawn: list[dict[str, np.ndarray]]) -> None:
    for one in drawn:
        assert one["hu"].shape == one["mask"].shape == (SLICES, 224, 224)
        assert one["hu"].dtype == np.int16
        head = one["hu"][SLICES // 2]
        assert (head < -900).mean() > 0.2  # air around it
        assert (head > 600).mean() > 0.02  # bone
        assert ((head > 5) & (head < 60)).mean() > 0.15  # brain


def test_some_bleed_and_some_do_not(drawn: list[dict[str, np.ndarray]]) -> None:
    bleeds = [bool(one["mask"].any()) for one in drawn]
    assert 0 < sum(bleeds) < len(bleeds)
    for one in drawn:
        assert not one["kinds"][~one["mask"].any(axis=(1, 2))].any()


def test_a_seed_gives_the_same_bytes(drawn: list[dict[str, np.ndarray]]) -> None:
    again = draw_patient(np.random.default_rng(2))
    for name, values in drawn[2].items():
        np.testing.assert_array_equal(values, again[name])
    assert (drawn[1]["hu"] != again["hu"]).any()


def test_a_pool_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENTS", 1)
    pool._write_shard(7, tmp_path / f"{pool.DRAWING}-7-00000.npz", 0)
    told: list[tuple[int, int]] = []
    before = (tmp_path / f"{pool.DRAWING}-7-00000.npz").stat().st_mtime_ns
    files = draw_pool(tmp_path, 7, 1, 1, lambda *count: told.append(count))
    assert [file.stat().st_mtime_ns for file in files] == [before]
    assert told == []
    assert len(np.load(files[0])["patient"]) == SLICES
