from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.config import ConfigError, parse_config
from simulations.cli import _run_config, app

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "simulations" / "demo.toml"


def preset(folder: Path, text: str) -> Path:
    path = folder / "preset.toml"
    path.write_text(text)
    return path


def flat(config: dict) -> dict:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def test_the_preset_and_absolute_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = _run_config(DEMO, [], Path("h"), Path("r"))
    run = config.pop("run")
    assert run.pop("id").endswith(parse_config(flat(config)).hash())
    assert run == {"folder": str(tmp_path / "r")}
    assert config.pop("simulation") == {"hospitals": str(tmp_path / "h")}
    assert config == tomllib.loads(DEMO.read_text())


def test_a_key_wins_over_the_preset_and_leaves_the_rest(tmp_path: Path) -> None:
    keys = ["federation.rounds=3", "train.learning_rate=2e-4", 'run.id="x"', "model.windows_hu = '0:80,-20:180'"]
    config = _run_config(DEMO, keys, tmp_path / "h", tmp_path / "r")
    before = flat(tomllib.loads(DEMO.read_text()))
    expected = before | {
        "federation.rounds": 3,
        "train.learning_rate": 2e-4,
        "run.id": "x",
        "model.windows_hu": "0:80,-20:180",
        "run.folder": str(tmp_path / "r"),
        "simulation.hospitals": str(tmp_path / "h"),
    }
    assert flat(config) == expected
    assert parse_config(flat(config)).federation.rounds == 3


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.epoch=3", "did you mean 'train.epochs'"),
        ("train.epochs=0", "at least 1"),
        ("train.epochs='3'", "expected int"),
        ("rounds=3", "expected section.key=value"),
        ("federation.rounds", "is not TOML"),
        ("federation.strategy=fedavg", "is not TOML"),
        ("nothing.here=1", "unknown config key 'nothing.here'"),
        ("train.batch.size=1", "train.batch"),
    ],
)
def test_a_wrong_key_is_refused(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _run_config(DEMO, [key], tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[train]\nepoch = 3\n", "did you mean 'train.epochs'"),
        ("[train\n", "cannot be read"),
        ("epochs = 3\n", "epochs"),
        ("train = 3\n", "train"),
    ],
)
def test_a_wrong_preset_is_refused(tmp_path: Path, content: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        _run_config(
            preset(tmp_path, content), ["train.batch=8"] if content.startswith("train") else [], tmp_path, tmp_path
        )


def test_a_preset_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_bytes(b"\xff\xfe[train]")
    with pytest.raises(ConfigError, match="cannot be read"):
        _run_config(path, [], tmp_path, tmp_path)


@pytest.mark.parametrize("missing", ["nowhere.toml", "."])
def test_a_missing_preset_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match=r"simulations/demo\.toml"):
        _run_config(tmp_path / missing, [], tmp_path, tmp_path)


@pytest.mark.parametrize(("key", "option"), [("run.folder", "runs"), ("simulation.hospitals", "hospitals")])
def test_a_folder_in_a_key_is_refused_in_favour_of_the_option(tmp_path: Path, key: str, option: str) -> None:
    """Afterwards the command reads --runs and --hospitals, so a run elsewhere would show another run's result."""
    with pytest.raises(ConfigError, match=f"{key}.*--{option}"):
        _run_config(DEMO, [f"{key}='/elsewhere'"], tmp_path / "h", tmp_path / "r")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--set", "train.epoch=1"], "did you mean 'train.epochs'"),
        (["--set", "federation.rounds"], "is not TOML"),
        (["--preset", "nowhere.toml"], "cannot be read"),
    ],
)
def test_the_command_refuses_before_anything_is_written(tmp_path: Path, options: list[str], text: str) -> None:
    folders = ["--hospitals", str(tmp_path / "h"), "--runs", str(tmp_path / "r")]
    result = CliRunner().invoke(app, ["demo", *folders, *options])
    assert result.exit_code == 1
    assert "ConfigError" in result.output
    assert text in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["demo", "--round", "3"]).exit_code == 2
    assert CliRunner().invoke(app, ["sites", "--seed", "x"]).exit_code == 2
