from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.train import (
    LocalState,
    RoundReport,
    TrainError,
    build_optimiser,
    learning_rate,
    proximal_term,
    round_seed,
    train_round,
)
from shared.config import ModelSettings, RunConfig, parse_config
from shared.model import MultiTaskSwin
from shared.scoring import build_model
from shared.slices import SliceCache
from tests.conftest import SmallHospitals, small_config

SLICES = 12


@pytest.fixture(scope="module")
def cache(hospitals: SmallHospitals) -> SliceCache:
    """The first training slices of a hospital."""
    whole = hospitals.cache("hospital-01")
    rows = whole.rows("train")[:SLICES]
    assert len(rows) == SLICES
    return SliceCache(*(getattr(whole, key)[rows] for key in ("hu", "masks", "patient", "label", "has_mask", "split")))


def changed(**keys: object) -> RunConfig:
    return parse_config(small_config(**keys))


def fresh(config: RunConfig) -> tuple[MultiTaskSwin, torch.optim.AdamW]:
    model = build_model(config.model, config.run.seed)
    return model, build_optimiser(model, config)


def trained(
    cache: SliceCache, config: RunConfig, *, rounds: tuple[int, ...] = (1,), site: str = "a", mu: float = 0.0
) -> tuple[dict[str, Tensor], list[RoundReport]]:
    model, optimiser = fresh(config)
    reports = [
        train_round(model, optimiser, cache, config, site=site, round_number=number, proximal_mu=mu)
        for number in rounds
    ]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, reports


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


@pytest.fixture(scope="module")
def plain(cache: SliceCache, config: RunConfig) -> dict[str, Tensor]:
    return trained(cache, config)[0]


def test_same_seed_same_weights_bit_for_bit(cache: SliceCache, config: RunConfig) -> None:
    (one, reports), (two, again) = (trained(cache, config, rounds=(1, 2)) for _ in range(2))
    assert equal(one, two)
    assert [replace(r, seconds=0) for r in reports] == [replace(r, seconds=0) for r in again]
    assert [(r.steps, r.slices) for r in reports] == [(2, SLICES)] * 2  # 8 and 4 slices


@pytest.mark.parametrize("change", [{"site": "b"}, {"rounds": (2,)}])
def test_another_site_or_round_draws_other_slices(
    cache: SliceCache, config: RunConfig, plain: dict[str, Tensor], change: dict
) -> None:
    assert not equal(trained(cache, config, **change)[0], plain)


def test_another_seed_gives_other_weights_from_the_same_start(
    cache: SliceCache, config: RunConfig, plain: dict[str, Tensor]
) -> None:
    other = replace(config, run=replace(config.run, seed=5))
    model = build_model(config.model, 0)
    train_round(model, build_optimiser(model, other), cache, other, site="a", round_number=1)
    assert not equal(model.state_dict(), plain)


def test_the_callers_random_state_is_left_alone(cache: SliceCache, config: RunConfig) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    trained(cache, config)
    assert torch.equal(torch.rand(4), expected)


def test_round_seed_depends_on_all_of_its_parts() -> None:
    seeds = {round_seed(seed, site, number) for seed in (0, 1) for site in ("a", "b") for number in (1, 2)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**56 for seed in seeds)
    assert round_seed(0, "a", 1) == 0x699F66CEB18A8C  # first 7 bytes of SHA-256 of "0/a/1"


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        (0.0, 0.01),
        (0.05, 0.505),  # halfway up: 0.01 + 0.99 / 2
        (0.1, 1.0),
        (0.55, 0.505),  # halfway down the cosine
        (0.325, 0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2),  # a quarter down: cos 45 degrees
        (1.0, 0.01),
    ],
)
def test_learning_rate_warms_up_and_falls(progress: float, share: float) -> None:
    config = changed(train__learning_rate=2e-3, train__warmup=0.1)
    assert learning_rate(config, progress) == pytest.approx(2e-3 * share)


def test_learning_rate_without_warmup_starts_at_the_top() -> None:
    assert learning_rate(changed(train__learning_rate=1e-3, train__warmup=0.0), 0.0) == pytest.approx(1e-3)


def test_the_rate_falls_over_the_whole_federation_not_over_a_round(cache: SliceCache) -> None:
    config = changed(train__warmup=0.0, federation__rounds=4)
    model, optimiser = fresh(config)
    train_round(model, optimiser, cache, config, site="a", round_number=3)
    # Two steps a round, so the last one began at (3 - 1 + 1/2) / 4 of the federation.
    assert {group["lr"] for group in optimiser.param_groups} == {learning_rate(config, 2.5 / 4)}


