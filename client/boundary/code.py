"""Check the code that may run in the hospital: what it installed and reviewed, nothing that a server sends.

A run brings an app bundle, the centre's own copy of the code. The hospital never unpacks, imports or installs it: the
bundle's bytes are read in memory, within bounds, for two things: the hash of the client code inside, which must be that of
the hospital's own code, and the defaults of the run config. In the process that answers, modules can come from the
installation alone, whatever is on the import path (InstalledOnly).
"""

from __future__ import annotations

import hashlib
import json
import re
import site
import sys
import sysconfig
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from io import BytesIO
from pathlib import Path
from types import ModuleType

from flwr.common.config import flatten_dict

from shared.config import Scalar
from shared.errors import HemafedError

HOSPITAL_CODE = ("client", "shared")  # the bundle's server code never runs in a hospital
ROOT = Path(__file__).resolve().parents[2]
APP = "client/app.py"
# Our own bundle has about a hundred files and 300 KB.
MOST_BYTES, MOST_ENTRIES, MOST_ENTRY_BYTES, MOST_UNPACKED_BYTES = 4 << 20, 1000, 1 << 20, 16 << 20
MOST_PROJECT_BYTES, MOST_DOTS = 64 << 10, 40  # of pyproject.toml; tomllib's time grows with the square of a key's parts
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as Flower's build writes
MOST_RATIO = 100  # Python text packs to a third or a fifth
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+){0,9}")


class CodeError(HemafedError, ValueError):
    """A tree or a bundle is not one of this project's; for the hospital's own log."""


def code_hash(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the Python files that run in a hospital; 64 hexadecimal digits.

    These are all files of client/ and shared/ whose names end in .py, at any depth, as an app bundle holds them
    (fab-include in pyproject.toml).

    Args:
      root: folder with client/ and shared/.
    Raises:
      CodeError: the folder does not hold the client app, so that the hash would be of something else.
    """
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in HOSPITAL_CODE
        for path in (root / folder).rglob("*.py")
    }
    return _hash_of(files, str(root))


def _hash_of(files: dict[str, bytes], what: str) -> str:
    """The hash of named files, those of HOSPITAL_CODE alone."""
    if APP not in files:
        raise CodeError(f"{what} holds no {APP}; expected the code of hemafed")
    named = [[name, hashlib.sha256(files[name]).hexdigest()] for name in sorted(files)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """The parts of a run's app bundle that the hospital uses.

    Attributes:
      code: hash of the client code inside, counted as `code_hash` counts it.
      project: its pyproject.toml, not read yet.
    """

    code: str
    project: bytes

    def defaults(self) -> dict[str, Scalar]:
        """The run config's defaults, dotted key -> value; still to be parsed and bounded.

        Raises:
          CodeError: pyproject.toml is too large or holds none.
        """
        if len(self.project) > MOST_PROJECT_BYTES:
            text = f"{len(self.project)} bytes, expected at most {MOST_PROJECT_BYTES}"
            raise CodeError(f"pyproject.toml of the run's bundle has {text}")
        if any(line.count(b".") > MOST_DOTS for line in self.project.splitlines()):
            raise CodeError(f"pyproject.toml of the run's bundle has a line of more than {MOST_DOTS} dots")
        try:
            return flatten_dict(tomllib.loads(self.project.decode())["tool"]["flwr"]["app"].get("config", {}))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CodeError(f"pyproject.toml of the run's bundle cannot be read ({type(error).__name__})") from error


def read_bundle(content: bytes) -> Bundle:
    """Read an app bundle in memory; nothing of it is written or run.

    Args:
      content: the zip file's bytes, from the centre.
    Raises:
      CodeError: it is larger than our bounds, has a strange name, or is not a bundle.
    """
    if len(content) > MOST_BYTES:
        raise CodeError(f"the run's bundle has {len(content)} bytes, expected at most {MOST_BYTES}")
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            files = _read_entries(archive)
        project = files["pyproject.toml"]
    except CodeError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, LookupError) as error:
        raise CodeError(f"the run's bundle cannot be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # encrypted, and whatever else zipfile raises
        raise CodeError(f"the run's bundle cannot be read ({type(error).__name__})") from error
    code = {
        name: data for name, data in files.items() if name.startswith(("client/", "shared/")) and name.endswith(".py")
    }
    return Bundle(_hash_of(code, "the run's bundle"), project)


def _read_entries(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Name -> content of every file, within the bounds."""
    entries = archive.infolist()
    if len(entries) > MOST_ENTRIES:
        raise CodeError(f"the run's bundle has {len(entries)} files, expected at most {MOST_ENTRIES}")
    if sum(entry.file_size for entry in entries) > MOST_UNPACKED_BYTES:
        raise CodeError(f"the run's bundle unpacks to more than {MOST_UNPACKED_BYTES} bytes")
    files: dict[str, bytes] = {}
    for entry in entries:
        name = entry.filename
        if not _NAME.fullmatch(name) or {".", ".."} & set(name.split("/")) or name in files:
            raise CodeError(f"the run's bundle has a file {name[:80]!a}; expected plain relative names, each once")
        if entry.compress_type not in METHODS:
            raise CodeError(f"file {name[:80]} of the run's bundle is packed by method {entry.compress_type}")
        if entry.file_size > MOST_ENTRY_BYTES or entry.file_size > MOST_RATIO * max(entry.compress_size, 100):
            raise CodeError(f"file {name[:80]} of the run's bundle unpacks to {entry.file_size} bytes")
        with archive.open(entry) as file:
            data = file.read(MOST_ENTRY_BYTES + 1)  # whatever the header says
        if len(data) != entry.file_size:
            raise CodeError(f"file {name[:80]} of the run's bundle has another length than its header says")
        files[name] = data
    return files


class InstalledOnly(MetaPathFinder):
    """Import finder that lets through what is installed, and raises ImportError for everything else.

    It is first on sys.meta_path and asks the other finders itself, so that no later change of sys.path adds a place to
    import from.

    Args:
      places: folders that modules may come from.
    """

    def __init__(self, places: Iterable[Path]):
        self._places = tuple(Path(place).resolve() for place in places)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders agree on first, if it lies in an allowed place."""
        for finder in sys.meta_path:
            found = None if finder is self else finder.find_spec(name, path, target)
            if found is not None:
                self._check(found)
                return found
        return None

    def _check(self, spec: ModuleSpec) -> None:
        if spec.origin in ("built-in", "frozen"):
            return
        places = list(spec.submodule_search_locations or ()) if spec.origin is None else [spec.origin]
        outside = [place for place in places if not self._allows(Path(place))]
        if outside or not places:
            raise ImportError(f"this site imports only what it installed itself, not module {spec.name!r}")

    def _allows(self, place: Path) -> bool:
        real = place.resolve()
        return any(real.is_relative_to(allowed) for allowed in self._places)


def installed_places() -> tuple[Path, ...]:
    """The standard library, site-packages, and this installation's client/ and shared/."""
    paths = sysconfig.get_paths()
    packages = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")] + site.getsitepackages()
    if site.ENABLE_USER_SITE:
        packages.append(site.getusersitepackages())
    return (*map(Path, packages), *(ROOT / folder for folder in HOSPITAL_CODE))
