"""Round policy: whom to ask, how long to wait, what to refuse, when to stop.

The server optimisers are Flower's own strategies. Around them stands what they lack: replies are checked and folded in
one by one in the order of site names (so one reply is in memory, and the sum does not depend on who came first), a bad
reply is refused by the name of its site, and a round below quorum waits and is asked for again instead of going on silently.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx

from server.aggregate import WeightedSum, fold, mean
from server.robust import combine, is_plain, update_norm
from server.runs import write_status
from shared.config import FederationSettings
from shared.metrics import Tally
from shared.site import is_site_name
from shared.wire import (
    PROTOCOL_VERSION,
    Tensors,
    UpdateError,
    from_record,
    part_of,
    read_metrics,
    shapes_of,
    tally_from_record,
    to_record,
)

POLL_S = 0.2
HELLO_TIMEOUT_S = 60.0
WORD_S = 60.0  # between two words about the same wait
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0
LATE_DEADLINES = 4  # after so many deadlines a hospital is asked again though its answer never came


class QuorumError(RuntimeError):
    """Too few hospitals for a round; names who is missing or refused, and why."""


@dataclass(frozen=True)
class Member:
    """A hospital that answered 'hello'.

    Attributes:
      node_id: its Flower node.
      site, role, weight: as it says of itself; public.
      counts: patients, slices and positives, as far as its policy lets them out.
    """

    node_id: int
    site: str
    role: str
    weight: float
    counts: dict[str, int]


@dataclass(frozen=True)
class Late:
    """An answer that did not come by its round's deadline.

    Attributes:
      message_id: Flower's, by which it can still be fetched.
      since, until: when the deadline was, and when it is given up; monotonic seconds.
    """

    message_id: str
    since: float
    until: float


@dataclass
class Roster:
    """Who is known, who was turned away and why, and who is still busy with an earlier round; grows as nodes come."""

    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    late: dict[str, Late] = field(default_factory=dict)

    def training(self, online: set[int]) -> list[Member]:
        """Members that train, are free and whose node is connected, in order of their names."""
        free = [m for _, m in sorted(self.members.items()) if m.site not in self.late]
        return [m for m in free if m.role == "train" and m.node_id in online]

    def fetch_late(self, grid: Grid) -> None:
        """Free the hospitals whose late answers have come; a node asked meanwhile would be late again with the next."""
        for site, late in list(self.late.items()):
            came = next(iter(grid.pull_messages([late.message_id])), None) is not None
            if came or time.monotonic() >= late.until:
                del self.late[site]
                ago = time.monotonic() - late.since
                what = f"answered {ago:.0f} s after the deadline" if came else f"gave no answer for {ago:.0f} s"
                print(f"  {site} {what}; it is asked again", flush=True)


@dataclass(frozen=True)
class Session:
    """One run's federation.

    Attributes:
      grid: Flower's way to the nodes.
      settings: the run config's federation section.
      run: the run's folder, where it is said how it stands.
      roster: who is known; changes.
    """

    grid: Grid
    settings: FederationSettings
    run: Path
    roster: Roster = field(default_factory=Roster)


@dataclass(frozen=True)
class SiteRound:
    """What one site sent in a round.

    Attributes:
      weight: of its update.
      bytes_up: size of its tensors and counts.
      norm: length of its update.
      metrics: loss sums, steps, seconds; empty if withheld.
      tally: counts of validation scores of the global encoder that the round began with; None if withheld.
      audit: newest hash of the site's audit log, before it sent this; kept so that the site cannot shorten its log.
    """

    weight: float
    bytes_up: int
    norm: float
    metrics: dict[str, float]
    tally: Tally | None
    audit: str = ""


@dataclass(frozen=True)
class RoundResult:
    """One round.

    Attributes:
      arrays: the new global tensors.
      sites: per site that was folded in.
      refused: site -> why its reply was not used.
      shrunk: site -> what its update was multiplied by, where federation.norm_bound shortened it.
      bytes_down: size of the tensors sent to each site.
      seconds: wall clock.
    """

    arrays: dict
    sites: dict[str, SiteRound]
    refused: dict[str, str]
    shrunk: dict[str, float]
    bytes_down: int
    seconds: float


def build_strategy(settings: FederationSettings) -> FedAvg:
    """Flower's strategy of the run config; it sees the mean of a round as its only reply."""
    common = {
        "weighted_by_key": "weight",
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "train_metrics_aggr_fn": lambda _contents, _key: MetricRecord(),
    }
    if settings.strategy == "fedprox":
        return FedProx(**common, proximal_mu=settings.proximal_mu)
    if settings.strategy == "fedavgm":
        return FedAvgM(
            **common, server_learning_rate=settings.server_learning_rate, server_momentum=settings.server_momentum
        )
    if settings.strategy == "fedadam":
        return FedAdam(**common, eta=settings.server_learning_rate, beta_1=settings.server_momentum)
    return FedAvg(**common)


