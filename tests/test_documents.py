"""What the guides name is there: packages, files, links, versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("client", "server", "shared", "simulations")
GUIDES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "deploy").glob("*.md"), *(ROOT / wing / "README.md" for wing in WINGS))
    if path.is_file() and path.name not in ("LOG.md", "CHANGELOG.md", "EXPERIMENTS.md")
)


def anchors(text: str) -> set[str]:
    """The names that a page's headings have in links."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_map_of_packages_is_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\| `([\w/]+)` \|", text, flags=re.M)
    packages = [str(path.parent.relative_to(ROOT)) for wing in WINGS for path in (ROOT / wing).glob("*/__init__.py")]
    assert sorted(named) == sorted([*packages, "tests/support"])


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_of_a_guide_leads_somewhere(guide: str) -> None:
    page = ROOT / guide
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), f"{guide} links {target}"
        if anchor:
            assert anchor in anchors(other.read_text()), f"{guide} links {target}"


@pytest.mark.parametrize("guide", GUIDES)
def test_every_module_that_a_guide_names_is_there(guide: str) -> None:
    named = re.findall(r"`((?:client|server|shared|simulations|tests|deploy)/[\w/.-]+)`", (ROOT / guide).read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_there_is_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
