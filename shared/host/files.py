"""Small text files that are replaced in one step, and logs that do not grow for ever."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its place, under a name of this process's own, and move it there: nobody reads a part of it.

    Raises:
      OSError: it cannot be written; what was there is there still.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def bound_log(path: Path, largest: int) -> None:
    """Move what a log holds to NAME.1, over what that held, once it is longer than `largest` bytes.

    The process that writes it need not be told: it appends, and so begins anew. Lines of the moment of copying are lost.

    Raises:
      OSError: there is no room; the log is as it was.
    """
    if path.stat().st_size > largest:
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)
