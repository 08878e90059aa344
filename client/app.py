"""Flower ClientApp of one hospital.

Four questions are answered, each by one function below: who are you, train a round, give your heads, test a model on
your own splits. What leaves is built here and checked once more by the hospital's policy on the way out; an error leaves as
a code of a closed list with a fixed text (shared/refusals.py), its detail stays in the hospital's log.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.boundary.audit import AuditError, contents, known_items, printable, record
from client.boundary.daily import MOST_A_DAY, QUESTIONS, count_question, list_refusal
from client.boundary.evaluations import tested
from client.boundary.footing import ModelNotOfRunError, after_round, check_initial
from client.boundary.orders import ORDER_KEYS, TrainOrder, evaluation_order, heads_order, no_order, train_order
from client.boundary.policy import (
    FACTS,
    METRICS,
    PATIENTS,
    TALLY,
    TALLY_TEST,
    TALLY_VAL,
    UPDATE,
    PolicyError,
    admit,
    enforce,
    metrics_refusal,
)
from client.training.evaluate import counted_patients, evaluate_model, initial_model, patients_in
from client.training.local_state import LocalState, make_room
from client.training.round import Learner, TrainError, build_learner, round_seed, train_round, training_inputs
from client.training.round_numbers import RoundNumbers, coarse_losses, keep_numbers, open_round
from shared.config import ConfigError, RunConfig, Scalar, parse_config
from shared.metrics import MetricsError
from shared.model.scoring import best_device, score_slices
from shared.refusals import TEXTS, Refusal, Refused
from shared.site import Site, SiteError, read_site
from shared.slices import CacheError, SliceCache, read_cache
from shared.tally import tally_scores
from shared.wire.records import (
    PROTOCOL_VERSION,
    Tensors,
    UpdateError,
    arrays_to_record,
    expected_shapes,
    from_record,
    groups_shared,
    tally_to_arrays,
    tested_hash,
    to_arrays,
    to_record,
)

log = logging.getLogger("hemafed.client")

# Errors of code that knows no refusals.
_CODES = {
    UpdateError: Refusal.TENSORS,
    ConfigError: Refusal.RUN_CONFIG,
    MetricsError: Refusal.DIVERGED,
    SiteError: Refusal.SITE,
    CacheError: Refusal.SITE,
}
HELLO = "query.hello"


def way_out(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower mod around every handler: the first code that sees a message, and the last before a reply leaves the hospital.

    What is asked must be what the hospital's policy accepts, what is answered what it releases, and both stand in its audit
    log before anything leaves.
    A handler that returned nothing or a reply that could not be made would block the hospital's Flower node for all
    later runs, so there is a reply in every case.
    """
    site = number = None
    try:
        site = find_site(context)
        number = _admit_question(site, message, context)
        if number is not None and number > MOST_A_DAY:
            raise PolicyError(f"site {site.name!r} answers {MOST_A_DAY} {message.metadata.message_type} a day")
        if message.metadata.message_type != HELLO:
            admit(site, parse_config(context.run_config), now=datetime.now())
        reply = call_next(message, context)
        enforce(site, reply.content)
        asked = _asked(message, context)
        # Written before it leaves: what cannot be recorded does not.
        reply.content[FACTS]["audit"] = record(site.state, "released", asked | contents(reply.content))
        return reply
    except (Refused, *_CODES) as error:
        code = error.code if isinstance(error, Refused) else _CODES[type(error)]
        detail = str(error)
        log.error("refused: %s", printable(detail))
    except Exception as error:  # its text may hold anything
        code, detail = Refusal.FAILED, type(error).__name__
        log.error("failed:\n%s", "\n".join(map(printable, traceback.format_exc().splitlines())))
    if site is not None:
        try:
            list_refusal(site.state, _asked(message, context) | {"code": int(code), "reason": detail}, number)
        except AuditError as error:
            log.error("%s", printable(str(error)))
    # The one place where it is decided: a researcher who simulates sees the detail, a centre the fixed text.
    return Message(Error(int(code), detail if simulated(context) else TEXTS[code]), reply_to=message)


