"""Error messages for files that the system does not let a command use."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path


def words_of(error: Exception) -> str:
    """Return the error message; for a permission error, add the owner and the fix."""
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} {not_permitted(Path(error.filename))}"
    return str(error)


def not_permitted(path: Path) -> str:
    """Return the owner of a file, the current user and the fix; for a missing file, those of its folder."""
    owner, me = user_name(_nearest(path).stat().st_uid), user_name(os.geteuid())
    told = f"may not be used by {me}, who runs this command: it belongs to {owner}"
    return told if owner == me else f"{told}; run the command as {owner}, or give {me} the right (chown, chmod)"


def _nearest(path: Path) -> Path:
    """The path, or the first folder above it that can be looked at."""
    for place in (path, *path.absolute().parents):
        try:
            place.stat()
        except OSError:
            continue
        return place
    return Path("/")


def user_name(number: int) -> str:
    """A user's name; the number where there is none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    """A group's name; the number where there is none."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
