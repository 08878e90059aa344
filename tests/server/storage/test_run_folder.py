"""A run's name and keys, before it begins or goes on."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli_w

from server.storage.run_folder import RunError, check_run, read_keys
from shared.config import ConfigError, parse_config


def config(**keys: object):
    return parse_config({key.replace("__", "."): value for key, value in keys.items()})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run of the name pilot, and `latest` beside it."""
    run = tmp_path / "pilot"
    run.mkdir()
    (run / "config.toml").write_text(tomli_w.dumps(asdict(config(run__id="pilot", federation__rounds=5))))
    (tmp_path / "latest").symlink_to("pilot")
    return tmp_path


def test_a_new_run_needs_a_free_name(made: Path) -> None:
    check_run(made, "second", config())
    with pytest.raises(RunError, match=r"run 'pilot' exists in .*; choose another run.id"):
        check_run(made, "pilot", config(run__id="pilot"))


def test_a_run_is_resumed_under_its_name_with_its_keys(made: Path) -> None:
    check_run(made, "pilot", config(run__id="pilot", run__resume=True, federation__rounds=5))


@pytest.mark.parametrize("name", ["piolt", ""])
def test_a_name_that_no_run_has_is_refused_with_those_that_there_are(made: Path, name: str) -> None:
    wanted = config(run__id=name, run__resume=True, federation__rounds=5)
    with pytest.raises(RunError, match=rf"no run '{name}' in .* to resume; run.id must be one of: pilot$"):
        check_run(made, name or "20261125-000000-0123456789ab", wanted)


def test_another_key_is_named_with_both_values_and_the_command(made: Path) -> None:
    wanted = config(run__id="pilot", run__resume=True, federation__rounds=6, train__batch=4)
    told = (
        "run 'pilot' was made with another config: train.batch was 16, is 4, federation.rounds was 5, is 6; resume it with its own: "
        f"--preset {made / 'pilot' / 'config.toml'} --set run.resume=true"
    )
    with pytest.raises(RunError, match=re.escape(told)):
        check_run(made, "pilot", wanted)


def test_how_long_hospitals_are_waited_for_may_change(made: Path) -> None:
    patience = {"federation__wait_s": 5000.0, "federation__round_deadline_s": 5000.0}
    check_run(made, "pilot", config(run__id="pilot", run__resume=True, federation__rounds=5, **patience))


@pytest.mark.parametrize("name", ["../x", "a b", "latest", ".hidden", "x/y", "a" * 65])
def test_a_name_that_is_none_of_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"run.id is {name!r}; expected up to 64 letters")):
        config(run__id=name)


def test_a_text_without_quotes_of_its_own_is_refused_with_how_to_write_it() -> None:
    with pytest.raises(ConfigError, match=re.escape("""--set run.id="'pilot'\"""")):
        read_keys(None, ["run.id=pilot"])
