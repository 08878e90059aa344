"""Flower ServerApp: the procedure of a run, top to bottom.

Find the hospitals, test the initial model, train round by round, get the heads, test the final model. What hospitals
send are tensors that their policies release and counts of scores; no pixel, name or identifier arrives here. Testing on
held-out hospitals comes after (server/evaluation/evaluate.py), from the folder that this leaves.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from server.centre.registry import registered_nodes
from server.centre.signing import sign_as_centre
from server.evaluation.evaluate import EvaluationError, summarise_run
from server.evaluation.report import write_report
from server.federation.exchange import content_or_raise, send_and_receive
from server.federation.heads import ProbeError, final_heads, keeps_heads
from server.federation.plausible import check_tally
from server.federation.robust import longest_update
from server.federation.roster import Participant, QuorumError, RunContext, wait_for_quorum
from server.federation.round_line import describe_round, round_text
from server.federation.strategy import repeat_round
from server.storage.checkpoint import (
    CheckpointError,
    Moments,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_tensors,
)
from server.storage.lines import SiteSummary, Summary
from server.storage.run_folder import (
    RunError,
    append_round,
    forget_test,
    open_run,
    read_config,
    read_rounds,
    record_config,
    save_tally,
    write_patiently,
    write_status,
    write_summary,
)
from shared.config import ConfigError, RunConfig, parse_config
from shared.groups import HEADS, groups_shared
from shared.host.log import start_log
from shared.model.scoring import build_model
from shared.model.swin import ModelError, load_pretrained
from shared.site import SiteError
from shared.slices import CacheError
from shared.wire.codecs import PLAIN
from shared.wire.foreign import shown
from shared.wire.records import (
    Tensors,
    UpdateError,
    expected_shapes,
    from_record,
    tally_from_record,
    tested_hash,
    to_arrays,
    to_record,
    typed_record,
)

log = logging.getLogger("hemafed.server")

app = ServerApp()

MOST_ADAM_RATE = 0.1
# Errors that a retry cannot fix.
FINAL = (
    QuorumError,
    ConfigError,
    RunError,
    CheckpointError,
    EvaluationError,
    ProbeError,
    UpdateError,
    ModelError,
    SiteError,
    CacheError,
)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run. Raises what stops it, so that Flower marks the run as failed."""
    config = parse_config(context.run_config)
    settings = config.federation
    if settings.heads == "probe" and not settings.development_site:
        raise ConfigError("federation.heads is 'probe' and federation.development_site is empty; give a site.yaml")
    if settings.heads == "ensemble" and settings.share == "all":
        raise ConfigError(
            "federation.heads is 'ensemble' and federation.share is 'all': the hospitals have one set of heads; use 'average'"
        )
    if settings.strategy == "fedadam" and settings.server_learning_rate > MOST_ADAM_RATE:
        raise ConfigError(
            f"federation.server_learning_rate is {settings.server_learning_rate:g} with federation.strategy = 'fedadam', which moves "
            f"every value by about that much in a round; expected at most {MOST_ADAM_RATE:g}"
        )
    start_log("hemafed.server")
    run = open_run(config)
    write_status(run, "running", what="the start")
    try:
        grid = sign_as_centre(grid, run.parent.parent, config)
        federate(grid, config, run)
    except FINAL as error:
        write_status(run, "failed", error=f"{type(error).__name__}: {error}")
        raise
    except Exception as error:  # of the connection, the disk, or a fault of ours: worth another attempt
        write_status(run, "crashed", error=f"{type(error).__name__}: {error}")
        raise
    write_status(run, "finished")