def _admit_question(site: Site, message: Message, context: Context) -> int | None:
    """The number of a question among those of its kind and day; None of what is no question, or asked in a simulation."""
    kind = message.metadata.message_type
    return count_question(site.state, kind) if kind in QUESTIONS and not simulated(context) else None


def _asked(message: Message, context: Context) -> dict[str, object]:
    """What the server asked, for the audit log: its run, the kind of message and the run config where it is not the default."""
    order = message.content.get("config", {}) if message.has_content() else {}
    default = RunConfig().flat()
    hello = message.metadata.message_type == HELLO  # depends on neither, so that both could be anything
    return {
        "flower_run": str(message.metadata.run_id),
        "asked": message.metadata.message_type,
        "order": known_items(
            {key: value for key, value in order.items() if isinstance(value, Scalar)}, () if hello else ORDER_KEYS
        ),
        "config": known_items(
            {k: v for k, v in context.run_config.items() if default.get(k) != v}, () if hello else default
        ),
    }


app = ClientApp(mods=[way_out])


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


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who are you? Out go the site's public name, role and released groups and, if the policy allows, three counts."""
    no_order(message.content)
    site = find_site(context)
    facts = {
        "site": site.name,
        "role": site.role,
        "release": ",".join(site.policy.release),
        "protocol": PROTOCOL_VERSION,
    }
    return _reply(message, site, facts=facts, metrics=read_cache(site.cache).counts())


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round. Out go the shared tensors and, once for each round and if the policy allows, losses and counts of scores."""
    site, config, cache = _opened(context)
    order = train_order(message.content, config)
    _check_role(site)
    inputs = training_inputs(cache, config, site.name)
    shared = groups_shared(config.federation.share)
    make_room(site.state / "runs", order.run)
    learner, state, _ = _local_learner(site, config, order.run, before=order.round_number)
    model = learner.model
    received = from_record(order.arrays, expected_shapes(model.state_dict(), shared))
    _check_beginning(site, config, order, received)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in received.items()}, strict=False)

    footing = state.footing()
    patients = min(len(np.unique(cache.patient[cache.rows("train")])), counted_patients(cache, "val"))
    beside = open_round(site, config, order, received, footing, state.folder, patients)
    # The global encoder as it arrived, with this hospital's own heads, on its validation slices.
    tally = {}
    if beside.wanted:
        before = score_slices(model, (), cache, cache.rows("val"), config.model, config.train.precision)
        tally = tally_to_arrays(tally_scores(before, site.policy.min_patients, 0, np.random.default_rng()))

    report = train_round(
        learner,
        inputs,
        config,
        site=site.name,
        round_number=order.round_number,
        proximal_mu=order.proximal_mu,
        progress=lambda line: _between_epochs(site, config, line),
    )
    trained = to_arrays(model.state_dict(), shared)
    if not all(np.isfinite(value).all() for value in trained.values()):
        raise TrainError(f"site {site.name!r}: weights are not finite after the round", Refusal.DIVERGED)
    if beside.wanted:
        made = RoundNumbers({PATIENTS: patients, **coarse_losses(report)}, tally, beside.model)
        beside = replace(beside, kept=keep_numbers(state.folder, order.round_number, made))
    state.save_footing(after_round(footing, order.round_number, received, trained))
    state.save(learner, order.round_number)
    numbers = beside.kept
    return _reply(
        message,
        site,
        facts={"site": site.name} | ({"model": numbers.model} if numbers else {"withheld": beside.withheld}),
        metrics=dict(numbers.metrics) if numbers else None,
        update=to_record(trained),
        tallies={TALLY: arrays_to_record(numbers.tally)} if numbers else None,
    )


def _check_role(site: Site) -> None:
    """Only hospitals that train take part in a run; held-out ones are tested by their own command (server/evaluation/evaluate.py)."""
    if site.role != "train":
        raise TrainError(
            f"site {site.name!r} has role {site.role!r}; only role 'train' takes part in a run", Refusal.ROLE
        )


def _check_beginning(site: Site, config: RunConfig, order: TrainOrder, received: Tensors) -> None:
    """Check that a run begins with the model that its seed gives, or with the pretrained one that was tested here."""
    if order.round_number > 1:
        return
    if not config.model.pretrained:
        check_initial(received, initial_model(config))
        return
    encoder = {name: value for name, value in received.items() if name.startswith("encoder.")}
    known = tested(site, order.run, "initial")
    if known is not None and known.partition("/")[0] != tested_hash(encoder, []):
        raise ModelNotOfRunError("round 1 begins with another encoder than the initial one that was tested")


def _between_epochs(site: Site, config: RunConfig, line: str) -> None:
    """Training that began inside of the hospital's hours stops with the first epoch that ends after them."""
    log.info(line)
    admit(site, config, now=datetime.now())


