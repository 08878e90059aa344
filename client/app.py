"""Flower ClientApp of one hospital.

Four questions are answered, each by one function below: who are you, train a round, give your heads, test a model on
your own split. What leaves is built here and checked once more by the hospital's policy on the way out; an exception
of ours leaves as its text, which names no patient, and any other as its type alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.audit import AuditError, contents, record
from client.local_state import LocalState
from client.policy import (
    FACTS,
    METRICS,
    PATIENTS,
    TALLY,
    UPDATE,
    PolicyError,
    admit,
    enforce,
    metrics_refusal,
)
from client.train import Learner, TrainError, build_learner, round_seed, train_round, training_inputs
from shared.config import ConfigError, RunConfig, Scalar, parse_config
from shared.metrics import MetricsError, tally_scores
from shared.model import MultiTaskSwin
from shared.scoring import best_device, build_model, score_slices
from shared.site import TENSOR_GROUPS, Site, SiteError, read_site
from shared.slices import CacheError, SliceCache, read_cache
from shared.wire import (
    PROTOCOL_VERSION,
    UpdateError,
    expected_shapes,
    from_record,
    groups_shared,
    tally_to_record,
    to_arrays,
    to_record,
)

log = logging.getLogger("hemafed.client")

# Their texts are written to be read at the server: no patient, no path.
_SPEAKING = (PolicyError, TrainError, UpdateError, ConfigError, MetricsError, AuditError)
_CLOSED = {
    SiteError: "the site.yaml of this node cannot be used; the site's own log has the cause",
    CacheError: "the slice cache of this site cannot be used: run 'hemafed-client ingest' there; its own log has the cause",
}
REFUSED, FAILED = 1001, 1002  # error codes of ours; Flower's own are below 100
MOST_REPLICATES = 2000  # 32 MB of counts
HELLO = "query.hello"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def way_out(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower mod around every handler: the first code that sees a message, and the last before a reply leaves the hospital.

    What is asked must be what the hospital's policy accepts, what is answered what it releases, and both stand in its audit
    log before anything leaves.
    A handler that returned nothing or a reply that could not be made would block the hospital's Flower node for all
    later runs, so there is a reply in every case.
    """
    site = None
    try:
        site = find_site(context)
        kind = message.metadata.message_type
        if kind != HELLO:
            admit(site, parse_config(context.run_config), trains=kind == MessageType.TRAIN, now=datetime.now())
        reply = call_next(message, context)
        enforce(site, reply.content)
        asked = _asked(message, context)
        # Written before it leaves: what cannot be recorded does not.
        reply.content[FACTS]["audit"] = record(site.state, "released", asked | contents(reply.content))
        return reply
    except _SPEAKING as error:
        log.error("refused: %s", error)
        code, reason = REFUSED, str(error)
    except (SiteError, CacheError) as error:  # these name folders, or what stands in a wrong file
        log.error("refused: %s", error)
        code, reason = REFUSED, str(error) if "site" not in context.node_config else _CLOSED[type(error)]
    except Exception as error:  # its text may hold anything, so it stays here
        log.exception("failed")
        code = FAILED
        reason = f"{type(error).__name__} while answering {message.metadata.message_type!r}; the site's own log has the cause"
    if site is not None:
        try:
            record(site.state, "refused", _asked(message, context) | {"reason": reason})
        except AuditError as error:
            log.error("%s", error)
    return Message(Error(code, reason), reply_to=message)


def _asked(message: Message, context: Context) -> dict[str, object]:
    """What the server asked, for the audit log: its run, the kind of message and the run config where it is not the default."""
    order = message.content.get("config", {}) if message.has_content() else {}
    default = RunConfig().flat()
    return {
        "flower_run": str(message.metadata.run_id),
        "asked": message.metadata.message_type,
        "order": {key: value for key, value in order.items() if isinstance(value, Scalar)},
        "config": {key: value for key, value in context.run_config.items() if default.get(key) != value},
    }


app = ClientApp(mods=[way_out])


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


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who are you? Out go the site's public name, role, weight and released groups and, if the policy allows, three counts."""
    site = find_site(context)
    facts = {
        "site": site.name,
        "role": site.role,
        "weight": site.weight,
        "release": ",".join(site.policy.release),
        "protocol": PROTOCOL_VERSION,
    }
    return _reply(message, site, facts=facts, metrics=read_cache(site.cache).counts())


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round. Out go the shared tensors and, if the policy allows, sums of losses and counts of scores."""
    site, config, cache = _opened(context)
    if site.role != "train":
        raise TrainError(f"site {site.name!r} has role {site.role!r} and does not train; only role 'train' does")
    order = message.content["config"]
    round_number, run = int(order["server-round"]), _run_name(order["run"])
    if (
        not 1 <= round_number <= config.federation.rounds
    ):  # rounds are bounded by the policy, so they must be the config's
        raise TrainError(f"round {round_number} of a run of {config.federation.rounds} rounds (federation.rounds)")
    inputs = training_inputs(cache, config, site.name)
    learner, state, _ = _local_learner(site, config, run, before=round_number)
    model = learner.model
    _load_shared(model, message.content["arrays"], config)

    # The global encoder as it arrived, with this hospital's own heads, on its validation slices.
    before = score_slices(model, (), cache, cache.rows("val"), config.model, config.train.precision)
    tally = tally_scores(before, 0, np.random.default_rng(0))

    report = train_round(
        learner,
        inputs,
        config,
        site=site.name,
        round_number=round_number,
        proximal_mu=float(order.get("proximal-mu", 0.0)),
        progress=lambda line: _between_epochs(site, config, line),
    )
    state.save(learner, round_number)
    patients = min(len(np.unique(cache.patient[cache.rows("train")])), tally.patients)
    return _reply(
        message,
        site,
        facts={"site": site.name, "weight": site.weight},
        metrics={PATIENTS: patients, **asdict(report)},
        update=to_record(to_arrays(model.state_dict(), groups_shared(config.federation.share))),
        tally=tally_to_record(tally),
    )


def _between_epochs(site: Site, config: RunConfig, line: str) -> None:
    """Training that began inside of the hospital's hours stops with the first epoch that ends after them."""
    log.info(line)
    admit(site, config, trains=True, now=datetime.now())


