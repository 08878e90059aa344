"""The walls of the house: which room may import which, and that nobody breaks one unnoticed."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shared", "client", "server", "simulations")
# Room -> rooms that it may import beside itself. A name without a dot stands for the modules that lie in the folder itself.
ROOMS = {
    "shared": (),
    "shared.model": ("shared",),
    "shared.wire": ("shared",),
    "shared.host": ("shared",),
    "client.dicom": ("shared",),
    "client.masks": ("shared", "client.dicom"),
    "client.ingest": ("shared", "shared.host", "client.dicom", "client.masks"),
    "client.check": ("shared", "shared.host", "client.dicom", "client.masks", "client.ingest"),
    "client.segment": ("shared", "shared.model", "client.dicom", "client.ingest", "client.check"),
    "client.boundary": ("shared", "shared.model", "shared.wire", "shared.host"),
    "client.training": ("shared", "shared.model", "shared.wire", "shared.host", "client.boundary"),
    "client.node": ("shared", "shared.wire", "shared.host", "client.boundary", "client"),
    "client": (
        "shared",
        "shared.model",
        "shared.wire",
        "shared.host",
        "client.dicom",
        "client.ingest",
        "client.check",
        "client.segment",
        "client.boundary",
        "client.training",
        "client.node",
    ),
    "server.storage": ("shared", "shared.model", "shared.wire", "shared.host"),
    "server.federation": ("shared", "shared.model", "shared.wire", "shared.host", "server.storage"),
    "server.evaluation": ("shared", "shared.model", "shared.wire", "shared.host", "server.storage"),
    "server.centre": ("shared", "shared.wire", "shared.host", "server.storage"),
    "server.superlink": ("shared", "shared.wire", "shared.host", "server.storage", "server.centre"),
    "server": (
        "shared",
        "shared.model",
        "shared.wire",
        "shared.host",
        "server.storage",
        "server.federation",
        "server.evaluation",
        "server.centre",
    ),
}
READERS = ("client.dicom", "client.masks", "client.ingest", "client.check")  # each imports those before it
HEAVY = {"torch", "torchvision", "timm", "flwr"}  # what no reader loads
WIDEST = 13  # modules of a room
LONGEST = 350  # lines of a module


def module_name(path: Path) -> str:
    """The dotted name of a file below the root."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def imports_of(source: str) -> set[str]:
    """Dotted names that a module imports, at the top or inside a function; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    """The package that a module lies in; the folder for modules directly below it."""
    parts = module.split(".")
    return ".".join(parts[:2]) if f"{parts[0]}.{parts[1] if parts[1:] else ''}" in PACKAGES else parts[0]


PACKAGES = {module_name(path) for path in MODULES.values() if path.name == "__init__.py"} - set(FOLDERS)
IMPORTS = {name: imports_of(path.read_text()) for name, path in MODULES.items()}


def own_imports(module: str) -> set[str]:
    """Modules of this project that a module imports."""
    return {name for name in IMPORTS[module] if name in MODULES and name not in FOLDERS} - PACKAGES


def breaches(imports: Mapping[str, Iterable[str]], rooms: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Imports that go through a wall."""
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if room_of(module) in rooms
        and room_of(other) != room_of(module)
        and room_of(other) not in rooms[room_of(module)]
    ]


def test_every_room_imports_only_what_it_may() -> None:
    assert {room_of(module) for module in MODULES if not module.startswith("simulations")} == set(ROOMS)
    assert breaches({module: own_imports(module) for module in MODULES}, ROOMS) == []


def test_a_hole_in_a_wall_is_seen() -> None:
    holes = [
        ("client.dicom.pixels", "client.ingest.scan"),
        ("client.boundary.policy", "client.training.round"),
        ("server.storage.checkpoint", "server.federation.roster"),
        ("server.federation.roster", "server.centre.config"),
        ("shared.wire.records", "shared.model.swin"),
        ("client.app", "server.app"),
        ("server.app", "simulations.cli"),
    ]
    for module, other in holes:
        assert breaches({module: [other]}, ROOMS) == [f"{module} imports {other}"]
    assert breaches({"client.app": ["client.training.round", "shared.site"]}, ROOMS) == []
    assert imports_of("def f():\n    from client.training import round\n") == {
        "client.training",
        "client.training.round",
    }
    assert imports_of("import server.app as x, numpy\n") == {"server.app", "numpy"}


@pytest.mark.parametrize("room", READERS)
def test_readers_load_neither_torch_nor_flower(room: str) -> None:
    waiting, seen = {module for module in MODULES if room_of(module) == room}, set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        heavy = {name.split(".")[0] for name in IMPORTS[module]} & HEAVY
        assert not heavy, f"{module} imports {heavy}"
        waiting |= own_imports(module) - seen


def test_only_simulations_import_more_than_one_side() -> None:
    for module in MODULES:
        side = module.split(".")[0]
        others = {name.split(".")[0] for name in own_imports(module)} - {side, "shared"}
        assert side == "simulations" or not others, module


def test_there_is_no_circle_of_imports() -> None:
    try:
        list(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_rooms_are_narrow_and_modules_short() -> None:
    for room in {room_of(module) for module in MODULES}:
        count = sum(room_of(module) == room and path.name != "__init__.py" for module, path in MODULES.items())
        assert count <= WIDEST, f"{room} has {count} modules"
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > LONGEST}
    assert long == {}
