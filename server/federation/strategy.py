"""Round policy: whom to ask, how long to wait, what to refuse, when to stop.

Replies are checked and folded in one by one in the order of site names (so one reply is in memory, and the sum does not
depend on who came first), a bad reply is refused by the name of its site, and a round below quorum waits and is asked for
again instead of going on silently.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from server.federation.aggregate import WeightedSum, fold, mean
from server.federation.exchange import Late, content_or_raise, send_and_receive
from server.federation.plausible import check_metrics, check_tally
from server.federation.robust import combine, is_plain, update_norm
from server.federation.roster import Participant, QuorumError, RunContext, wait_for_quorum
from server.federation.server_step import server_step
from server.storage.checkpoint import Moments
from server.storage.run_folder import write_status
from shared.config import FederationSettings
from shared.metrics import Tally
from shared.wire.codecs import PLAIN, encode, minus, plus
from shared.wire.foreign import LONGEST_NAME, shown
from shared.wire.records import (
    Tensors,
    UpdateError,
    coded_record,
    from_coded_record,
    from_record,
    read_metrics,
    shapes_of,
    tally_from_record,
    tested_hash,
    to_record,
    typed_record,
)

log = logging.getLogger("hemafed.server")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 600.0
LATE_DEADLINES = 4  # after so many deadlines a hospital is asked again though its answer never came


@dataclass(frozen=True)
class SiteRound:
    """Reply of one site in a round.

    Attributes:
      weight: of its update.
      bytes_up: size of its tensors and counts.
      norm: length of its update.
      metrics: loss sums, steps, seconds; empty if withheld.
      tally: counts of validation scores of the global encoder that the round began with; None if withheld.
      audit: newest hash of the site's audit log, before it sent this; kept so that the site cannot shorten its log.
      withheld: why there are no metrics and no tally; empty if there are.
    """

    weight: float
    bytes_up: int
    norm: float
    metrics: dict[str, float]
    tally: Tally | None
    audit: str = ""
    withheld: str = ""


@dataclass(frozen=True)
class RoundResult:
    """One round.

    Attributes:
      arrays: the new global tensors.
      moments: what the server optimiser remembers for the next round.
      sites: per site that was folded in.
      refused: site -> why its reply was not used.
      shrunk: site -> what its update was multiplied by, where federation.norm_bound shortened it.
      bytes_down: size of the tensors sent to all sites.
      seconds: wall clock.
      moved: length of the step from the round's start to the updates' mean, or to what another rule made of them.
      held: the tensors that the round began with, at every hospital in `sites`; empty without a codec.
    """

    arrays: dict
    moments: Moments
    sites: dict[str, SiteRound]
    refused: dict[str, str]
    shrunk: dict[str, float]
    bytes_down: int
    seconds: float
    moved: float = 0.0
    held: Tensors = field(default_factory=dict)


def repeat_round(
    session: RunContext, moments: Moments, arrays: Tensors, number: int, held: Tensors = MappingProxyType({})
) -> RoundResult:
    """One round, asked for again while too few good updates come, up to wait_s after the first attempt.

    Nothing of an attempt below quorum is used.

    Raises:
      QuorumError: too few hospitals, or too few good updates, for wait_s.
    """
    began, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        members = wait_for_quorum(session)
        try:
            return run_round(session, moments, members, arrays, number, held)
        except QuorumError as error:
            if time.monotonic() + pause_s >= began + session.settings.wait_s:
                raise
            log.warning(f"{error}\n  round {number} is asked for again in {pause_s:g} s")
            write_status(session.run, "waiting", what=f"another attempt at round {number}: {error}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def run_round(
    session: RunContext,
    moments: Moments,
    members: list[Participant],
    arrays: Tensors,
    round_number: int,
    held: Tensors = MappingProxyType({}),
) -> RoundResult:
    """One round: send the global tensors, check and fold in the replies, take the server's step.

    Args:
      session: the run's.
      moments: of the server optimiser.
      members: who is asked.
      arrays: the global tensors.
      round_number: from 1.
      held: with a codec, the tensors that session.roster.holders hold.
    Raises:
      QuorumError: fewer good replies than federation.quorum.
    """
    grid, settings = session.grid, session.settings
    started = time.perf_counter()
    orders, start, model = _orders(session, members, arrays, round_number, held)
    online = set(grid.get_node_ids())
    messages = {
        m.site: Message(orders[m.site], dst_node_id=m.node_id, message_type="train")
        for m in members
        if m.node_id in online
    }
    weights = {m.site: m.weight for m in members}
    counts = {m.site: m.counts for m in members}

    def awaiting(name: str) -> None:
        write_status(session.run, "running", what=f"round {round_number} of {settings.rounds}", sites=[name])

    plain = is_plain(settings)
    total, updates, sites, refused, missed = WeightedSum({}), {}, {}, {}, {}
    for name, reply in send_and_receive(grid, messages, settings.round_deadline_s, missed, awaiting):
        try:
            content = _content_from(reply, name, settings)
            update = _read_update(typed_record(content, "update", ArrayRecord), start, settings.codec)
            norm = update_norm(update, start)
            if norm > session.longest:
                raise UpdateError(f"an update of length {norm:.3g}, expected at most {session.longest:.3g}")
            sites[name] = _site_round(content, weights[name], norm, counts[name], model)
        except UpdateError as error:
            refused[name] = str(error)
            continue
        if plain:  # one update in memory at a time
            total = fold(total, update, weights[name])
        else:
            updates[name] = update
    session.roster.holders -= refused.keys()
    now = time.monotonic()
    session.roster.late |= {
        n: Late(look, now, now + LATE_DEADLINES * settings.round_deadline_s) for n, look in missed.items()
    }
    for member in members:
        if member.site not in messages:
            refused[member.site] = "its node went offline before the round began"
    # Those turned away at 'hello' too: the centre's operator looks at rounds.
    refused |= {site: why for site, why in session.roster.turned_away().items() if site not in {*sites, *refused}}
    if len(sites) < settings.quorum:
        reasons = "".join(f"\n  site {name!r}: {why}" for name, why in sorted(refused.items()))
        raise QuorumError(
            f"round {round_number}: {len(sites)} good updates, federation.quorum is {settings.quorum}; the last checkpoint is that "
            f"of round {round_number - 1}{reasons}"
        )
    if plain:
        average, shrunk = mean(total), {}
    else:
        combined = combine(updates, weights, start, settings)
        average, shrunk = combined.arrays, combined.shrunk
    stepped, moments = server_step(settings, moments, round_number, start, average)
    coded = settings.codec != PLAIN
    if coded:  # what the difference lacked on its way down is not lost
        stepped = plus(stepped, minus(arrays, start))
    session.roster.holders = set(sites)
    return RoundResult(
        arrays=stepped,
        moments=moments,
        sites=sites,
        refused=refused,
        shrunk=shrunk,
        bytes_down=sum(record_bytes(message.content["arrays"]) for message in messages.values()),
        seconds=time.perf_counter() - started,
        moved=update_norm(average, start),
        held=start if coded else {},
    )


def _orders(
    session: RunContext, members: list[Participant], arrays: Tensors, round_number: int, held: Tensors
) -> tuple[dict[str, RecordDict], Tensors, str]:
    """Each member's order, the tensors with which all begin the round, and their hash.

    With a codec, who holds the tensors of the last round gets the difference to them, and everybody else whole tensors.
    """
    settings = session.settings
    keys = {"run": session.run.name, "server-round": round_number}
    if settings.strategy == "fedprox":
        keys["proximal-mu"] = settings.proximal_mu
    names = {member.site for member in members}
    start, holders = arrays, set()
    if settings.codec != PLAIN:
        coded = encode(arrays, held, settings.codec)
        start, holders = coded.received, names & session.roster.holders
    model, orders = tested_hash(start, []), {}
    if holders:
        told = {"held-round": round_number - 1, "model": model}
        difference = RecordDict({"arrays": coded_record(coded), "config": ConfigRecord(keys | told)})
        orders |= dict.fromkeys(holders, difference)
    if names - holders:
        whole = RecordDict({"arrays": to_record(start), "config": ConfigRecord(keys)})
        orders |= dict.fromkeys(names - holders, whole)
    return orders, start, model


def _read_update(record: ArrayRecord, start: Tensors, codec: str) -> Tensors:
    """A hospital's tensors at the end of a round.

    Raises:
      UpdateError: they do not fit.
    """
    return from_record(record, shapes_of(start)) if codec == PLAIN else from_coded_record(record, start, codec)


def _content_from(reply: Message | None, name: str, settings: FederationSettings) -> RecordDict:
    """Read a site's reply to a round, if it is the site's."""
    content = content_or_raise(reply, settings.round_deadline_s)
    said = typed_record(content, "facts", ConfigRecord).get("site")
    if said != name:
        raise UpdateError(f"the reply says that it is from site {shown(said, LONGEST_NAME)}")
    return content


def _site_round(content: RecordDict, weight: float, norm: float, counts: Mapping[str, int], model: str) -> SiteRound:
    """Read the numbers beside a site's update, compared with its counts at 'hello' and the model that it was sent."""
    tally = tally_from_record(typed_record(content, "tally", ArrayRecord), 0) if "tally" in content else None
    if not counts:  # withheld at 'hello'; a hospital that releases them since then still takes part
        tally = None
    if tally is not None:
        check_tally(tally, counts)
    metrics = read_metrics(content)
    check_metrics(metrics, counts)
    sent = sum(record_bytes(content[key]) for key in ("update", "tally") if key in content)
    audit = content["facts"].get("audit", "")
    known = isinstance(audit, str) and re.fullmatch(r"[0-9a-f]{64}", audit)
    withheld = shown(content["facts"].get("withheld", ""))
    if content["facts"].get("model", model) != model:
        metrics, tally, withheld = {}, None, "the site gave the numbers of an earlier attempt at this round"
    return SiteRound(weight, sent, norm, metrics, tally, audit if known else "", withheld)


def record_bytes(record: ArrayRecord) -> int:
    """Size of a record's arrays as they travel."""
    return sum(len(array.data) for array in record.values())
