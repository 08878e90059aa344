from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from server.federation.server_step import server_step
from server.storage import run_folder as runs
from server.storage.checkpoint import CheckpointError, Moments, checkpoints, load_checkpoint, save_checkpoint
from shared.config import FederationSettings
from shared.host.log import start_log

ARRAYS = {"encoder.a": np.array([1.0, 2.0], np.float32), "encoder.b": np.array([[0.5]], np.float32)}


def steps(settings, moments: Moments, arrays: dict, targets: list[float], first: int = 1) -> tuple[dict, Moments]:
    """Server steps towards a mean that is everywhere `target`."""
    for number, target in enumerate(targets, start=first):
        average = {name: np.full_like(value, target) for name, value in arrays.items()}
        arrays, moments = server_step(settings, moments, number, arrays, average)
    return arrays, moments


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadam"])
def test_going_on_from_a_checkpoint_is_going_on(name: str, tmp_path: Path) -> None:
    settings = FederationSettings(strategy=name, server_learning_rate=0.3, server_momentum=0.8)
    undisturbed, _ = steps(settings, Moments(), ARRAYS, [3.0, -1.0, 2.0, 0.0])

    save_checkpoint(tmp_path, 2, *steps(settings, Moments(), ARRAYS, [3.0, -1.0]))
    saved = load_checkpoint(tmp_path)
    assert saved.round_number == 2
    resumed, _ = steps(settings, saved.moments, saved.arrays, [2.0, 0.0], first=3)
    for key, value in undisturbed.items():
        np.testing.assert_array_equal(resumed[key], value)


def saved_rounds(folder: Path, *numbers: int) -> list[Path]:
    """Checkpoints of rounds, each with its number in every value; newest first."""
    for number in numbers:
        arrays = {n: np.full_like(v, number) for n, v in ARRAYS.items()}
        save_checkpoint(folder, number, arrays, Moments(), ["b", "a"])
    return checkpoints(folder)


def test_the_last_two_rounds_are_kept(tmp_path: Path) -> None:
    saved_rounds(tmp_path, 0, 1, 2, 3)
    saved = load_checkpoint(tmp_path)
    assert (saved.round_number, saved.sites) == (3, ("a", "b"))
    np.testing.assert_array_equal(saved.arrays["encoder.a"], [3.0, 3.0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-00002.safetensors", "round-00003.safetensors"]


def flip(content: bytes) -> bytes:
    """One bit of the last tensor."""
    return content[:-1] + bytes([content[-1] ^ 1])


def cut(content: bytes) -> bytes:
    return content[:-3]


def emptied(content: bytes) -> bytes:
    return b""


def other_round(content: bytes) -> bytes:
    return content.replace(b'"round":"3"', b'"round":"9"')


@pytest.mark.parametrize("damage", [flip, cut, emptied, other_round])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage: Callable, tmp_path: Path) -> None:
    newest, before = saved_rounds(tmp_path, 2, 3)
    whole = newest.read_bytes()
    assert damage(whole) != whole
    newest.write_bytes(damage(whole))
    told: list[str] = []
    saved = load_checkpoint(tmp_path, told.append)
    assert saved.round_number == 2
    np.testing.assert_array_equal(saved.arrays["encoder.a"], [2.0, 2.0])
    assert "round-00003.safetensors is damaged" in told[0]
    before.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"round-00002\.safetensors is damaged"):
        load_checkpoint(tmp_path)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_the_checkpoint_before_stays_and_the_run_waits_for_room(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    start_log("hemafed.server")
    monkeypatch.setattr(runs, "DISK_PAUSE_S", 0.01)
    large = {"encoder.a": np.ones(8000, np.float32)}
    save_checkpoint(small_disk, 1, ARRAYS, Moments())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 * 1024))
    attempts = []

    def write() -> None:
        attempts.append(load_checkpoint(small_disk).round_number)
        if len(attempts) == 3:
            ballast.unlink()
        save_checkpoint(small_disk, 2, large, Moments())

    runs.write_patiently(small_disk, write)
    assert attempts == [1, 1, 1], "the state before was whole all the time"
    assert load_checkpoint(small_disk).round_number == 2
    assert "waiting for room on the disk" in capsys.readouterr().out