def test_weight_decay_falls_on_matrices_alone(config: RunConfig) -> None:
    model, optimiser = fresh(config)
    decayed, others = optimiser.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    in_decayed = {names[id(p)] for p in decayed["params"]}
    in_others = {names[id(p)] for p in others["params"]}
    assert in_decayed | in_others == set(names.values())
    assert not in_decayed & in_others
    assert {"cls.weight", "encoder.patch_embed.proj.weight"} <= in_decayed
    assert {"cls.bias", "encoder.norm.weight", "seg.norm.bias"} <= in_others
    tables = {name for name in names.values() if name.endswith("relative_position_bias_table")}
    assert tables
    assert tables <= in_others


def test_fedprox_term_by_hand() -> None:
    model = nn.Linear(2, 1)
    anchor = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])}
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0]]))
        model.bias.copy_(torch.tensor([0.0]))
    term = proximal_term(model, anchor, 0.2)
    assert term.item() == pytest.approx(0.1 * (4 + 1 + 0.25))
    term.backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.4, -0.2]]))  # mu (w - anchor)
    assert proximal_term(model, {}, 0.2) == 0.0


def test_fedprox_with_mu_0_is_plain_training_and_holds_back_with_more(
    cache: SliceCache, config: RunConfig, plain: dict[str, Tensor]
) -> None:
    assert equal(trained(cache, config, mu=0.0)[0], plain)
    start = build_model(config.model, 0).state_dict()
    free = changed(train__clip_norm=0.0, train__epochs=3)
    drifts = [distance(trained(cache, free, mu=mu)[0], start) for mu in (0.0, 100.0)]
    assert 0 < drifts[1] < 0.9 * drifts[0]


def test_loss_falls(cache: SliceCache) -> None:
    config = changed(train__epochs=3, train__learning_rate=1e-3, federation__rounds=3, train__augment=False)
    _, reports = trained(cache, config, rounds=(1, 2, 3))
    assert all(r.slices == 3 * SLICES for r in reports)
    assert reports[-1].total < 0.85 * reports[0].total
    first = reports[0]
    assert first.total == pytest.approx(0.3 * first.cls + 0.4 * first.seg + 0.4 * first.rec, rel=1e-4)


def test_gradient_clipping_holds_a_step_back(cache: SliceCache) -> None:
    # AdamW divides by the gradient's size; only a gradient near its epsilon of 1e-8 moves the weights less.
    start = build_model(ModelSettings("demo"), 0).state_dict()
    moved = [
        distance(trained(cache, changed(train__clip_norm=norm, train__weight_decay=0.0))[0], start)
        for norm in (0.0, 1e-8)
    ]
    assert 0 < moved[1] < 0.1 * moved[0]


def test_augmentation_changes_what_is_seen(cache: SliceCache, plain: dict[str, Tensor]) -> None:
    assert not equal(trained(cache, changed(train__augment=False))[0], plain)


@pytest.mark.parametrize("poison", ["parameter", "learning rate"])
def test_a_loss_that_is_not_finite_names_site_round_and_step(cache: SliceCache, poison: str) -> None:
    config = changed(
        train__learning_rate=1e30 if poison == "learning rate" else 1e-3, train__warmup=0.0, train__epochs=3
    )
    model, optimiser = fresh(config)
    if poison == "parameter":
        with torch.no_grad():
            model.cls.bias.fill_(float("nan"))
    with pytest.raises(TrainError, match=r"site 'st-x': loss is (nan|inf) in round 1, step \d+") as caught:
        train_round(model, optimiser, cache, config, site="st-x", round_number=1)
    assert "train.learning_rate" in str(caught.value)
    if poison == "parameter":
        assert "step 0" in str(caught.value)


def test_no_training_slices_is_refused(cache: SliceCache, config: RunConfig) -> None:
    empty = replace(cache, split=np.full(SLICES, "test"))
    model, optimiser = fresh(config)
    with pytest.raises(TrainError, match=r"site 'x': no training slices"):
        train_round(model, optimiser, empty, config, site="x", round_number=1)


def test_only_the_training_split_is_used(
    hospitals: SmallHospitals, cache: SliceCache, config: RunConfig, plain: dict[str, Tensor]
) -> None:
    split = cache.split.copy()
    split[6:] = "val"
    part = replace(cache, split=split)
    model, optimiser = fresh(config)
    assert train_round(model, optimiser, part, config, site="a", round_number=1).slices == 6
    other = replace(part, hu=np.concatenate([part.hu[:6], np.zeros_like(part.hu[6:])]))
    again, optimiser = fresh(config)
    train_round(again, optimiser, other, config, site="a", round_number=1)
    assert equal(model.state_dict(), again.state_dict())


