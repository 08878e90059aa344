from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from client.boundary.code import MOST_BYTES, MOST_ENTRIES, ROOT, CodeError, code_hash, read_bundle
from shared.config import parse_config

KEPT = shutil.ignore_patterns("__pycache__")
Files = dict[str, bytes]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's code, which a test may change."""
    root = tmp_path / "copy"
    for folder in ("client", "shared", "server"):
        shutil.copytree(ROOT / folder, root / folder, ignore=KEPT)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="session")
def bundle() -> bytes:
    """The bundle that a centre with this code sends."""
    return build_fab_from_disk(ROOT)


@pytest.fixture(scope="session")
def files(bundle: bytes) -> Files:
    """What is in it."""
    with zipfile.ZipFile(BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def refused(content: bytes) -> str:
    with pytest.raises(CodeError) as caught:
        read_bundle(content).defaults()
    return str(caught.value)


def test_a_bundle_has_the_hash_and_the_config_of_the_code_that_it_was_made_of(bundle: bytes) -> None:
    found = read_bundle(bundle)
    assert found.code == code_hash()
    assert parse_config(found.defaults()).flat() == parse_config({}).flat()


@pytest.mark.parametrize("place", ["client/inner/deep/one.py", "shared/runs/two.py", "client/build/three.py"])
def test_a_file_at_any_depth_is_in_the_bundle_and_in_the_hash(copy: Path, place: str) -> None:
    (copy / place).parent.mkdir(parents=True)
    (copy / place).write_text("x = 1\n")
    assert code_hash(copy) != code_hash()
    if "build" not in place:  # Flower leaves folders of this name out: such a hospital refuses every bundle, in words
        assert read_bundle(build_fab_from_disk(copy)).code == code_hash(copy)


def test_no_folder_of_ours_has_a_name_that_flower_leaves_out() -> None:
    for folder in ("client", "shared", "server"):
        names = {path.name for path in (ROOT / folder).rglob("*") if path.is_dir()}
        assert not names & {"build", "lib", "parts", "venv", ".venv", "env", ".flwr"}


def test_the_hash_is_the_same_in_every_version(tmp_path: Path) -> None:
    """It stands in hospitals' site.yaml (policy.app): another way to count would turn all of them away."""
    for name, content in (("client/app.py", b"x = 1\n"), ("client/in/a.py", b""), ("shared/c.py", b"\xff")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert code_hash(tmp_path) == "d7993e4c3d986cae458f2c7f4dacefc2624d211e15db0df5a1ae12bfbe2a8f19"


def test_a_tree_without_the_client_app_has_no_hash(copy: Path, files: Files) -> None:
    (copy / "client" / "app.py").unlink()
    with pytest.raises(CodeError, match=r"copy holds no client/app.py"):
        code_hash(copy)
    assert "holds no client/app.py" in refused(packed({n: d for n, d in files.items() if n != "client/app.py"}))


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
        lambda root: flip_a_bit(root / "client/training/round.py"),
        lambda root: flip_a_bit(root / "shared/wire/records.py"),
        lambda root: (root / "client/training/round.py").open("a").write("\n"),
        lambda root: (root / "client" / "__init__.py").unlink(),
        lambda root: (root / "client" / "extra.py").touch(),
        lambda root: (root / "shared/wire/records.py").rename(root / "shared/wire/record.py"),
        lambda root: (root / "shared/wire/records.py").rename(root / "client/records.py"),
        lambda root: swap(root / "client/training/round.py", root / "client/boundary/policy.py"),
    ],
    ids=["a bit", "a bit of shared", "a line's end", "removed", "added", "renamed", "moved", "swapped"],
)
def test_the_hash_changes_with_whatever_runs_in_a_hospital(copy: Path, change: Callable[[Path], object]) -> None:
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
def test_the_hash_does_not_change_with_what_does_not_run_there(copy: Path, change: Callable[[Path], object]) -> None:
    change(copy)
    assert code_hash(copy) == code_hash()


@pytest.mark.parametrize(
    "name",
    [
        "../client/app.py",
        "client/../../x.py",
        "/etc/x.py",
        "client//x.py",
        "client\\x.py",
        "client/x.py/",
        "./client/x.py",
        "client/x y.py",
        "client/\u0430pp.py",
        "client/\x1b[2Jx.py",
        "/".join(["d"] * 12),
    ],
)
def test_a_bundle_with_a_strange_name_is_refused(files: Files, name: str) -> None:
    text = refused(packed(files | {name: b"x = 1\n"}))
    assert "expected plain relative names, each once" in text
    assert text.isascii()
    assert text.isprintable()


