"""Units say what they are given, whatever characters are in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.host.systemd import unit_text

HARD = r"""100% of 'it' $HOME "here" C:\new"""


def test_a_path_of_any_characters_arrives_as_it_is() -> None:
    text = unit_text(f"the site of {HARD}", ["hemafed-client", "join", HARD], user="", stop_s=60)
    program = Path(sys.executable).parent / "hemafed-client"
    assert (
        rf"""ExecStart="{program}" "join" "100%% of 'it' $$HOME \"here\" C:\\new"
"""
        in text
    )
    assert (
        r"""Description=the site of 100%% of 'it' $HOME "here" C:\new
"""
        in text
    )


def test_the_user_is_named_only_where_there_is_one() -> None:
    assert "User=" not in unit_text("", ["hemafed-client"], user="", stop_s=60)
    assert "\nUser=hemafed\n" in unit_text("", ["hemafed-client"], user="hemafed", stop_s=60)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_it(tmp_path: Path) -> None:
    unit = tmp_path / "hard.service"
    unit.write_text(unit_text("hard", ["hemafed-client", "join", HARD], user="", stop_s=60))
    told = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert [line for line in told.stderr.splitlines() if unit.name in line] == []
