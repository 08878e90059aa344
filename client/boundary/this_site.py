"""The hospital and run config of the message being answered; each is read once per message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path

from flwr.app import Context

from shared.config import RunConfig, parse_config
from shared.site import Site, read_site
from shared.site_file import SiteError


class Node:
    """Hospital and run config of one message, read when they are first asked for.

    Args:
      context: Flower's.
      site: if it was read before.
    """

    def __init__(self, context: Context, site: Site | None = None):
        self._context = context
        self._site = site

    @property
    def simulated(self) -> bool:
        """Whether this node simulates a hospital: it has a partition id and no site.yaml of its own."""
        return "site" not in self._context.node_config

    @cached_property
    def site(self) -> Site:
        """The hospital.

        Raises:
          SiteError: its site.yaml cannot be used, or no hospital has this number.
        """
        return self._site or _find_site(self._context, self)

    @cached_property
    def config(self) -> RunConfig:
        """The run config.

        Raises:
          ConfigError: an unknown key or a wrong value.
        """
        return parse_config(self._context.run_config)


_NODE: ContextVar[Node | None] = ContextVar("node", default=None)


@contextmanager
def opened(context: Context, site: Site | None = None) -> Iterator[Node]:
    """Open the node of a message while it is answered; `this_node` returns it to the code inside."""
    node = _NODE.get() or Node(context, site)
    token = _NODE.set(node)
    try:
        yield node
    finally:
        _NODE.reset(token)


def this_node() -> Node:
    """The node whose message is being answered."""
    node = _NODE.get()
    if node is None:
        raise RuntimeError("no message is being answered")
    return node


def _find_site(context: Context, node: Node) -> Site:
    """The hospital of this node.

    A deployed node names its site.yaml in its own node config. A simulated node has a partition id instead and acts
    for the training hospital with that number below `simulation.hospitals`.
    """
    place = context.node_config
    if "site" in place:
        return read_site(Path(str(place["site"])))
    if "partition-id" not in place:
        raise SiteError(
            "this node has no 'site' in its node config; start it with --node-config 'site=\"/path/site.yaml\"'"
        )
    folder = Path(node.config.simulation.hospitals).absolute()
    sites = [read_site(path) for path in sorted(folder.glob("*/site.yaml"))]
    training = [site for site in sites if site.role == "train"]
    number = int(place["partition-id"])
    if number >= len(training):
        raise SiteError(
            f"simulated node {number + 1}, but {folder} holds {len(training)} training hospitals; run 'make simulate' or "
            "'hemafed-sim sites' to write them, set simulation.hospitals to their absolute path, or start fewer nodes "
            f"(--federation-config 'num-supernodes={max(len(training), 1)}')"
        )
    return training[number]
