"""Status of the centre in words: its hospitals, its run, whom it waits for, its last error."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from server.centre.config import CONNECTION, Centre, CentreError, expiry_warnings
from server.centre.flower_commands import flwr
from server.centre.registry import read_nodes, read_sites
from server.centre.run_request import TERMINAL, RunRequest, is_running, read_request, read_trouble
from server.storage.lines import RoundLine
from server.storage.run_folder import read_rounds, read_status
from shared.host.systemd import unit_text

FOLLOW_S = 1.0
LEAST_FREE_GB = 2.0


def online(centre: Centre) -> dict[str, dict]:
    """Site -> what Flower says of its node; empty if the centre is not running."""
    if not is_running(centre):
        return {}
    with suppress(CentreError):  # it may be starting
        nodes = {str(node["node-id"]): node for node in flwr(centre, "supernode", "ls", CONNECTION)["nodes"]}
        return {site: nodes[number] for site, number in read_nodes(centre).items() if number in nodes}
    return {}


def sites_table(centre: Centre) -> Table:
    """List registered hospitals, their keys, and which are online."""
    nodes = online(centre)
    table = Table(box=SIMPLE_HEAD)
    for name in ("site", "status", "since", "online", "key"):
        table.add_column(name, no_wrap=name != "key")
    for name, site in sorted(read_sites(centre).items()):
        node = nodes.get(name, {})
        table.add_row(name, site.status, site.since, _online_text(node), site.fingerprint)
    return table


def _online_text(node: dict) -> str:
    """Whether a node is online, and since when; or when it was last."""
    if node.get("status") == "online":
        return f"since {node['online-at']}"
    known = node.get("offline-at", "N/A") != "N/A"  # since the centre started
    return f"no, last seen {node['offline-at']}" if known else "no"


def status_lines(centre: Centre) -> Iterator[str]:
    """The whole state, a sentence a line."""
    running = is_running(centre)
    yield f"centre {centre.host}:{centre.port} is {'running' if running else 'not running'} ({centre.folder})"
    if running and (trouble := read_trouble(centre)):
        yield f"  it serves nobody: {trouble}"
    yield from expiry_warnings(centre)
    free_gb = shutil.disk_usage(centre.folder).free / 1e9
    if free_gb < LEAST_FREE_GB:
        yield f"the disk of {centre.folder} has {free_gb:.1f} GB left: make room, a run waits where it cannot be stored"
    sites = read_sites(centre)
    nodes = online(centre)
    here = sorted(name for name, node in nodes.items() if node.get("status") == "online")
    registered = sorted(name for name, site in sites.items() if site.status == "registered")
    if running:
        yield f"hospitals online: {', '.join(here) or 'none'} (of {len(registered)} registered)"
    request = read_request(centre)
    if request is None:
        yield "no run yet; 'hemafed-server run' starts one"
        return
    yield from run_lines(centre, request)


def run_lines(centre: Centre, request: RunRequest) -> Iterator[str]:
    """Status of a run."""
    run = centre.runs / request.name
    status, rounds = read_status(run), read_rounds(run)
    told = f"run {request.name}: {request.status}"
    if rounds:
        told += f", {rounds[-1].round} rounds done, the last {_ago(rounds[-1].time)}"
    if request.attempts > 1:
        told += f", started {request.attempts} times"
    yield told + (f"; {request.error}" if request.error else "")
    if request.status not in TERMINAL and status.state:
        doing = {"waiting": "waiting for"}.get(status.state, status.state)
        yield f"  {doing} {status.what} {_ago(status.time)}".rstrip()
        if status.sites:
            yield f"  not answered yet: {', '.join(status.sites)}"
    for site, (number, reason) in sorted(last_refusals(rounds).items()):
        yield f"  last error of {site}, round {number}: {reason}"


def last_refusals(rounds: list[RoundLine]) -> dict[str, tuple[int, str]]:
    """Site -> round and reason of its last error that no good update followed."""
    last = {}
    for line in rounds:
        for site in line.sites:
            last.pop(site, None)
        last |= {site: (line.round, why) for site, why in line.refused.items()}
    return last


def _ago(moment: float) -> str:
    """Return how long ago a time was."""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def follow_run(centre: Centre, name: str, say: Callable[[str], None]) -> RunRequest:
    """Report a run's rounds and waits as they come, until it ends; return its final status."""
    shown, state = 0, ""
    while True:
        rounds = read_rounds(centre.runs / name)
        for line in rounds[shown:]:
            refused = "".join(f"; {site}: {why}" for site, why in line.refused.items())
            say(f"round {line.round}: {', '.join(sorted(line.sites))} in {line.seconds:.1f} s{refused}")
        shown = len(rounds)
        status = read_status(centre.runs / name)
        now = f"{status.state} {status.what}"
        if status.state and now != state:
            state = now
            if status.state == "waiting":
                say(f"waiting for {status.what}")
        request = read_request(centre)
        if request is None or request.name != name or request.status in TERMINAL:
            return request
        time.sleep(FOLLOW_S)


def write_unit(centre: Centre) -> Path:
    """A systemd unit for the centre, in its folder."""
    path = centre.folder / "hemafed-server.service"
    path.write_text(
        unit_text(
            "hemafed coordinating centre",
            ["hemafed-server", "start", str(centre.folder)],
            user="hemafed",
            stop_s=90,
            extra=f"# A user of its own: useradd --system hemafed && chown -R hemafed {shlex.quote(str(centre.folder))}\n"
            "AmbientCapabilities=CAP_NET_BIND_SERVICE\n",
        )
    )
    return path