@app.query("heads")
def heads(message: Message, context: Context) -> Message:
    """Give your heads. Out go the tensors of the groups asked for; the policy decides whether they may."""
    site, config, _ = _opened(context)
    order = heads_order(message.content)
    learner, _, trained = _local_learner(site, config, order.run)
    if not trained:
        raise TrainError(f"site {site.name!r} has trained no round of this run", Refusal.NOT_TRAINED)
    return _reply(
        message, site, facts={"site": site.name}, update=to_record(to_arrays(learner.model.state_dict(), order.groups))
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test a model of the run on your validation and test splits. Out go coarse counts of scores, if the policy allows."""
    site, config, cache = _opened(context)
    order = evaluation_order(message.content, config)
    _check_role(site)

    def draws(split: str) -> np.random.Generator:
        """Fresh draws, which no other request shares; of a simulated hospital the same in each simulation of a seed."""
        if not simulated(context):
            return np.random.default_rng()
        return np.random.default_rng([*site.key()[:8], round_seed(config.run.seed, split, 0)])

    local = _local_learner(site, config, order.run)
    answer, facts = evaluate_model(site, config, cache, order, local, draws)
    records = {"val": TALLY_VAL, "test": TALLY_TEST}
    return _reply(
        message,
        site,
        facts={"site": site.name, **facts},
        metrics={PATIENTS: patients_in(answer)},
        tallies={records[split]: arrays_to_record(arrays) for split, arrays in answer.items()},
    )


def _opened(context: Context) -> tuple[Site, RunConfig, SliceCache]:
    """Site, config and cache of this node."""
    site = find_site(context)
    return site, parse_config(context.run_config), read_cache(site.cache)


def _local_learner(
    site: Site, config: RunConfig, run: str, before: int | None = None
) -> tuple[Learner, LocalState, int]:
    """What learns here, as the last round, before a given one, left it; and that round."""
    learner = build_learner(config, best_device())
    state = LocalState(site.state / "runs" / run)
    return learner, state, state.restore(learner, before)


def _reply(
    message: Message,
    site: Site,
    *,
    facts: dict[str, str | int | float],
    metrics: dict[str, int | float] | None = None,
    update: ArrayRecord | None = None,
    tallies: dict[str, ArrayRecord] | None = None,
) -> Message:
    """A reply; numbers that the policy holds back are left out and the reason is put in their place."""
    content = RecordDict()
    refusal = metrics_refusal(site, int(metrics[PATIENTS])) if metrics else ""
    content[FACTS] = ConfigRecord({"withheld": refusal, **facts, "audit": ""})
    if update is not None:
        content[UPDATE] = update
    if metrics and not refusal:
        content[METRICS] = MetricRecord(metrics)
        for name, tally in (tallies or {}).items():
            content[name] = tally
    return Message(content, reply_to=message)
