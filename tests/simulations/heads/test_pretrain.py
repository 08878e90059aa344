from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.config import RunConfig
from shared.model.scoring import build_model
from shared.model.starting import load_starting, read_card, write_model
from simulations.heads import pool
from simulations.heads.pretrain import Heads, Recipe, load_heads, measure, pretrain, pretrain_model

CONFIG = RunConfig()
CONFIG = replace(
    CONFIG,
    model=replace(CONFIG.model, variant="demo", windows_hu="0:80,-40:200"),
    train=replace(CONFIG.train, batch=4, precision="fp32"),
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pool") / "one.npz"
    patients = [pool.draw_patient(np.random.default_rng(seed)) for seed in range(4)]
    content = {name: np.concatenate([one[name] for one in patients]) for name in patients[0]}
    np.savez(file, patient=np.repeat(np.arange(4), pool.SLICES), **content)
    return file


@pytest.fixture(scope="module")
def heads(shard: Path) -> Heads:
    return load_heads([shard], CONFIG)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]


def test_shards_become_inputs_of_the_models_size(heads: Heads) -> None:
    assert heads.inputs.hu.shape == (4 * pool.SLICES, 1, 128, 128)
    assert heads.kinds.shape == (4 * pool.SLICES, 9)


def test_a_stopped_training_ends_with_the_undisturbed_weights(heads: Heads, tmp_path: Path) -> None:
    device = torch.device("cpu")
    pretrain(tmp_path / "whole", heads, heads, Recipe(6, 2, CONFIG), device)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "cut", heads, heads, Recipe(6, 2, CONFIG), device, stop)
    pretrain(tmp_path / "cut", heads, heads, Recipe(6, 2, CONFIG), device)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    curve = [json.loads(line) for line in (tmp_path / "cut" / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [2, 4, 6]
    assert all(0 <= line[name] <= 1 for line in curve for name in ("dice", "clean", "marker"))


def test_it_learns(heads: Heads, tmp_path: Path) -> None:
    learner = pretrain(tmp_path, heads, heads, Recipe(60, 20, CONFIG), torch.device("cpu"))
    first, _, last = (json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines())
    assert last["rec"] < 0.7 * first["rec"]
    assert last["seg"] < first["seg"]
    found = measure(learner, heads, CONFIG, threshold=0.5)
    nothing = measure(learner, heads, CONFIG, threshold=1.0)
    assert nothing["clean"] == 1
    assert found["dice"] >= nothing["dice"]


def test_the_model_is_one_that_a_run_can_begin_with(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.heads.pretrain.draw_pool", lambda *_: [shard, shard])
    file = pretrain_model(tmp_path, 2, Recipe(2, 2, CONFIG), lambda line: None)
    model = build_model(CONFIG.model, 1)
    load_starting(model, file, CONFIG.model)
    stored = load_file(file)
    assert all(torch.equal(stored[name].float(), value) for name, value in model.state_dict().items())
    facts = read_card(file).facts
    assert facts["steps"] == "2"
    assert 0 <= float(facts["dice"]) <= 1
    assert "synthetic" in facts["data"]


def test_a_second_training_goes_on_from_a_model(heads: Heads, tmp_path: Path) -> None:
    model = build_model(CONFIG.model, 7)
    write_model(tmp_path / "first.safetensors", model, CONFIG.model, {})
    recipe = Recipe(1, 1, replace(CONFIG, train=replace(CONFIG.train, matrix_rate=1e-9, learning_rate=1e-9)))
    learner = pretrain(
        tmp_path / "second", heads, heads, replace(recipe, begin=tmp_path / "first.safetensors"), torch.device("cpu")
    )
    weight = "patch_embed.proj.weight"
    assert torch.allclose(learner.model.encoder.get_parameter(weight), model.encoder.get_parameter(weight), atol=1e-3)
