from __future__ import annotations

import json
import os
import py_compile
import resource
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from client.gate import ROOT, _tell_pid, bundle_of_this_run, bundles, code_hash

KEPT = shutil.ignore_patterns("__pycache__", "importers")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's code, which a test may change."""
    root = tmp_path / "copy"
    for folder in ("client", "shared", "server"):
        shutil.copytree(ROOT / folder, root / folder, ignore=KEPT)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    return root


def test_an_unpacked_bundle_has_the_hash_of_the_code_that_it_was_made_of(copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(copy))) as bundle:
        bundle.extractall(tmp_path / "unpacked")
    assert not (tmp_path / "unpacked" / "client" / "importers").exists()
    assert code_hash(tmp_path / "unpacked") == code_hash(copy) == code_hash()


def test_the_hash_is_the_same_in_every_version(tmp_path: Path) -> None:
    """It stands in hospitals' site.yaml (policy.app): another way to count would turn all of them away."""
    for name, content in (("client/b.py", b"x = 1\n"), ("client/a.py", b""), ("shared/c.py", b"\xff")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert code_hash(tmp_path) == "04af3e8f6a8a2be47479bf94a1a624250579fc01299770b5341f5498898cf5b4"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: flip_a_bit(root / "client" / "train.py"),
        lambda root: flip_a_bit(root / "shared" / "wire.py"),
        lambda root: (root / "client" / "train.py").open("a").write("\n"),
        lambda root: (root / "client" / "__init__.py").unlink(),
        lambda root: (root / "client" / "extra.py").touch(),
        lambda root: (root / "shared" / "wire.py").rename(root / "shared" / "wires.py"),
        lambda root: (root / "shared" / "wire.py").rename(root / "client" / "wire.py"),
        lambda root: swap(root / "client" / "train.py", root / "client" / "policy.py"),
    ],
    ids=["a bit", "a bit of shared", "a line's end", "removed", "added", "renamed", "moved", "swapped"],
)
def test_the_hash_changes_with_whatever_runs_in_a_hospital(copy: Path, change: object) -> None:
    change(copy)
    assert code_hash(copy) != code_hash()


@pytest.mark.parametrize(
    "change",
    [
        lambda root: shutil.rmtree(root / "server"),
        lambda root: flip_a_bit(root / "server" / "app.py"),
        lambda root: flip_a_bit(root / "pyproject.toml"),
        lambda root: (root / "client" / "notes.txt").touch(),
        lambda root: (root / "client" / "__pycache__").mkdir(),
    ],
    ids=["no server", "other server", "other config", "no code", "compiled"],
)
def test_the_hash_does_not_change_with_what_does_not_run_there(copy: Path, change: object) -> None:
    change(copy)
    assert code_hash(copy) == code_hash()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An unpacked bundle whose every module leaves a word when a line of it runs."""
    root = tmp_path / "flower" / "apps" / "hemafed.abc"
    word = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n"
    modules = (
        "evil",
        "shared/__init__",
        "shared/config",
        "client/extra",
        "package/__init__",
        "folder/inner",
        "deep/one",
    )
    for name in modules:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(word)
    py_compile.compile(str(root / "evil.py"), str(root / "compiled.pyc"))
    (root / "binary.so").touch()
    return root


ATTEMPTS = """
import importlib, json, os, sys

closed, path, names = json.loads(sys.argv[1])
import client.gate

sys.path.insert(0, path)
try:
    import nothing_of_that_name  # the folder is known to the import system from here on
except ModuleNotFoundError:
    pass
if closed:
    client.gate.close_bundles()
told = {}
for name in names:
    try:
        told[name] = importlib.import_module(name).__file__ or "a folder"
    except ImportError as error:
        told[name] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def attempt(bundle: Path, path: Path | str, names: list[str], closed: bool = True, cwd: Path = ROOT) -> dict[str, str]:
    """What becomes of imports in a process with `path` first on its import path."""
    environment = os.environ | {"FLWR_HOME": str(bundle.parents[1]), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ATTEMPTS, json.dumps([closed, str(path), names])]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


INSIDE = ["evil", "compiled", "binary", "package", "folder", "folder.inner", "shared.config"]


def test_nothing_of_a_closed_bundle_runs(bundle: Path, tmp_path: Path) -> None:
    told = attempt(bundle, bundle, INSIDE)
    for name, text in told.items():
        top = name.split(".")[0]
        assert text == (
            f"ImportError: the site runs only the code that it installed itself (policy.app), not module {top!r} of the run's bundle"
        )
    assert not (tmp_path / "ran").exists()


def test_before_it_is_closed_a_bundle_runs(bundle: Path, tmp_path: Path) -> None:
    """Else the test above says nothing."""
    told = attempt(bundle, bundle, INSIDE, closed=False)
    assert {name for name, text in told.items() if "Error" in text} == {"binary"}
    assert (tmp_path / "ran").read_text() == "evilcompiledpackagefolder.innersharedshared.config"


def test_what_is_installed_is_imported_past_a_closed_bundle(bundle: Path) -> None:
    """Also modules of a package that the bundle has too, once the installed one is loaded, and none that only it has."""
    told = attempt(bundle, bundle, ["client.audit", "client.extra", "wave", "yaml"])
    assert told["client.audit"] == str(ROOT / "client" / "audit.py")
    assert told["client.extra"] == "ModuleNotFoundError: No module named 'client.extra'"
    assert "Error" not in told["wave"] + told["yaml"]
    assert str(bundle) not in told["wave"] + told["yaml"]


def test_a_bundle_is_closed_whichever_way_leads_to_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert attempt(bundle, tmp_path / "link", ["evil"])["evil"].startswith("ImportError: the site runs only")
    assert attempt(bundle, bundle / "deep", ["one"])["one"].startswith("ImportError: the site runs only")
    assert attempt(bundle, "", ["evil"], cwd=bundle)["evil"].startswith("ImportError: the site runs only")
    assert attempt(bundle, "deep", ["one"], cwd=bundle)["one"].startswith("ImportError: the site runs only")
    assert not (tmp_path / "ran").exists()


def test_the_bundle_of_a_run_is_the_one_on_the_import_path(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path)])
    assert bundle_of_this_run() is None
    monkeypatch.setattr(sys, "path", [str(ROOT), str(bundle), str(tmp_path)])
    assert bundle_of_this_run() == bundle


def test_bundles_are_where_flower_unpacks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLWR_HOME", raising=False)
    assert bundles() == tmp_path / ".flwr" / "apps"
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    assert bundles() == tmp_path / "flower" / "apps"


def test_on_a_full_disk_no_process_is_named_rather_than_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "app.pid"
    _tell_pid(path)
    assert int(path.read_text()) == os.getpid()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        _tell_pid(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()
