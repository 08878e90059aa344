"""site.yaml as YAML: a mapping of known keys, each of its type; every fault names the key and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SiteError(ValueError):
    """A site.yaml cannot be used; names the key, the value and what was expected."""


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
