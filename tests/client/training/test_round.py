from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.training.round import (
    Learner,
    TrainError,
    proximal_term,
    rate_share,
    round_seed,
    train_step,
    training_inputs,
)
from shared.config import ModelSettings, RunConfig
from shared.model.batches import make_batch
from shared.model.scoring import build_model
from shared.slices import SliceCache
from tests.conftest import SmallHospitals
from tests.support.training import SLICES, changed, equal, fresh, train_one_round, trained


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Between parameters; running statistics are not stepped."""
    names = [name for name in one if ".running_" not in name]
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in names))


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
    learner = fresh(other)
    learner.model.load_state_dict(build_model(config.model, 0).state_dict())
    train_one_round(learner, cache, other)
    assert not equal(learner.model.state_dict(), plain)


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
    assert rate_share(changed(train__warmup=0.1), progress) == pytest.approx(share)


def test_learning_rate_without_warmup_starts_at_the_top() -> None:
    assert rate_share(changed(train__warmup=0.0), 0.0) == pytest.approx(1.0)


def test_the_rate_falls_over_the_whole_federation_not_over_a_round(cache: SliceCache) -> None:
    config = changed(train__warmup=0.0, federation__rounds=4, train__learning_rate=2e-3, train__matrix_rate=0.01)
    learner = fresh(config)
    train_one_round(learner, cache, config, round_number=3)
    # Two steps a round, so the last one began at (3 - 1 + 1/2) / 4 of the federation.
    rates = {group["lr"] for part in learner.optimisers.parts for group in part.param_groups}
    assert rates == {2e-3 * rate_share(config, 2.5 / 4), 0.01 * rate_share(config, 2.5 / 4)}


def names_by_group(learner: Learner) -> list[tuple[str, float, set[str]]]:
    """Optimiser, weight decay and parameters of each group."""
    names = {id(p): name for name, p in learner.model.named_parameters()}
    return [
        (type(part).__name__.removeprefix("Float32"), group["weight_decay"], {names[id(p)] for p in group["params"]})
        for part in learner.optimisers.parts
        for group in part.param_groups
    ]


def test_which_optimiser_steps_what_and_what_decays(config: RunConfig) -> None:
    learner = fresh(config)
    plain, others, matrices = names_by_group(learner)
    assert [group[:2] for group in (plain, others, matrices)] == [("AdamW", 0.05), ("AdamW", 0.0), ("Muon", 0.05)]
    every = {name for name, _ in learner.model.named_parameters()}
    assert plain[2] | others[2] | matrices[2] == every
    assert len(plain[2]) + len(others[2]) + len(matrices[2]) == len(every)
    edges = {"cls.weight", "encoder.patch_embed.proj.weight", "seg.output.weight", "rec.output.weight"}
    assert plain[2] == edges
    assert {"cls.bias", "encoder.norm.weight", "seg.norm.bias"} <= others[2]
    tables = {name for name in every if name.endswith("relative_position_bias_table")}
    assert tables
    assert tables <= others[2]
    assert {"encoder.layers.0.blocks.0.attn.qkv.weight", "seg.final.expand.weight"} <= matrices[2]


def test_adamw_alone_steps_all_matrices_too() -> None:
    (plain, others) = names_by_group(fresh(changed(train__optimiser="adamw")))
    assert (plain[0], plain[1], others[1]) == ("AdamW", 0.05, 0.0)
    assert "encoder.layers.0.blocks.0.attn.qkv.weight" in plain[2]


def test_a_rate_is_a_share_of_each_groups_highest() -> None:
    optimisers = fresh(changed(train__learning_rate=2e-3, train__matrix_rate=0.01)).optimisers
    for share in (0.5, 0.1, 1.0):
        optimisers.set_rate(share)
        rates = [group["lr"] for part in optimisers.parts for group in part.param_groups]
        assert rates == pytest.approx([2e-3 * share, 2e-3 * share, 0.01 * share])


def step_with_noise(learner: Learner, seed: int) -> None:
    """One step of the optimisers on a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    learner.optimisers.zero_grad()
    for parameter in learner.model.parameters():
        assert parameter.grad is None
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    learner.optimisers.step()


@pytest.mark.parametrize(("optimiser", "parts"), [("muon", 2), ("adamw", 1)])
def test_optimisers_go_on_from_their_state(optimiser: str, parts: int) -> None:
    config = changed(train__optimiser=optimiser)
    learner, again, forgetful = (fresh(config) for _ in range(3))
    assert len(learner.optimisers.parts) == parts
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    step_with_noise(learner, 1)
    assert not any(torch.equal(before[name], p) for name, p in learner.model.named_parameters())
    for other in (again, forgetful):
        other.model.load_state_dict(learner.model.state_dict())
    again.optimisers.load_state_dict(deepcopy(learner.optimisers.state_dict()))  # torch's own would be shared
    for one in (learner, again, forgetful):
        step_with_noise(one, 2)
    assert equal(again.model.state_dict(), learner.model.state_dict())
    assert not equal(forgetful.model.state_dict(), learner.model.state_dict())


def test_muon_moves_a_matrix_alike_in_all_directions() -> None:
    config = changed(train__weight_decay=0.0)
    learner = fresh(config)
    weight = learner.model.encoder.layers[0].blocks[0].attn.proj.weight
    before = weight.detach().clone()
    step_with_noise(learner, 3)
    moved = torch.linalg.svdvals((weight.detach() - before).double()) / config.train.matrix_rate
    assert (
        moved.min() > 0.5
    )  # Newton and Schulz end between 0.7 and 1.2, from singular values that differ a hundredfold
    assert moved.max() < 1.3


