"""site.yaml as YAML, read strictly: known keys, each once and of its type; every fault names the key and what was expected.

YAML itself takes the last of two equal keys in silence, so that a second `policy:` block would replace the first; and a few
lines of nested aliases fill the memory. Both are errors here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.errors import HemafedError

LARGEST_BYTES = 64 * 1024  # of a site.yaml; real ones have 1 to 4 KiB
_DEEPEST = 8  # nesting; policy.accept has 4


class SiteError(HemafedError, ValueError):
    """A site.yaml cannot be used; names the key, the value and what was expected."""


class _Once(yaml.SafeLoader):
    """YAML's safe loader without repeated keys, aliases and deep nesting."""

    deep = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "an alias ('*'), expected values in full", event.start_mark)
        self.deep += 1
        if self.deep > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self.deep -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key_node.start_mark)
            if key in seen:
                raise SiteError(f"key {key!r} stands twice, in line {seen[key]} and line {line}; remove one of them")
            seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of a hospital.

    Raises:
      SiteError: it is too large, not YAML in UTF-8, holds a key twice or an alias.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_BYTES + 1)
        if len(content) > LARGEST_BYTES:
            raise SiteError(f"more than {LARGEST_BYTES} bytes; expected a few KiB that describe one hospital")
        return yaml.load(content.decode("utf-8"), Loader=_Once)
    except SiteError as error:
        raise SiteError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, OSError, RecursionError, OverflowError) as error:
        raise SiteError(f"{path} is not YAML in UTF-8: {error}") from error


def section(path: Path, prefix: str, content: Any, known: set[str], needed: set[str]) -> Mapping[str, Any]:
    """A mapping with known keys only and all needed ones."""
    if not isinstance(content, Mapping):
        raise SiteError(
            f"{path}: {prefix.rstrip('.') or 'the file'} is a {type(content).__name__}, expected a mapping of keys"
        )
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise SiteError(f"{path}: unknown key '{prefix}{key}'; did you mean '{prefix}{near}'?")
    for key in sorted(needed):
        if content.get(key) is None:
            raise SiteError(f"{path}: '{prefix}{key}' is missing; expected keys: {', '.join(sorted(known))}")
    return content


def typed(path: Path, key: str, value: Any, expected: type | tuple[type, ...]) -> Any:
    """A value of one type; True is no number."""
    wanted = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise SiteError(f"{path}: '{key}' is {value!r} ({type(value).__name__}), expected {names}")
    return value
