"""What stays in a hospital between rounds: heads, balance, optimisers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.training.local_state import LocalState
from client.training.round import TrainError
from shared.config import RunConfig
from shared.slices import SliceCache
from tests.support.training import changed, equal, fresh, train_one_round, trained


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "gradnorm"])
def test_training_goes_on_bit_for_bit_after_a_restart(cache: SliceCache, tmp_path: Path, weighting: str) -> None:
    config = changed(loss__weighting=weighting)
    straight, _ = trained(cache, config, rounds=(1, 2))
    learner = fresh(config)
    train_one_round(learner, cache, config)
    state = LocalState(tmp_path / "runs" / "r.1")
    state.save(learner, 1)
    encoder = {name: t.clone() for name, t in learner.model.state_dict().items() if name.startswith("encoder.")}

    again = fresh(config)
    assert state.restore(again) == 1
    assert again.balance.weights() == learner.balance.weights()
    assert (weighting == "fixed") == (again.balance.weights() == fresh(config).balance.weights())
    again.model.load_state_dict(encoder, strict=False)  # which the server sends
    train_one_round(again, cache, config, round_number=2)
    assert equal(again.model.state_dict(), straight)


def files(state: LocalState) -> list[Path]:
    return sorted(state.folder.iterdir())


def test_the_state_holds_heads_and_optimiser_but_no_encoder(config: RunConfig, tmp_path: Path) -> None:
    learner = fresh(config)
    state = LocalState(tmp_path / "r")
    state.save(learner, 7)
    (path,) = files(state)
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"heads", "balance", "optimisers"}
    assert {name.split(".")[0] for name in saved["heads"]} == {"cls", "seg", "rec"}
    assert state.restore(learner) == 7


def save_rounds(state: LocalState, config: RunConfig, *rounds: int) -> None:
    learner = fresh(config)
    for number in rounds:
        with torch.no_grad():
            learner.model.cls.bias.fill_(number)
        state.save(learner, number)


def test_the_last_three_rounds_are_kept_and_no_partial_is_left(config: RunConfig, tmp_path: Path) -> None:
    state = LocalState(tmp_path / "runs" / "r")
    save_rounds(state, config, 1, 2, 3, 4)
    assert len(files(state)) == 3
    assert not list(tmp_path.rglob("*.partial"))
    learner = fresh(config)
    assert [(state.restore(learner, before=before), learner.model.cls.bias.item()) for before in (None, 5, 4, 3)] == [
        (4, 4.0),
        (4, 4.0),
        (3, 3.0),
        (2, 2.0),
    ]
    assert state.restore(learner, before=2) == 0


def test_a_round_done_again_replaces_what_it_left(config: RunConfig, tmp_path: Path) -> None:
    state = LocalState(tmp_path / "r")
    save_rounds(state, config, 9, 10, 11, 10)
    assert state.restore(fresh(config)) == 10  # 11 began from a round that no longer counts
    assert [path.name for path in sorted(files(state))] == ["round-00009.pt", "round-00010.pt"]


def test_a_crash_while_saving_leaves_the_last_round(config: RunConfig, tmp_path: Path) -> None:
    state = LocalState(tmp_path / "r")
    save_rounds(state, config, 1)
    (state.folder / "4711.partial").write_bytes(b"half")
    learner = fresh(config)
    assert state.restore(learner) == 1
    assert learner.model.cls.bias.item() == 1


def test_without_a_file_the_model_keeps_its_heads(config: RunConfig, tmp_path: Path) -> None:
    learner = fresh(config)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    assert LocalState(tmp_path / "none").restore(learner) == 0
    assert equal(learner.model.state_dict(), before)


def test_a_state_of_another_model_optimiser_or_weighting_is_refused(config: RunConfig, tmp_path: Path) -> None:
    learner = fresh(config)
    state = LocalState(tmp_path / "r")
    state.save(learner, 1)
    for settings in (
        {"model__variant": "default"},
        {"model__windows_hu": "0:80,-20:180"},
        {"train__optimiser": "adamw"},
        {"loss__weighting": "gradnorm"},
    ):
        with pytest.raises(TrainError, match="does not fit"):
            state.restore(fresh(changed(**settings)))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _letter(path: Path) -> None:
    path.write_text("not a state")


def _without_heads(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"heads": {"cls.bias": saved["heads"]["cls.bias"]}}, path)


@pytest.mark.parametrize("damage", [_cut, _letter, _without_heads])
def test_a_damaged_state_is_refused(config: RunConfig, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    learner = fresh(config)
    state = LocalState(tmp_path / "r")
    state.save(learner, 1)
    damage(files(state)[0])
    with pytest.raises(TrainError):
        state.restore(learner)
