"""Where the system does not let a command at a file, it says whose it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.host.rights import not_permitted, user_name, words_of

ME = user_name(os.geteuid())


def test_a_file_of_ones_own_is_said_to_be_so(tmp_path: Path) -> None:
    assert not_permitted(tmp_path) == f"may not be used by {ME}, who runs this command: it belongs to {ME}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", ["lock", "not/yet/there"])
def test_the_owner_of_the_file_or_of_the_nearest_folder_is_named(tmp_path: Path, name: str) -> None:
    os.chown(tmp_path, 54321, 54321)
    if name == "lock":
        (tmp_path / name).touch()
        os.chown(tmp_path / name, 54321, 54321)
    assert not_permitted(tmp_path / name) == (
        f"may not be used by {ME}, who runs this command: it belongs to 54321; run the command as 54321, or give "
        f"{ME} the right (chown, chmod)"
    )


def test_only_an_error_about_rights_to_a_file_is_said_in_these_words(tmp_path: Path) -> None:
    denied = PermissionError(13, "Permission denied", str(tmp_path))
    assert words_of(denied) == f"{tmp_path} {not_permitted(tmp_path)}"
    assert words_of(PermissionError("no file")) == "no file"
    assert words_of(ValueError("another")) == "another"