def test_progress_is_told_each_epoch(cache: SliceCache) -> None:
    lines: list[str] = []
    config = changed(train__epochs=2)
    model, optimiser = fresh(config)
    train_round(model, optimiser, cache, config, site="a", round_number=1, progress=lines.append)
    assert lines == ["site 'a' round 1: epoch 1 of 2", "site 'a' round 1: epoch 2 of 2"]


def test_training_goes_on_bit_for_bit_after_a_restart(cache: SliceCache, config: RunConfig, tmp_path: Path) -> None:
    straight, _ = trained(cache, config, rounds=(1, 2))
    model, optimiser = fresh(config)
    train_round(model, optimiser, cache, config, site="a", round_number=1)
    state = LocalState(tmp_path / "runs" / "r.1")
    state.save(model, optimiser, 1)
    encoder = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("encoder.")}

    again, optimiser_again = fresh(config)
    assert state.restore(again, optimiser_again) == 1
    again.load_state_dict(encoder, strict=False)  # which the server sends
    train_round(again, optimiser_again, cache, config, site="a", round_number=2)
    assert equal(again.state_dict(), straight)


def files(state: LocalState) -> list[Path]:
    return sorted(state.folder.iterdir())


def test_the_state_holds_heads_and_optimiser_but_no_encoder(config: RunConfig, tmp_path: Path) -> None:
    model, optimiser = fresh(config)
    state = LocalState(tmp_path / "r")
    state.save(model, optimiser, 7)
    (path,) = files(state)
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"heads", "optimiser"}
    assert {name.split(".")[0] for name in saved["heads"]} == {"cls", "seg", "rec"}
    assert state.restore(model, optimiser) == 7


def save_rounds(state: LocalState, config: RunConfig, *rounds: int) -> None:
    model, optimiser = fresh(config)
    for number in rounds:
        with torch.no_grad():
            model.cls.bias.fill_(number)
        state.save(model, optimiser, number)


def test_the_last_two_rounds_are_kept_and_no_partial_is_left(config: RunConfig, tmp_path: Path) -> None:
    state = LocalState(tmp_path / "runs" / "r")
    save_rounds(state, config, 1, 2, 3)
    assert len(files(state)) == 2
    assert not list(tmp_path.rglob("*.partial"))
    model, _ = fresh(config)
    assert [(state.restore(model, before=before), model.cls.bias.item()) for before in (None, 4, 3)] == [
        (3, 3.0),
        (3, 3.0),
        (2, 2.0),
    ]
    assert state.restore(model, before=2) == 0


def test_a_round_done_again_replaces_what_it_left(config: RunConfig, tmp_path: Path) -> None:
    state = LocalState(tmp_path / "r")
    save_rounds(state, config, 9, 10, 11, 10)
    model, _ = fresh(config)
    assert state.restore(model) == 10  # 11 began from a round that no longer counts
    assert len(files(state)) == 1


def test_a_crash_while_saving_leaves_the_last_round(config: RunConfig, tmp_path: Path) -> None:
    state = LocalState(tmp_path / "r")
    save_rounds(state, config, 1)
    (state.folder / "4711.partial").write_bytes(b"half")
    model, optimiser = fresh(config)
    assert state.restore(model, optimiser) == 1
    assert model.cls.bias.item() == 1


def test_without_a_file_the_model_keeps_its_heads(config: RunConfig, tmp_path: Path) -> None:
    model, optimiser = fresh(config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert LocalState(tmp_path / "none").restore(model, optimiser) == 0
    assert equal(model.state_dict(), before)


def test_another_variant_or_another_number_of_windows_is_refused(config: RunConfig, tmp_path: Path) -> None:
    model, optimiser = fresh(config)
    state = LocalState(tmp_path / "r")
    state.save(model, optimiser, 1)
    for settings in ({"model__variant": "default"}, {"model__windows_hu": "0:80,-20:180"}):
        with pytest.raises(TrainError, match="does not fit"):
            state.restore(*fresh(changed(**settings)))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _letter(path: Path) -> None:
    path.write_text("not a state")


def _without_heads(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"heads": {"cls.bias": saved["heads"]["cls.bias"]}}, path)


@pytest.mark.parametrize("damage", [_cut, _letter, _without_heads])
def test_a_damaged_state_is_refused(config: RunConfig, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model, optimiser = fresh(config)
    state = LocalState(tmp_path / "r")
    state.save(model, optimiser, 1)
    damage(files(state)[0])
    with pytest.raises(TrainError):
        state.restore(model, optimiser)
