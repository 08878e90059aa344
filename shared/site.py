"""site.yaml: what a hospital says about itself, its data and its own policy.

The file belongs to the hospital; no run config and no message changes it. Paths are absolute or relative to the
file. Unknown keys and wrong types are errors, because a misspelt policy would be no policy.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.config import NAME_WORDS, is_name
from shared.rules import Policy, read_policy
from shared.site_file import SiteError, read_yaml, section, typed

ROLES = ("train", "held-out", "development")


@dataclass(frozen=True)
class Site:
    """One hospital.

    Attributes:
      name: public name; it is in every message.
      role: train takes part in training; held-out is tested on, all of it; development may be used by the server
        to fit and choose, never to report.
      images, masks, labels: DICOM folder, mask folder and label table; masks and labels may be None.
      segments: which segments of the masks are the hematoma: labels, codes as "SCT:35566002", or numbers; () where each
        mask holds one.
      accept_lossy: whether lossy compressed images are taken, and marked.
      cache: slice cache, written by ingest, safe to delete.
      state: keys and local heads; not safe to delete while a run goes on.
      policy: what may leave.
    """

    name: str
    role: str
    images: Path
    masks: Path | None
    labels: Path | None
    cache: Path
    state: Path
    segments: tuple[str | int, ...] = ()
    accept_lossy: bool = False
    policy: Policy = field(default_factory=Policy)

    def key(self) -> bytes:
        """The hospital's secret of 32 bytes, made at first use; patients' hashes depend on it. Never leaves."""
        path = self.state / "key"
        if not path.is_file():
            self.state.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.touch(mode=0o600)
            partial.write_bytes(secrets.token_bytes(32))
            try:
                os.link(partial, path)  # fails if another process was first, and then its key counts
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        key = path.read_bytes()
        if len(key) != 32:
            raise SiteError(f"site {self.name!r}: {path} has {len(key)} bytes, expected 32; restore it from a backup")
        return key


def read_site(path: Path) -> Site:
    """Read and check a site.yaml.

    Args:
      path: the YAML file.
    Raises:
      SiteError: no such file, not YAML, an unknown or missing key, a wrong value, or a folder that does not exist.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise SiteError(f"no site file {path}; expected a YAML file that describes one hospital (see client/README.md)")
    content = read_yaml(path)
    if isinstance(content, Mapping) and "weight" in content:  # until 0.2 a hospital asked for one
        raise SiteError(f"{path}: 'weight' is no key any more; remove its line: the centre gives the weights")
    top = section(path, "", content, {"site", "data", "cache", "state", "role", "policy"}, {"site", "data"})
    data = section(path, "data.", top["data"], {"images", "masks", "labels", "segment", "accept_lossy"}, {"images"})

    def place(key: str, value: Any) -> Path:
        return (path.parent / typed(path, key, value, str)).resolve()

    site = Site(
        name=_name(path, top["site"]),
        role=typed(path, "role", top.get("role", "train"), str),
        images=place("data.images", data["images"]),
        masks=None if data.get("masks") is None else place("data.masks", data["masks"]),
        labels=None if data.get("labels") is None else place("data.labels", data["labels"]),
        cache=place("cache", top.get("cache", "cache")),
        state=place("state", top.get("state", "state")),
        segments=_segments(path, data.get("segment")),
        accept_lossy=typed(path, "data.accept_lossy", data.get("accept_lossy", False), bool),
        policy=read_policy(path, top.get("policy")),
    )
    if site.role not in ROLES:
        raise SiteError(f"{path}: role is {site.role!r}, expected one of {', '.join(ROLES)}")
    for kept in (path, site.images, site.masks, site.labels, site.state):
        if kept is not None and kept.is_relative_to(site.cache):
            raise SiteError(
                f"{path}: cache is {site.cache}, which holds {kept.name}; ingest deletes it: name a folder of its own"
            )
    for key, folder in (("data.images", site.images), ("data.masks", site.masks)):
        if folder is not None and not folder.is_dir():
            raise SiteError(f"{path}: {key} is {folder}, and there is no such folder; correct the path or mount it")
    if site.labels is not None and not site.labels.is_file():
        raise SiteError(f"{path}: data.labels is {site.labels}, and there is no such file; correct the path")
    return site


def _name(path: Path, value: Any) -> str:
    """Check a site's public name: it appears in messages, tables and file names."""
    name = typed(path, "site", value, str)
    if not is_name(name):
        raise SiteError(f"{path}: site is {name!r}, expected {NAME_WORDS}")
    return name


def _segments(path: Path, value: Any) -> tuple[str | int, ...]:
    """The segments that are the hematoma: one or a list."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(typed(path, "data.segment", one, (str, int)) for one in values)