def greet(grid: Grid, roster: Roster) -> None:
    """Ask every node that is not yet known who it is; the roster learns the answers and the log the refusals."""
    known = {m.node_id for m in roster.members.values()}
    new = [n for n in grid.get_node_ids() if n not in known and n not in roster.refused and n not in roster.silent]
    messages = {str(n): Message(RecordDict(), dst_node_id=n, message_type="query.hello") for n in new}
    for name, reply in receive(grid, messages, HELLO_TIMEOUT_S):
        node_id = int(name)
        if reply is None:
            roster.silent.add(node_id)  # not waited for again: each time would cost the round a minute
            print(f"  node {node_id} did not answer 'hello' within {HELLO_TIMEOUT_S:g} s and is left out", flush=True)
            continue
        try:
            member = _read_hello(node_id, reply)
            other = roster.members.get(member.site)
            if other is not None and other.node_id in set(grid.get_node_ids()):
                raise UpdateError(f"a second node says that it is site {member.site!r}; expected one node per site")
        except UpdateError as error:
            roster.refused[node_id] = str(error)
            print(f"  node {node_id} is left out: {error}", flush=True)
            continue
        roster.members[member.site] = member


def _read_hello(node_id: int, reply: Message) -> Member:
    """The answer to 'hello', checked."""
    facts = part_of(content_of(reply, HELLO_TIMEOUT_S), "facts", ConfigRecord)
    site, role, weight = facts.get("site"), facts.get("role"), facts.get("weight")
    if facts.get("protocol") != PROTOCOL_VERSION:
        raise UpdateError(f"protocol {facts.get('protocol')!r}, expected {PROTOCOL_VERSION}; install the same version")
    if not is_site_name(site) or not isinstance(role, str) or not isinstance(weight, float):
        raise UpdateError("an answer to 'hello' without a proper site name, role and weight")
    if not 0 < weight <= 1e6:
        raise UpdateError(f"site {site!r} asks for weight {weight!r}, expected more than 0 and at most 1e6")
    counts = {key: int(value) for key, value in read_metrics(reply.content).items()}
    return Member(node_id, site, role, weight, counts)


def gather(session: Session) -> list[Member]:
    """The training hospitals that are connected and free, waiting up to wait_s for a quorum of them.

    Whoever looks at the run meanwhile is told who is there, in the log and in the run's status.

    Raises:
      QuorumError: fewer than federation.quorum.
    """
    grid, roster, settings = session.grid, session.roster, session.settings
    began = told = time.monotonic()
    roster.refused.clear()  # who was turned away may have mended the cause since the last round
    while True:
        greet(grid, roster)
        roster.fetch_late(grid)
        ready = roster.training(set(grid.get_node_ids()))
        if len(ready) >= settings.quorum:
            return ready
        here = ", ".join(m.site for m in ready) or "none"
        busy = f"; busy with an earlier round: {', '.join(sorted(roster.late))}" if roster.late else ""
        what = f"{settings.quorum} hospitals (federation.quorum), {len(ready)} are there: {here}{busy}"
        now = time.monotonic()
        if now >= began + settings.wait_s:
            break
        if told == began or now - told > WORD_S:
            told = now
            write_status(session.run, "waiting", what=what)
            print(f"waiting for {what}", flush=True)
        time.sleep(1.0)
    reasons = "".join(f"\n  node {node}: {why}" for node, why in roster.refused.items())
    raise QuorumError(
        f"{len(ready)} training hospitals are connected ({here}), federation.quorum is {settings.quorum}, and nobody came for "
        f"{settings.wait_s:g} s (federation.wait_s); start more, or lower federation.quorum{busy}{reasons}"
    )


