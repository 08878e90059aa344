"""Rehearsal: a deployed federation on one machine, with a power cut at a hospital and one at the centre, compared with a simulation.

Three of the simulated hospitals get folders, keys and daemons of their own and meet the centre through its TLS door; the
same training is done in a loop beside it. Both must end with the same model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from server.evaluation.results_table import evaluate_run
from server.storage.checkpoint import load_checkpoint
from server.storage.lines import Summary
from server.storage.run_folder import read_config, read_rounds
from shared.metrics import summarise
from shared.site import Site, read_site
from shared.slices import read_cache
from shared.tally import pooled, tally_scores
from simulations.rehearsal.federation import Federation, FederationError, federate
from simulations.studies.measures import Voter, score
from simulations.studies.training import train

RUN = "rehearsal"
SITES = 3
MARKER = "REHEARSAL"  # a folder without this file is nobody's to delete
ROUND_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Outcome:
    """Result of a rehearsal.

    Attributes:
      page, summary: of the deployed run, tested on held-out hospitals.
      deployed, simulated: AUC on unseen hospitals; the first as {value, low, high, ...}.
      difference: largest absolute difference of a value between the two encoders.
      agrees: whether the simulation's AUC lies within the deployed run's interval.
    """

    page: Path
    summary: Summary
    deployed: dict
    simulated: float
    difference: float
    agrees: bool


def rehearse(folder: Path, files: list[Path], config: dict[str, object], say: Callable[[str], None]) -> Outcome:
    """Provision, run, cut power twice, test, and do the same training in a loop.

    Args:
      folder: created again; holds everything of the federation.
      files: site.yaml of the simulated hospitals, ingested: the first SITES that train take part, the held-out ones test.
      config: dotted run config keys.
      say: called with each event.
    Raises:
      FederationError: the folder is not of a rehearsal, or the run did not finish.
    """
    if folder.exists() and not (folder / MARKER).is_file():
        raise FederationError(f"{folder} was not written by a rehearsal; it is not replaced: name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    opened = {file: read_site(file) for file in files}
    training = {site.name: file for file, site in opened.items() if site.role == "train"}
    members = dict(list(training.items())[:SITES])
    held_out = [file for file, site in opened.items() if site.role == "held-out"]
    config = config | {"federation.quorum": len(members), "federation.wait_s": ROUND_TIMEOUT_S}
    say(f"a centre and {len(members)} hospitals, by their own commands")
    with federate(folder, members) as federation:
        (folder / MARKER).write_text("Written by a rehearsal, and replaced by the next.\n")
        _run_with_outages(federation, config, say)
        run = federation.run_folder(RUN)
        say(federation.status().strip())
    page, summary = evaluate_run(run, held_out, say, repeats=True)
    say("the same training in a loop, without Flower")
    torch.set_num_threads(1)  # as the hospitals' processes, for the same bits
    parsed = read_config(run)
    caches = {name: read_cache(opened[file].cache) for name, file in members.items()}
    trained = train(caches, parsed, "federated")
    encoder = load_checkpoint(run / "checkpoint").arrays
    difference = max(float(np.abs(encoder[name] - value).max()) for name, value in trained.encoder.items())
    deployed = summary.evaluation["unseen"]["auc"]
    simulated = _auc(Voter(trained.encoder, (trained.average(),)), [opened[file] for file in held_out], run)
    return Outcome(page, summary, deployed, simulated, difference, deployed["low"] <= simulated <= deployed["high"])


def _run_with_outages(federation: Federation, config: dict[str, object], say: Callable[[str], None]) -> None:
    """The run; a hospital and the centre lose power on the way."""
    names = list(federation.sites)
    federation.start("centre")
    federation.wait_serving()
    for name in names:
        federation.start(name)
    federation.wait_online(names)
    say(f"online: {', '.join(names)}")
    federation.begin_run(RUN, config)
    rounds = int(config["federation.rounds"])
    outages = {max(1, rounds // 3): names[-1], max(2, 2 * rounds // 3): "centre"}
    for number in range(1, rounds + 1):
        federation.wait_rounds(RUN, number, ROUND_TIMEOUT_S)
        line = read_rounds(federation.run_folder(RUN))[number - 1]
        say(f"round {number} of {rounds}: {len(line.sites)} hospitals in {line.seconds:.0f} s")
        if number in outages:
            who = outages[number]
            say(f"power cut: every process of {who} is killed, and started again")
            federation.cut_power(who)
            federation.start(who)
    ended = federation.wait_end(RUN, ROUND_TIMEOUT_S)
    if ended != "finished":
        raise FederationError(f"the run {ended}:\n{federation.status()}")


def _auc(voter: Voter, sites: list[Site], run: Path) -> float:
    """Pooled AUC of a model on held-out hospitals."""
    config = read_config(run)
    rng = np.random.default_rng(0)
    tallies = []
    for site in sites:
        cache = read_cache(site.cache)
        tallies.append(tally_scores(score([voter], cache, cache.rows(), config), site.policy.min_patients, 0, rng))
    return float(summarise(pooled(tallies), None)["auc"].value)