@pytest.mark.parametrize("weighting", ["uncertainty", "gradnorm"])
def test_a_task_of_weight_0_stays_out_whatever_is_learned(cache: SliceCache, weighting: str) -> None:
    config = changed(loss__rec=0.0, loss__weighting=weighting)
    learner = fresh(config)
    report = train_one_round(learner, cache, config)
    start = build_model(config.model, 0).state_dict()
    after = learner.model.state_dict()
    assert all(torch.equal(after[name], start[name]) for name in start if name.startswith("rec."))
    assert report.rec == 0
    weights = learner.balance.weights()
    assert weights["rec"] == 0
    assert (weights["cls"], weights["seg"]) != pytest.approx((0.3, 0.4), abs=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.1])
@pytest.mark.parametrize(("task", "decoder"), [("seg", "seg."), ("rec", "rec."), ("cls", "cls.")])
def test_a_task_of_weight_0_leaves_its_head_alone(cache: SliceCache, task: str, decoder: str, mu: float) -> None:
    config = changed(**{f"loss__{task}": 0.0})
    start = build_model(config.model, 0).state_dict()
    after, (report,) = trained(cache, config, mu=mu)
    for name, value in start.items():
        if name.startswith(decoder) and ".running_" not in name:  # which follow the encoder
            assert torch.equal(after[name], value)
    assert (getattr(report, task) == 0) == (task != "cls")  # the logit is still scored, and moves with the encoder
    other = "encoder.layers.0.blocks.0.attn.qkv.weight"
    assert not torch.equal(after[other], start[other])


def test_a_step_that_is_not_finite_is_not_taken(cache: SliceCache, config: RunConfig) -> None:
    learner = fresh(config)
    with torch.no_grad():
        learner.model.cls.bias.fill_(math.inf)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    batch = make_batch(training_inputs(cache, config, "a"), np.arange(4))
    _, total, _ = train_step(learner, batch, config)
    assert not torch.isfinite(total)
    assert equal(dict(learner.model.named_parameters()), before)


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
    config = changed(train__epochs=3, federation__rounds=3, train__augment="none")
    _, reports = trained(cache, config, rounds=(1, 2, 3))
    assert all(r.slices == 3 * SLICES for r in reports)
    assert reports[-1].total < 0.85 * reports[0].total
    first = reports[0]
    assert first.total == pytest.approx(0.3 * first.cls + 0.4 * first.seg + 0.4 * first.rec, rel=1e-4)


def test_gradient_clipping_holds_a_step_back(cache: SliceCache) -> None:
    # AdamW divides by the gradient's size; only a gradient near its epsilon of 1e-8 moves the weights less.
    start = build_model(ModelSettings("demo"), 0).state_dict()
    moved = [
        distance(
            trained(cache, changed(train__clip_norm=norm, train__weight_decay=0.0, train__optimiser="adamw"))[0], start
        )
        for norm in (0.0, 1e-8)
    ]
    assert 0 < moved[1] < 0.1 * moved[0]


@pytest.mark.parametrize("how", ["none", "pose"])
def test_augmentation_changes_what_is_seen(cache: SliceCache, plain: dict[str, Tensor], how: str) -> None:
    assert not equal(trained(cache, changed(train__augment=how))[0], plain)


@pytest.mark.parametrize("poison", ["parameter", "learning rate"])
def test_a_loss_that_is_not_finite_names_site_round_and_step(cache: SliceCache, poison: str) -> None:
    config = changed(
        train__learning_rate=1e9 if poison == "learning rate" else 1e-3, train__warmup=0.0, train__epochs=3
    )
    learner = fresh(config)
    if poison == "parameter":
        with torch.no_grad():
            learner.model.cls.bias.fill_(float("nan"))
    with pytest.raises(
        TrainError, match=r"site 'st-x': loss is (nan|inf) and the gradient's norm (nan|inf) in round 1, step \d+"
    ) as caught:
        train_one_round(learner, cache, config, site="st-x")
    assert "train.learning_rate" in str(caught.value)
    if poison == "parameter":
        assert "step 0" in str(caught.value)


def test_fewer_than_two_training_slices_are_refused(cache: SliceCache, config: RunConfig) -> None:
    empty = replace(cache, split=np.full(SLICES, "test"))
    with pytest.raises(TrainError, match=r"site 'x': fewer than two training slices"):
        training_inputs(empty, config, "x")


def test_only_the_training_split_is_used(
    hospitals: SmallHospitals, cache: SliceCache, config: RunConfig, plain: dict[str, Tensor]
) -> None:
    split = cache.split.copy()
    split[6:] = "val"
    part = replace(cache, split=split)
    learner, again = fresh(config), fresh(config)
    assert train_one_round(learner, part, config).slices == 6
    other = replace(part, hu=np.concatenate([part.hu[:6], np.zeros_like(part.hu[6:])]))
    train_one_round(again, other, config)
    assert equal(learner.model.state_dict(), again.model.state_dict())


def test_progress_is_told_each_epoch(cache: SliceCache) -> None:
    lines: list[str] = []
    config = changed(train__epochs=2)
    train_one_round(fresh(config), cache, config, progress=lines.append)
    assert lines == ["site 'a' round 1: step 2 of 4", "site 'a' round 1: step 4 of 4"]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_round_of_steps_takes_as_many_whatever_the_hospital_has(cache: SliceCache, steps: int) -> None:
    report = train_one_round(fresh(config := changed(train__steps=steps)), cache, config)
    assert report.steps == steps
    assert (report.slices > SLICES) == (steps == 5)


def test_a_round_of_as_many_steps_as_an_epoch_is_that_epoch(cache: SliceCache) -> None:
    epoch, steps = changed(train__epochs=1), changed(train__epochs=1, train__steps=2)
    assert equal(trained(cache, epoch)[0], trained(cache, steps)[0])
