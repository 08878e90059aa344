"""Replacing a small text file in one step: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its place, under a name of this process's own, and move it there.

    Raises:
      OSError: it cannot be written; what was there is there still.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)
