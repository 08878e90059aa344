"""Root's hold on the folder with the node's key, which lies in a folder that another user owns.

Started by root, the daemon keeps the key from the process that answers, which runs as the owner of site.yaml. That user
also owns the state folder, so it can rename `centre/` in it and put a link or a folder of its own there at any time. Root
therefore opens the folder once, without following a link, checks whose it is, gives it to root and from then on names
files only through what it opened (/proc/self/fd). After that the path decides nothing until the next start. Then a
folder of that user is taken as it was after `hemafed-client init`: it may bring the user's own key and centre, never
another file of root's, because links of both kinds are refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shared.host.rights import user_name
from shared.wire.enrolment import EnrolError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def answering_owner(site_yaml: Path) -> tuple[int, int]:
    """Return the user and group that answer messages: the owner of site.yaml.

    Raises:
      EnrolError: the file is root's in a folder that another user may change, so that this user could have put it there
        to have messages answered as root.
    """
    file, folder = site_yaml.stat(), site_yaml.resolve().parent.stat()
    if file.st_uid == 0 and (folder.st_uid != 0 or folder.st_mode & 0o022):
        raise EnrolError(
            f"{site_yaml} belongs to root, and its folder to {user_name(folder.st_uid)} or to a group or everybody; messages are "
            "answered as the owner of site.yaml: give the file to the user who owns the folder (chown)"
        )
    return file.st_uid, file.st_gid


def keep_from_others(folder: Path, owner: int) -> Path:
    """Give the folder with the node's key to root alone and return a path to it that no other user can move.

    Args:
      folder: `centre/` of the site's state folder.
      owner: number of the user who answers, to whom the folder may belong before.
    Returns:
      A path of this process, for as long as it lives.
    Raises:
      EnrolError: the folder is a link or of a third user, or holds a link.
    """
    try:
        opened = os.open(folder, _FOLDER)
    except OSError as error:
        raise EnrolError(
            f"{folder}: no folder, or a link ({error.strerror}); expected the folder of the key"
        ) from error
    try:
        _check_owner(folder, os.fstat(opened).st_uid, owner)
        os.fchown(opened, 0, 0)  # first: from here on nobody else can add, remove or rename what is in it
        os.fchmod(opened, 0o700)
        for name in os.listdir(opened):
            _take(folder, opened, name, owner)
    except BaseException:
        os.close(opened)
        raise
    return Path(f"/proc/self/fd/{opened}")


def _check_owner(path: Path, found: int, owner: int) -> None:
    if found not in (0, owner):
        raise EnrolError(
            f"{path} belongs to {user_name(found)}, expected root or {user_name(owner)}, the owner of site.yaml; chown it to one "
            "of them if it is yours"
        )


def _take(folder: Path, opened: int, name: str, owner: int) -> None:
    """Give one entry of the open folder to root; a second name of another file would give away that file."""
    found = os.stat(name, dir_fd=opened, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) and not (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
        raise EnrolError(f"{folder / name} is a link or no plain file; put the file itself there")
    _check_owner(folder / name, found.st_uid, owner)
    os.chown(name, 0, 0, dir_fd=opened, follow_symlinks=False)