def federate(grid: Grid, config: RunConfig, run: Path) -> None:
    """The run itself, from the start or from its last checkpoint."""
    settings = config.federation
    log.info(f"run {run.name}: {settings.rounds} rounds of {settings.strategy}, sharing {settings.share}, in {run}")

    model = build_model(config.model, config.run.seed)
    if config.model.brought:
        unused = load_pretrained(model, Path(config.model.pretrained))
        log.info(f"initial encoder from {config.model.pretrained}; {len(unused)} tensors of the file not used")
    shared = groups_shared(settings.share)
    arrays = to_arrays(model.state_dict(), shared)
    longest = longest_update(arrays)
    moments, first, holders = Moments(), 1, set()
    held = {} if settings.codec == PLAIN else arrays
    if config.run.resume and not checkpoints(run / "checkpoint"):
        log.info("resuming before the first checkpoint: beginning with round 1")
    elif config.run.resume:
        saved = load_checkpoint(run / "checkpoint", log.warning)
        arrays, first = (
            from_record(to_record(saved.arrays), expected_shapes(model.state_dict(), shared)),
            saved.round_number + 1,
        )
        moments, holders = saved.moments, set(saved.sites)
        held = saved.held or held
        log.info(f"resuming after round {saved.round_number}")

    session = RunContext(grid, settings, run, longest, registered=partial(registered_nodes, run.parent.parent))
    session.roster.holders |= holders
    # Whether the run can end with a whole model is better known before hospitals train for days.
    members = wait_for_quorum(session, partial(keeps_heads, settings))
    for member in members:
        log.info(f"{member.site}: weight {member.weight:g}, {member.counts or 'counts withheld by its policy'}")
    if first == 1:
        write_summary(run, Summary(config.hash(), 0, {m.site: _public(m) for m in members}))
        write_tensors(run / "checkpoint" / "initial.safetensors", arrays, {})
        save_checkpoint(run / "checkpoint", 0, arrays, moments)
        log.info("testing the initial model")
        heads = {"average": to_arrays(model.state_dict(), HEADS)}
        test_seen(grid, members, run, "initial", config, arrays, heads)
        if not config.model.brought:  # every hospital builds the initial model itself
            session.roster.holders |= {member.site for member in members}

    for number in range(first, settings.rounds + 1):
        result = repeat_round(session, moments, arrays, number, held)
        arrays, moments, held = result.arrays, result.moments, result.held
        line = describe_round(number, result)
        # The line first: of a round that is done again, the last line counts.
        write_patiently(run, partial(append_round, run, line))
        sites = list(result.sites)
        write_patiently(run, partial(save_checkpoint, run / "checkpoint", number, arrays, moments, sites, held))
        log.info(round_text(line, settings.rounds))

    log.info("collecting heads and testing the final model")
    write_status(run, "running", what="the test of the final model")
    members = wait_for_quorum(session)
    heads = final_heads(grid, members, config, run.name, arrays, model)
    record_config(run, config)  # of a resumed run other heads may have been asked for, and here they are
    test_seen(grid, members, run, "final", config, arrays, heads)
    finish(run, members)
    log.info(f"done: {run / 'report.html'}")


def test_seen(
    grid: Grid,
    members: list[Participant],
    run: Path,
    stage: str,
    config: RunConfig,
    arrays: Tensors,
    heads: dict[str, Tensors],
) -> None:
    """Have the training hospitals test a model on their validation and test splits, and keep their counts."""
    timeout_s = config.federation.round_deadline_s
    forget_test(run, stage)  # a resumed run may have ended before, with other heads
    encoder = {n: v for n, v in arrays.items() if n.startswith("encoder.")}
    content = RecordDict(
        {"config": ConfigRecord({"run": run.resolve().name, "stage": stage}), "arrays": to_record(encoder)}
    )
    for name, tensors in heads.items():
        content[f"heads-{name}"] = to_record(tensors)
        write_tensors(run / "checkpoint" / f"heads-{stage}-{name}.safetensors", tensors, {})
    # Sorted as the records arrive: an ensemble's hash is of its sets in this order.
    model = tested_hash(encoder, [heads[name] for name in sorted(heads)])
    counts = {m.site: m.counts for m in members}
    messages = {m.site: Message(content, dst_node_id=m.node_id, message_type="evaluate") for m in members}
    for site, reply in send_and_receive(grid, messages, timeout_s):
        try:
            answer = content_or_raise(reply, timeout_s)
            facts = typed_record(answer, "facts", ConfigRecord)
            if facts.get("model") != model:
                raise UpdateError(
                    f"it tested another {stage} model of this run before, and tests one only; its counts are left out"
                )
            if facts.get("withheld"):
                log.info(f"{site} withholds counts: {shown(facts['withheld'])}")
            for split, part, replicates in (("val", "val", 0), ("test", "seen", config.evaluation.replicates)):
                if f"tally-{split}" in answer:
                    tally = tally_from_record(typed_record(answer, f"tally-{split}", ArrayRecord), replicates)
                    check_tally(tally, counts[site])
                    save_tally(run, stage, part, site, tally)
        except UpdateError as error:
            log.warning(f"{site}: no counts of the {stage} model: {error}")


def finish(run: Path, members: list[Participant]) -> None:
    """Summary and report of what is known so far: all but the held-out hospitals."""
    rounds = read_rounds(run)
    done = Summary(
        read_config(run).hash(),
        len(rounds),
        sites={m.site: _public(m) for m in members},
        bytes_up_per_round=float(np.mean([line.bytes_up for line in rounds])),
        seconds_per_round=float(np.mean([line.seconds for line in rounds])),
    )
    write_summary(run, done)
    summarise_run(run)
    write_report(run)


def _public(member: Participant) -> SiteSummary:
    """Return the summary's entry for a hospital."""
    return SiteSummary(member.role, member.weight, **member.counts)
