"""What code may run in the hospital: its own, installed and reviewed there, and nothing that a server sends.

Flower hands the hospital's node the centre's app bundle and runs it. `hemafed-client join` puts this program in the place of
`flwr-clientapp`: it loads the hospital's own client first and closes the bundle's folder to imports, so that no line of a
bundle runs. A run whose bundle has other client code than the hospital is then refused by its hash (client/app.py), and so
are Flower's other kinds of apps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from functools import cache
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path
from types import ModuleType

HOSPITAL_CODE = ("client", "shared")  # the bundle's server code never runs in a hospital
ROOT = Path(__file__).resolve().parent.parent
RUNNING = "HEMAFED_RUNNING"  # environment: file for the number of the process that answers a message


@cache
def code_hash(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the Python files that run in a hospital; 64 hexadecimal digits.

    These are the files right in client/ and shared/, as an app bundle holds them (fab-include in pyproject.toml).

    Args:
      root: folder with client/ and shared/: an installation, or an unpacked app bundle.
    """
    files = sorted(path for folder in HOSPITAL_CODE for path in (root / folder).glob("*.py"))
    named = [[path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def bundles() -> Path:
    """Where Flower unpacks app bundles."""
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")).resolve() / "apps"


def bundle_of_this_run() -> Path | None:
    """The unpacked bundle that Flower put on the import path of this process; None without one."""
    return next((Path(entry) for entry in sys.path if Path(entry).resolve().is_relative_to(bundles())), None)


class Closed:
    """Finder of a folder whose modules are not to be imported."""

    def __init__(self, folder: str):
        loaders = (
            (ExtensionFileLoader, EXTENSION_SUFFIXES),
            (SourceFileLoader, SOURCE_SUFFIXES),
            (SourcelessFileLoader, BYTECODE_SUFFIXES),
        )
        self._inside = FileFinder(folder, *loaders)

    def find_spec(self, name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for what is not there, so that the search goes on."""
        if self._inside.find_spec(name, target) is not None:
            raise ImportError(
                f"the site runs only the code that it installed itself (policy.app), not module {name!r} of the run's bundle"
            )
        return None


def close_bundles() -> None:
    """Make app bundles unimportable in this process."""
    closed = bundles()

    def hook(entry: str) -> Closed:
        if not Path(entry).resolve().is_relative_to(closed):
            raise ImportError  # in the language of path hooks: ask the next one
        return Closed(entry)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()


def main() -> None:
    """In place of flwr-clientapp."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    import client.app  # noqa: F401  Flower finds it loaded and takes it

    close_bundles()
    _show_progress()
    if RUNNING in os.environ:
        _tell_pid(Path(os.environ[RUNNING]))
    flwr_clientapp()


def _show_progress() -> None:
    """Epochs and refusals as lines of the hospital's own log."""
    logger = logging.getLogger("hemafed")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _tell_pid(path: Path) -> None:
    """Say which process answers; on a full disk nothing, for an old number would be taken for a dead one's."""
    try:
        path.write_text(str(os.getpid()))
    except OSError:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