def test_a_bundle_with_a_name_twice_is_refused(files: Files) -> None:
    """One reader may take the first, another the last."""
    content = BytesIO(packed(files))
    with zipfile.ZipFile(content, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("client/app.py", b"evil = True\n")
    assert "each once" in refused(content.getvalue())


def test_a_bundle_that_unpacks_to_half_a_gigabyte_is_refused_before_it_is_unpacked(files: Files) -> None:
    """Flower's own installer writes these 512 MiB of 510 KiB to the disk before any line of ours."""
    zeros = bytes(64 << 20)
    content = packed(files | {f"z{number}.bin": zeros for number in range(8)})
    assert len(content) < 1 << 20
    assert refused(content) == f"the run's bundle unpacks to more than {16 << 20} bytes"
    assert "unpacks to 900000 bytes" in refused(packed(files | {"z.bin": bytes(900_000)}))


def test_a_bundle_whose_header_lies_about_its_length_is_refused(files: Files) -> None:
    content = bytearray(packed({**files, "client/app.py": bytes(range(256)) * 64}, zipfile.ZIP_STORED))
    told, lie = (16384).to_bytes(4, "little"), (16000).to_bytes(4, "little")
    content = content.replace(told + told, told + lie)
    assert "the run's bundle" in refused(bytes(content))


def test_a_bundle_of_too_many_files_or_bytes_is_refused(files: Files) -> None:
    assert "expected at most 1000" in refused(packed(files | {f"f{n}": b"" for n in range(MOST_ENTRIES)}))
    assert refused(bytes(MOST_BYTES + 1)).startswith(f"the run's bundle has {MOST_BYTES + 1} bytes")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip", bytes(1000)])
def test_bytes_that_are_no_bundle_are_refused(content: bytes) -> None:
    assert "the run's bundle cannot be read" in refused(content)


@pytest.mark.parametrize(
    "text",
    ["", "[tool.flwr]", "[tool.flwr.app]\nconfig = 3", "tool = 1", "[[", "[tool.flwr.app.config]\na = [1]", "\x00"],
)
def test_a_bundle_whose_config_cannot_be_read_is_refused(files: Files, text: str) -> None:
    assert "the run's bundle cannot be read" in refused(packed(files | {"pyproject.toml": text.encode()}))


@pytest.mark.parametrize("text", ["#" * 70_000, ".".join(["a"] * 16_000) + "=1", "x = [" + "[" * 5_000])
def test_a_config_that_takes_long_to_read_is_refused_before_it_is_read(files: Files, text: str) -> None:
    """tomllib takes the square of a key's parts: 4,000 took 0.2 s, and a file of the old bound had 500,000."""
    content = packed(files | {"pyproject.toml": text.encode()}, zipfile.ZIP_STORED)
    assert "pyproject.toml of the run's bundle" in refused(content)
    found = read_bundle(content)
    assert found.code == code_hash(), "the code is compared first"


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_bundle_that_is_packed_in_another_way_is_refused(files: Files, method: int) -> None:
    """A damaged LZMA stream raised an error that nobody expected."""
    content = bytearray(packed(files, method))
    assert f"packed by method {method}" in refused(bytes(content))
    content[60:68] = b"\xff" * 8
    assert "the run's bundle" in refused(bytes(content))


def test_a_version_that_is_a_path_changes_nothing(files: Files) -> None:
    """With Flower's installer it decided where the bundle was unpacked, and its code ran in the hospital."""
    text = files["pyproject.toml"].decode()
    evil = text.replace('version = "', 'version = "0/../../../../../loot/', 1)
    assert evil != text
    assert read_bundle(packed(files | {"pyproject.toml": evil.encode()})).code == code_hash()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_are_a_bundle_is_read_or_refused(data: st.DataObject, bundle: bytes) -> None:
    content = bytearray(bundle)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(
            st.one_of(st.integers(0, len(content) - 1), st.integers(len(content) - 4000, len(content) - 1))
        )
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2000))
    try:
        read_bundle(bytes(content[: len(content) - cut]))
    except CodeError:
        return


ATTEMPTS = """
import importlib, json, sys

root, closed, path, names = json.loads(sys.argv[1])
sys.path.insert(0, root)
from client.boundary.code import InstalledOnly, installed_places

import shared
if closed:
    sys.meta_path.insert(0, InstalledOnly(installed_places()))
sys.path.insert(0, path)
told = {}
for name in names:
    try:
        told[name] = importlib.import_module(name).__file__ or "a folder"
    except ImportError as error:
        told[name] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""
INSIDE = ["evil", "compiled", "package", "folder", "folder.inner", "shared.extra"]


@pytest.fixture
def loot(tmp_path: Path) -> Path:
    """A folder of modules that leave a word when a line of them runs, wherever it lies."""
    root = tmp_path / "loot"
    word = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n"
    for name in ("evil", "package/__init__", "folder/inner", "deep/one", "wave", "shared/extra"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(word)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-b", "evil.py"], cwd=root, check=True)
    (root / "evil.pyc").rename(root / "compiled.pyc")
    return root


def attempt(path: Path | str, names: list[str], closed: bool = True, cwd: Path = ROOT) -> dict[str, str]:
    """What becomes of imports in a process with `path` first on its import path."""
    command = [sys.executable, "-c", ATTEMPTS, json.dumps([str(ROOT), closed, str(path), names])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_runs_that_is_not_installed(loot: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(loot)
    ways = [attempt(loot, INSIDE), attempt(tmp_path / "link", ["evil"]), attempt("", ["evil"], cwd=loot)]
    ways += [attempt(loot / "deep", ["one"]), attempt("deep", ["one"], cwd=loot)]
    for told in ways:
        for name, text in told.items():
            assert "imports only what it installed itself" in text or text.startswith("ModuleNotFoundError"), name
    assert not (tmp_path / "ran").exists()


def test_without_the_finder_it_runs(loot: Path, tmp_path: Path) -> None:
    """Else the test above says nothing."""
    told = attempt(loot, ["evil", "compiled", "package", "folder.inner", "wave"], closed=False)
    assert not any("Error" in text for text in told.values())
    assert (tmp_path / "ran").read_text() == "evilcompiledpackagefolder.innerwave"


def test_what_is_installed_is_imported(loot: Path) -> None:
    """A module of the standard library that the folder has too is not taken from elsewhere either."""
    told = attempt(
        loot.parent,
        ["client.boundary.audit", "client.masks.match", "yaml", "torch", "sqlite3", "xml.etree.ElementTree"],
    )
    assert told["client.boundary.audit"] == str(ROOT / "client/boundary/audit.py")
    assert not any("Error" in text for text in told.values())


def test_no_other_folder_of_the_project_is_imported() -> None:
    told = attempt(ROOT, ["server.app", "simulations.cli", "tests.support.loopback"])
    assert all("imports only what it installed itself" in text for text in told.values())