def repeat_round(session: Session, strategy: FedAvg, arrays: Tensors, number: int) -> RoundResult:
    """One round, asked for again while too few good updates come, up to wait_s after the first attempt.

    Nothing of an attempt below quorum is used.

    Raises:
      QuorumError: too few hospitals, or too few good updates, for wait_s.
    """
    began, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        members = gather(session)
        try:
            return train_round(session, strategy, members, arrays, number)
        except QuorumError as error:
            if time.monotonic() + pause_s >= began + session.settings.wait_s:
                raise
            print(f"{error}\n  round {number} is asked for again in {pause_s:g} s", flush=True)
            write_status(session.run, "waiting", what=f"another attempt at round {number}: {error}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def receive(
    grid: Grid,
    messages: Mapping[str, Message],
    timeout_s: float,
    missed: dict[str, str] | None = None,
    awaiting: Callable[[str], None] = lambda name: None,
) -> Iterator[tuple[str, Message | None]]:
    """Send messages, and yield the replies in order of the names, one at a time.

    A reply that came early waits in Flower's SuperLink until it is its turn. After the deadline, what has arrived is
    still taken.

    Args:
      grid: Flower's.
      messages: name -> message.
      timeout_s: until the deadline.
      missed: given the ids of messages that were not answered in time.
      awaiting: told whose turn it is.

    Yields:
      Name and reply; None for a reply that did not come in time.
    """
    ids = {name: next(iter(grid.push_messages([messages[name]])), None) for name in sorted(messages)}
    end = time.monotonic() + timeout_s
    for name, message_id in ids.items():
        reply = None
        awaiting(name)
        while message_id is not None:
            reply = next(iter(grid.pull_messages([message_id])), None)
            if reply is not None or time.monotonic() >= end:
                break
            time.sleep(POLL_S)
        if reply is None and message_id is not None and missed is not None:
            missed[name] = message_id
        yield name, reply


def content_of(reply: Message | None, timeout_s: float) -> RecordDict:
    """What a reply holds.

    Raises:
      UpdateError: it did not come, or it is an error; with its reason.
    """
    if reply is None:
        raise UpdateError(f"no reply within {timeout_s:g} s (federation.round_deadline_s)")
    if reply.has_error():
        raise UpdateError(reply.error.reason)
    return reply.content


