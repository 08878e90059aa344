"""Files of the hospital's state: its user's alone, and replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def replace_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place, sync it and move it there.

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    partial = path.with_name(f"{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
