"""Track which hospitals answered, were refused or are late."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from server.federation.exchange import Late, PendingReply, content_or_raise, send_and_receive
from server.federation.plausible import check_counts
from server.federation.weights import site_weights
from server.storage.run_folder import write_status
from shared.config import FederationSettings, is_name
from shared.errors import HemafedError
from shared.groups import TENSOR_GROUPS
from shared.site import ROLES
from shared.wire.foreign import LONGEST_NAME, shown
from shared.wire.records import PROTOCOL_VERSION, UpdateError, read_metrics, typed_record

log = logging.getLogger("hemafed.server")

SILENT_S = 600.0  # a hello that is not answered for so long was lost
HELLO_TIMEOUT_S = 60.0
WORD_S = 60.0  # between log lines about the same wait


class QuorumError(HemafedError, RuntimeError):
    """Too few hospitals for a round; names who is missing or refused, and why."""


@dataclass(frozen=True)
class Participant:
    """A hospital that answered 'hello'.

    Attributes:
      node_id: its Flower node.
      site, role: as it says of itself; public.
      release: tensor groups that its policy lets out.
      counts: patients, slices and positives, as far as its policy lets them out.
      weight: in the mean of a round; the centre gives it.
    """

    node_id: int
    site: str
    role: str
    release: frozenset[str]
    counts: dict[str, int]
    weight: float = 1.0


@dataclass
class Roster:
    """Nodes that are known, that were refused, with name and reason, and that are busy with an earlier round; grows as nodes come.

    With a codec `holders` are the hospitals that hold the tensors to which the next round's difference is.
    """

    members: dict[str, Participant] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    silent: dict[int, Late] = field(default_factory=dict)
    late: dict[str, Late] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)

    def training(self, online: set[int]) -> list[Participant]:
        """Members that train, are free and whose node is connected, in order of their names."""
        free = [m for _, m in sorted(self.members.items()) if m.site not in self.late]
        return [m for m in free if m.role == "train" and m.node_id in online]

    def turned_away(self) -> dict[str, str]:
        """Site, or node where it is registered as none -> why its answer to 'hello' was not taken."""
        return {name: why for name, _, why in (text.partition(": ") for text in self.refused.values())}

    def fetch_late(self) -> None:
        """Free the hospitals whose late answers have come; a node asked meanwhile would be late again with the next."""
        for site, late in list(self.late.items()):
            reply, over = late.fetch()
            if over:
                del self.late[site]
                ago = time.monotonic() - late.since
                what = f"answered {ago:.0f} s after the deadline" if reply else f"gave no answer for {ago:.0f} s"
                log.warning(f"{site} {what}; it is asked again")


@dataclass(frozen=True)
class RunContext:
    """One run's federation.

    Attributes:
      grid: Flower's way to the nodes.
      settings: the run config's federation section.
      run: the run's folder, where its status is written.
      roster: who is known; changes.
      longest: length of an update beyond which it is refused.
      registered: node -> the site that the centre registered it as; of none in a simulation, whose nodes have no keys.
    """

    grid: Grid
    settings: FederationSettings
    run: Path
    longest: float
    roster: Roster = field(default_factory=Roster)
    registered: Callable[[], Mapping[int, str]] = dict


def greet(session: RunContext) -> None:
    """Ask every node that is not yet known who it is; the roster learns the answers and the log the refusals.

    A node that does not answer in time is not waited for again, which would cost each round a minute; its answer is fetched
    when it has come.
    """
    grid, roster, registered = session.grid, session.roster, session.registered()
    for node_id, late in list(roster.silent.items()):
        reply, over = late.fetch()
        if over:
            del roster.silent[node_id]
        if reply is not None:
            _welcome(session, node_id, reply, registered)
    known = {m.node_id for m in roster.members.values()}
    new = [n for n in grid.get_node_ids() if n not in known and n not in roster.refused and n not in roster.silent]
    messages = {str(n): Message(RecordDict(), dst_node_id=n, message_type="query.hello") for n in new}
    missed: dict[str, PendingReply] = {}
    for name, reply in send_and_receive(grid, messages, HELLO_TIMEOUT_S, missed):
        node_id = int(name)
        if reply is not None:
            _welcome(session, node_id, reply, registered)
            continue
        who = registered.get(node_id, f"node {node_id}")
        log.warning(f"{who} did not answer 'hello' within {HELLO_TIMEOUT_S:g} s and is left out until it does")
        if name in missed:
            now = time.monotonic()
            roster.silent[node_id] = Late(missed[name], now, now + SILENT_S)


def _welcome(session: RunContext, node_id: int, reply: Message, registered: Mapping[int, str]) -> None:
    """Put who answered 'hello' into the roster, among the members or the refused."""
    roster = session.roster
    try:
        member = _read_hello(node_id, reply)
        if registered and registered.get(node_id) != member.site:
            raise UpdateError(
                f"says that it is site {member.site!r}, and is registered as {registered.get(node_id, 'none')!r}; 'site' in its "
                "site.yaml must be the name that was invited"
            )
        other = roster.members.get(member.site)
        if other is not None and other.node_id in set(session.grid.get_node_ids()):
            raise UpdateError(f"a second node says that it is site {member.site!r}; expected one node per site")
    except UpdateError as error:
        roster.refused[node_id] = f"{registered.get(node_id, f'node {node_id}')}: {error}"
        log.warning(f"left out: {roster.refused[node_id]}")
        return
    roster.members[member.site] = member


def _read_hello(node_id: int, reply: Message) -> Participant:
    """The answer to 'hello', checked."""
    facts = typed_record(content_or_raise(reply, HELLO_TIMEOUT_S), "facts", ConfigRecord)
    site, role, release = (facts.get(name) for name in ("site", "role", "release"))
    if facts.get("protocol") != PROTOCOL_VERSION:
        raise UpdateError(
            f"protocol {shown(facts.get('protocol'), LONGEST_NAME)}, expected {PROTOCOL_VERSION}; install the same version"
        )
    if not is_name(site) or role not in ROLES or not isinstance(release, str):
        raise UpdateError("an answer to 'hello' without a proper site name, role and released groups")
    groups = frozenset(filter(None, release.split(",")))
    if not groups <= set(TENSOR_GROUPS):
        raise UpdateError(f"site {site!r} releases {shown(release, LONGEST_NAME)}, expected some of {TENSOR_GROUPS}")
    return Participant(node_id, site, role, groups, check_counts(read_metrics(reply.content)))


def _weighed(members: list[Participant], by: str) -> list[Participant]:
    """The same members with their weights."""
    weights = site_weights({member.site: member.counts.get("patients") for member in members}, by)
    return [replace(member, weight=weights[member.site]) for member in members]


def wait_for_quorum(session: RunContext, lacks: Callable[[Participant], str] = lambda member: "") -> list[Participant]:
    """The training hospitals that are connected and free, waiting up to wait_s for a quorum of them.

    Meanwhile the log and the run's status show which hospitals are present.

    Args:
      session: the run's.
      lacks: returns why a hospital does not count towards the quorum, though it takes part; empty if it does.
    Raises:
      QuorumError: fewer than federation.quorum.
    """
    grid, roster, settings = session.grid, session.roster, session.settings
    began = told = time.monotonic()
    roster.refused.clear()  # who was turned away may have fixed the cause since the last round
    while True:
        greet(session)
        roster.fetch_late()
        ready = roster.training(set(grid.get_node_ids()))
        lacking = {m.site: why for m in ready if (why := lacks(m))}
        if len(ready) - len(lacking) >= settings.quorum:
            return _weighed(ready, settings.weights)
        here = ", ".join(m.site + " (not counted)" * (m.site in lacking) for m in ready) or "none"
        busy = f"; busy with an earlier round: {', '.join(sorted(roster.late))}" if roster.late else ""
        what = f"{settings.quorum} hospitals (federation.quorum), {len(ready)} are there: {here}{busy}"
        now = time.monotonic()
        if now >= began + settings.wait_s:
            break
        if told == began or now - told > WORD_S:
            told = now
            write_status(session.run, "waiting", what=what)
            log.info(f"waiting for {what}")
        time.sleep(1.0)
    told = [*roster.refused.values(), *(f"{site}: {why}" for site, why in lacking.items())]
    reasons = "".join(f"\n  {why}" for why in told)
    raise QuorumError(
        f"{len(ready)} training hospitals are connected ({here}), federation.quorum is {settings.quorum}, and nobody came for "
        f"{settings.wait_s:g} s (federation.wait_s); start more, or lower federation.quorum{busy}{reasons}"
    )
