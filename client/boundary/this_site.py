"""Which hospital this process answers for."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context

from shared.config import parse_config
from shared.site import Site, read_site
from shared.site_file import SiteError


def simulated(context: Context) -> bool:
    """Whether this node stands for a synthetic hospital: it has a partition id and no site.yaml of its own."""
    return "site" not in context.node_config


def find_site(context: Context) -> Site:
    """The hospital of this node.

    A deployed node names its site.yaml in its own node config. A simulated node has a partition id instead and stands
    for the training hospital with that number below `simulation.hospitals`.
    """
    node = context.node_config
    if "site" in node:
        return read_site(Path(str(node["site"])))
    if "partition-id" not in node:
        raise SiteError(
            "this node has no 'site' in its node config; start it with --node-config 'site=\"/path/site.yaml\"'"
        )
    folder = Path(parse_config(context.run_config).simulation.hospitals).absolute()
    sites = [read_site(path) for path in sorted(folder.glob("*/site.yaml"))]
    training = [site for site in sites if site.role == "train"]
    number = int(node["partition-id"])
    if number >= len(training):
        raise SiteError(
            f"simulated node {number + 1}, but {folder} holds {len(training)} training hospitals; run 'make simulate' or "
            "'hemafed-sim sites' to write them, set simulation.hospitals to their absolute path, or start fewer nodes "
            f"(--federation-config 'num-supernodes={max(len(training), 1)}')"
        )
    return training[number]