@app.query("heads")
def heads(message: Message, context: Context) -> Message:
    """Give your heads. Out go the tensors of the groups asked for; the policy decides whether they may."""
    site, config, _ = _opened(context)
    order = message.content["config"]
    wanted = tuple(str(order["groups"]).split(","))
    learner, _, trained = _local_learner(site, config, _run_name(order["run"]))
    if not trained:
        raise TrainError(f"site {site.name!r} has trained no round of this run, so it has no heads of it")
    return _reply(
        message, site, facts={"site": site.name}, update=to_record(to_arrays(learner.model.state_dict(), wanted))
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test a model on your validation or test split. Out go counts of scores, if the policy allows.

    The counts are fine: of a small hospital they show single slices' scores, and their bootstrap rows which slices belong
    to one patient, though neither slice nor patient is named. policy.metrics = false keeps them.
    """
    site, config, cache = _opened(context)
    order = message.content["config"]
    split, replicates = str(order["split"]), int(order["replicates"])
    if split not in ("val", "test") or not 0 <= replicates <= MOST_REPLICATES:
        raise TrainError(
            f"split {split!r} with {replicates} replicates, expected val or test and 0 to {MOST_REPLICATES}"
        )
    model = build_model(config.model, config.run.seed).to(best_device())
    shapes = expected_shapes(model.state_dict(), TENSOR_GROUPS)
    _load(model, message.content["arrays"], {n: s for n, s in shapes.items() if n.startswith("encoder.")})
    sets = []
    for name in sorted(message.content.keys()):
        if name.startswith("heads"):
            record = message.content[name]
            arrays = from_record(record, {n: shapes[n] for n in record if n in shapes})
            sets.append({n: torch.from_numpy(value) for n, value in arrays.items()})
    scores = score_slices(model, sets, cache, cache.rows(split), config.model, config.train.precision)
    # The hospital's key seeds the bootstrap: it repeats here, and nobody else knows the draws.
    rng = np.random.default_rng([*site.key()[:8], round_seed(config.run.seed, split, 0)])
    tally = tally_scores(scores, replicates, rng)
    refusal = metrics_refusal(site, tally.patients)
    if refusal:
        raise PolicyError(f"site {site.name!r} does not release counts of its {split} split: {refusal}")
    return _reply(
        message, site, facts={"site": site.name}, metrics={PATIENTS: tally.patients}, tally=tally_to_record(tally)
    )


def _opened(context: Context) -> tuple[Site, RunConfig, SliceCache]:
    """Site, config and cache of this node."""
    site = find_site(context)
    return site, parse_config(context.run_config), read_cache(site.cache)


def _run_name(value: object) -> str:
    """The run's name, fit to be a file name: it comes from the server."""
    if not isinstance(value, str) or not _RUN_NAME.fullmatch(value):
        raise TrainError(f"run name {str(value)[:40]!r}, expected up to 100 letters, digits, '.', '_' or '-'")
    return value


def _local_learner(
    site: Site, config: RunConfig, run: str, before: int | None = None
) -> tuple[Learner, LocalState, int]:
    """What learns here, as the last round, before a given one, left it; and that round."""
    learner = build_learner(config, best_device())
    state = LocalState(site.state / "runs" / run)
    return learner, state, state.restore(learner, before)


def _load_shared(model: MultiTaskSwin, record: ArrayRecord, config: RunConfig) -> None:
    """Put the server's tensors into the model, checked."""
    _load(model, record, expected_shapes(model.state_dict(), groups_shared(config.federation.share)))


def _load(model: MultiTaskSwin, record: ArrayRecord, shapes: dict[str, tuple[int, ...]]) -> None:
    """Put exactly these tensors into the model."""
    arrays = from_record(record, shapes)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=False)


def _reply(
    message: Message,
    site: Site,
    *,
    facts: dict[str, str | int | float],
    metrics: dict[str, int | float] | None = None,
    update: ArrayRecord | None = None,
    tally: ArrayRecord | None = None,
) -> Message:
    """A reply; numbers that the policy holds back are left out and the reason is put in their place."""
    content = RecordDict()
    refusal = metrics_refusal(site, int(metrics[PATIENTS])) if metrics else ""
    content[FACTS] = ConfigRecord({**facts, "withheld": refusal, "audit": ""})
    if update is not None:
        content[UPDATE] = update
    if metrics and not refusal:
        content[METRICS] = MetricRecord(metrics)
        if tally is not None:
            content[TALLY] = tally
    return Message(content, reply_to=message)
