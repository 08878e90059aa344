from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.config import ModelSettings
from shared.model import starting
from shared.model.scoring import build_model
from shared.model.starting import (
    StartingModelError,
    load_starting,
    read_card,
    starting_file,
    write_model,
)
from shared.model.swin import MultiTaskSwin

SETTINGS = ModelSettings(variant="demo", windows_hu="0:80,-40:200")


@pytest.fixture(scope="module")
def model() -> MultiTaskSwin:
    return build_model(SETTINGS, 3)


@pytest.fixture
def file(model: MultiTaskSwin, tmp_path: Path) -> Path:
    path = tmp_path / "demo.safetensors"
    write_model(path, model, SETTINGS, {"data": "none"})
    return path


@pytest.fixture
def installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file as the starting model of its variant."""
    monkeypatch.setattr(starting, "_folders", lambda: iter([file.parent]))
    return file


def test_every_weight_comes_from_the_file_whatever_the_seed(installed: Path, model: MultiTaskSwin) -> None:
    begun = build_model(replace(SETTINGS, pretrained="synthetic"), 1)
    for name, value in begun.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].half().float()), name


def test_a_file_without_the_head_is_refused(file: Path, model: MultiTaskSwin) -> None:
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith("cls.")}
    save_file(tensors, file, metadata=read_card(file).facts)
    with pytest.raises(StartingModelError, match=r"lacks tensor cls\."):
        load_starting(model, file, SETTINGS)


def test_a_starting_model_is_known_to_every_site_and_a_file_of_weights_is_not() -> None:
    assert [ModelSettings(pretrained=text).brought for text in ("", "synthetic", "swin.safetensors")] == [
        False,
        False,
        True,
    ]


def test_other_windows_or_another_variant_are_refused(file: Path, model: MultiTaskSwin) -> None:
    for settings in (replace(SETTINGS, windows_hu="0:80,-40:201"), replace(SETTINGS, variant="demo-deep")):
        with pytest.raises(StartingModelError, match="set both as the file has them"):
            load_starting(model, file, settings)
    load_starting(model, file, replace(SETTINGS, windows_hu="0.0:80.0,-40:200"))


def test_a_variant_without_a_starting_model_names_those_with_one(installed: Path) -> None:
    with pytest.raises(StartingModelError, match=r"expected one of demo, or model\.pretrained = ''"):
        starting_file("tiny")


def test_it_is_found_where_hemafed_is_installed_when_the_code_runs_elsewhere(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower unpacks the code of a run without anything but Python."""
    source = tmp_path / "source" / "shared" / "model" / "starting"
    source.mkdir(parents=True)
    shutil.copy(file, source)

    class Installed:
        def locate_file(self, path: Path) -> Path:
            return tmp_path / "site-packages" / path

        def read_text(self, name: str) -> str:
            return json.dumps({"url": (tmp_path / "source").as_uri(), "dir_info": {"editable": True}})

    monkeypatch.setattr(starting, "__file__", str(tmp_path / "apps" / "starting.py"))
    monkeypatch.setattr(starting, "distribution", lambda name: Installed())
    assert starting_file("demo") == source / "demo.safetensors"


def damaged(file: Path, change: str, model: MultiTaskSwin) -> None:
    match change:
        case "cut":
            file.write_bytes(file.read_bytes()[:1000])
        case "no card":
            write_model(file, model, replace(SETTINGS, variant="mine"), {})
        case "not finite":
            bad = build_model(SETTINGS, 3)
            with torch.no_grad():
                bad.encoder.get_parameter("patch_embed.proj.bias")[0] = torch.inf
            write_model(file, bad, SETTINGS, {})
        case "another shape":
            write_model(file, build_model(replace(SETTINGS, windows_hu="0:80"), 3), SETTINGS, {})
        case "gone":
            file.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cut", "not a safetensors file"),
        ("no card", "variant 'mine'"),
        ("not finite", "with finite values"),
        ("another shape", r"tensor encoder.patch_embed.proj.weight is \(16, 1, 4, 4\), expected \(16, 2, 4, 4\)"),
        ("gone", "no model file"),
    ],
)
def test_a_damaged_file_is_named(file: Path, model: MultiTaskSwin, change: str, words: str) -> None:
    damaged(file, change, model)
    with pytest.raises(StartingModelError, match=words) as caught:
        load_starting(model, file, SETTINGS)
    assert str(file) in str(caught.value)


def test_the_card_says_what_the_model_is(file: Path) -> None:
    card = read_card(file)
    assert card.settings == SETTINGS
    assert card.facts["data"] == "none"


def test_frozen_statistics_stay_the_files_and_leave_slices_alone(installed: Path) -> None:
    """With them a slice's logit does not depend on who else is in its batch; with the batch's it does."""
    synthetic = replace(SETTINGS, pretrained="synthetic")
    features = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)) + 1
    logits = {}
    for norm in ("frozen", "batch"):
        head = build_model(replace(synthetic, head_norm=norm), 1).cls.train()
        before = head.norm.running_mean.clone()
        logits[norm] = torch.cat([head(features[:3]), head(features[3:])]) - head(features)
        assert torch.equal(before, head.norm.running_mean) == (norm == "frozen")
    assert logits["frozen"].abs().max() < 1e-5
    assert logits["batch"].abs().max() > 1e-3
