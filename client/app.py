"""Flower ClientApp of one hospital.

Four questions are answered, each by one function below: who are you, train a round, give your heads, test a model on
your own splits. What leaves is built here and checked once more by the hospital's policy on the way out; an error leaves as
a code of a closed list with a fixed text (shared/refusals.py), its detail stays in the hospital's log.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.boundary.evaluations import tested
from client.boundary.footing import ModelNotOfRunError, after_round, check_initial
from client.boundary.orders import TrainOrder, evaluation_order, heads_order, no_order, train_order
from client.boundary.policy import (
    FACTS,
    METRICS,
    PATIENTS,
    TALLY,
    TALLY_TEST,
    TALLY_VAL,
    UPDATE,
    admit,
    metrics_refusal,
)
from client.boundary.this_site import this_node
from client.boundary.way_out import way_out
from client.training.evaluate import counted_patients, evaluate_model, initial_model, patients_in
from client.training.exchange import make_update, read_global
from client.training.local_state import LocalState, make_room
from client.training.round import Learner, TrainError, build_learner, round_seed, train_round, training_inputs
from client.training.round_numbers import RoundNumbers, coarse_losses, keep_numbers, open_round
from shared.config import RunConfig
from shared.groups import groups_shared
from shared.model.scoring import best_device, score_slices
from shared.refusals import Refusal
from shared.site import Site
from shared.slices import SliceCache, read_cache
from shared.tally import tally_scores
from shared.wire.records import (
    PROTOCOL_VERSION,
    Tensors,
    arrays_to_record,
    expected_shapes,
    tally_to_arrays,
    tested_hash,
    to_arrays,
    to_record,
)

log = logging.getLogger("hemafed.client")

app = ClientApp(mods=[way_out])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who are you? Out go the site's public name, role and released groups and, if the policy allows, three counts."""
    no_order(message.content)
    site = this_node().site
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
    site, config, cache = _opened()
    order = train_order(message.content, config)
    _check_role(site)
    inputs = training_inputs(cache, config, site.name)
    shared = groups_shared(config.federation.share)
    make_room(site.state / "runs", order.run)
    learner, state, last = _local_learner(site, config, order.run, before=order.round_number)
    model = learner.model
    received = read_global(order, config, state, expected_shapes(model.state_dict(), shared))
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
    update, exchange = make_update(trained, received, config, state, last)
    state.save_footing(after_round(footing, order.round_number, received, trained))
    state.save(learner, order.round_number, exchange)
    numbers = beside.kept
    return _reply(
        message,
        site,
        facts={"site": site.name} | ({"model": numbers.model} if numbers else {"withheld": beside.withheld}),
        metrics=dict(numbers.metrics) if numbers else None,
        update=update,
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
    if not config.model.brought:
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
    site, config, _ = _opened()
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
    site, config, cache = _opened()
    order = evaluation_order(message.content, config)
    _check_role(site)

    def draws(split: str) -> np.random.Generator:
        """Fresh draws, which no other request shares; of a simulated hospital the same in each simulation of a seed."""
        if not this_node().simulated:
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


def _opened() -> tuple[Site, RunConfig, SliceCache]:
    """Site, config and cache of this node."""
    node = this_node()
    return node.site, node.config, read_cache(node.site.cache)


def _local_learner(
    site: Site, config: RunConfig, run: str, before: int | None = None
) -> tuple[Learner, LocalState, int]:
    """Return this hospital's learner as the last round before a given one left it, and that round's number."""
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
