"""The direction of imports, and that it can be broken by nobody unnoticed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("shared", "client", "server", "simulations", "deploy")
ALLOWED = {
    "shared": {"shared"},
    "client": {"client", "shared"},
    "server": {"server", "shared"},
    "simulations": {"simulations", "client", "server", "shared"},
    "deploy": {"deploy"},
}


def imported_folders(source: str) -> set[str]:
    """Folders of the project that a module imports, at the top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            names.append(node.module)
    return {name.split(".")[0] for name in names} & set(FOLDERS)


@pytest.mark.parametrize("folder", ["shared", "client", "server", "simulations"])
def test_each_folder_imports_only_what_it_may(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported_folders(path.read_text()) - ALLOWED[folder])
        for path in modules
        if imported_folders(path.read_text()) - ALLOWED[folder]
    }
    assert wrong == {}


def test_an_import_against_the_direction_is_seen() -> None:
    assert imported_folders("def f():\n    from client.training.round import train_round\n") == {"client"}
    assert imported_folders("import server.app as x, numpy\n") == {"server"}
