"""Files of the hospital's state, replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path


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
