"""Files that are replaced in one step, files that are their user's alone, and logs that do not grow for ever."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place, under a name of this process's own, sync it and move it there.

    Raises:
      OSError: it cannot be written, as on a full disk; what was there is there still.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # a half-written file would keep a full disk full
        raise


def replace_text(path: Path, text: str) -> None:
    """Do the same with a text in UTF-8.

    Raises:
      OSError: it cannot be written; what was there is there still.
    """
    replace_bytes(path, text.encode())


@contextmanager
def private_files() -> Iterator[None]:
    """Have what this process and its children make belong to its user alone, until the block ends.

    Slices, keys, heads and the audit log would otherwise be readable to every user of the machine.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def bound_log(path: Path, largest: int) -> None:
    """Move what a log holds to NAME.1, over what that held, once it is longer than `largest` bytes.

    The process that writes it appends, so it continues in the emptied file. Lines written during the copy are lost.

    Raises:
      OSError: there is no room; the log is as it was.
    """
    if path.stat().st_size > largest:
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)