def train_round(
    session: Session, strategy: FedAvg, members: list[Member], arrays: Tensors, round_number: int
) -> RoundResult:
    """One round: send the global tensors, check and fold in the replies, take the server's step.

    Raises:
      QuorumError: fewer good replies than federation.quorum.
    """
    grid, settings = session.grid, session.settings
    started = time.perf_counter()
    record = to_record(arrays)
    asked = {m.node_id: m for m in members}
    order = ConfigRecord({"run": session.run.name})
    # Flower's strategy adds its own keys (proximal-mu) and remembers the tensors that it sends.
    with _quiet_flower():
        prepared = list(strategy.configure_train(round_number, record, order, grid))
    messages = {asked[m.metadata.dst_node_id].site: m for m in prepared if m.metadata.dst_node_id in asked}
    weights = {m.site: m.weight for m in members}
    expected = shapes_of(arrays)

    def awaiting(name: str) -> None:
        write_status(session.run, "running", what=f"round {round_number} of {settings.rounds}", sites=[name])

    plain = is_plain(settings)
    total, held, sites, refused, missed = WeightedSum({}), {}, {}, {}, {}
    for name, reply in receive(grid, messages, settings.round_deadline_s, missed, awaiting):
        try:
            content = _content_from(reply, name, settings)
            update = from_record(part_of(content, "update", ArrayRecord), expected)
            sites[name] = _site_round(content, weights[name], update_norm(update, arrays))
        except UpdateError as error:
            refused[name] = str(error)
            continue
        if plain:  # one update in memory at a time
            total = fold(total, update, weights[name])
        else:
            held[name] = update
    now = time.monotonic()
    session.roster.late |= {
        n: Late(id_, now, now + LATE_DEADLINES * settings.round_deadline_s) for n, id_ in missed.items()
    }
    for member in members:
        if member.site not in messages:
            refused[member.site] = "its node went offline before the round began"
    if len(sites) < settings.quorum:
        reasons = "".join(f"\n  site {name!r}: {why}" for name, why in sorted(refused.items()))
        raise QuorumError(
            f"round {round_number}: {len(sites)} good updates, federation.quorum is {settings.quorum}; the last checkpoint is that "
            f"of round {round_number - 1}{reasons}"
        )
    if plain:
        average, shrunk = mean(total), {}
    else:
        with _quiet_flower():
            combined = combine(held, weights, arrays, settings)
        average, shrunk = combined.arrays, combined.shrunk
    return RoundResult(
        arrays=server_step(strategy, round_number, arrays, average),
        sites=sites,
        refused=refused,
        shrunk=shrunk,
        bytes_down=record_bytes(record),
        seconds=time.perf_counter() - started,
    )


def _content_from(reply: Message | None, name: str, settings: FederationSettings) -> RecordDict:
    """What a site's reply to a round holds, if it is the site's."""
    content = content_of(reply, settings.round_deadline_s)
    said = part_of(content, "facts", ConfigRecord).get("site")
    if said != name:
        raise UpdateError(f"the reply says that it is from site {said!r}")
    return content


def _site_round(content: RecordDict, weight: float, norm: float) -> SiteRound:
    """What a site's reply says beside its update, checked."""
    tally = tally_from_record(part_of(content, "tally", ArrayRecord), 0) if "tally" in content else None
    sent = sum(record_bytes(content[key]) for key in ("update", "tally") if key in content)
    audit = str(content["facts"].get("audit", ""))[:64]
    return SiteRound(weight, sent, norm, read_metrics(content), tally, audit)


def server_step(strategy: FedAvg, round_number: int, arrays: Tensors, average: Tensors) -> dict:
    """Flower's strategy applied to the mean of a round; float32 whatever it computes in.

    Args:
      strategy: keeps its own state from round to round.
      round_number: from 1.
      arrays: the global tensors that the round began with.
      average: mean of the sites' tensors.
    """
    if isinstance(strategy, FedAdam):
        strategy.current_arrays = dict(arrays)
    elif isinstance(strategy, FedAvgM):
        strategy.current_arrays = to_record(arrays)
    content = RecordDict({"arrays": to_record(average), "metrics": MetricRecord({"weight": 1.0})})
    reply = Message(content, dst_node_id=0, message_type="train")
    with _quiet_flower():
        stepped, _ = strategy.aggregate_train(round_number, [reply])
    new = {name: array.numpy().astype("float32") for name, array in stepped.items()}
    # Running statistics are averaged, never stepped: a server optimiser could make a variance negative.
    new |= {name: value for name, value in average.items() if ".running_" in name}
    return from_record(to_record(new), shapes_of(arrays))


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Keep Flower's strategy from logging that it received one result: that one is the mean of the round."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def record_bytes(record: ArrayRecord) -> int:
    """Size of a record's arrays as they travel."""
    return sum(len(array.data) for array in record.values())
