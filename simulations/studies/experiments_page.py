"""Write EXPERIMENTS.md and the heads of the experiments' files from the stored results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from simulations.phantom.hospitals import Hospital
from simulations.studies.consortia import consortium
from simulations.studies.design import FOLDER, ROOT, Arm, Experiment, all_experiments, jobs
from simulations.studies.tables import TABLES

PAGE = ROOT / "EXPERIMENTS.md"


def write_tables() -> Path:
    """Write EXPERIMENTS.md and the heads of the experiments' files from the stored results."""
    parts = [
        (
            "# Experiments\n\nMade by `hemafed-sim table` from simulations/results; do not edit. Synthetic patients: these numbers "
            "compare methods, they say nothing about accuracy on patients. Intervals: 95 %, bootstrap over patients within each "
            'hospital and seed, of the mean over seeds; in brackets with "to": range over seeds. Each seed draws new patients '
            "and new initial weights.\n\n" + _ground()
        )
    ]
    for experiment in all_experiments():
        parts.append(_section(experiment))
        _write_head(experiment)
    PAGE.write_text("\n\n".join(parts) + "\n")
    return PAGE


def _ground() -> str:
    """Describe what every arm begins with."""
    arm, group = Arm(""), consortium("hospitals")
    config, (name, unseen) = arm.run_config(0), next(iter(group.tests.items()))
    loss = ", ".join(f"{getattr(config.loss, task):g} {task}" for task in ("cls", "seg", "rec"))
    return (
        f"Unless an arm says otherwise: model `{config.model.variant}`, loss {loss}, {arm.steps:,} steps of {config.train.batch} slices, "
        f"{arm.mode}: one model on the slices of all {len(group.training)} training hospitals together "
        f"({_patients(group.training)} patients, of whom a quarter is the group seen), tested on {len(unseen)} {name} hospitals "
        f"({_patients(unseen)} patients); augmentation `{config.train.augment}`, which imitates no scanner. README's table comes from "
        "another recipe, simulations/demo.toml: scanner augmentation and more steps. Arms with other steps are not to be compared "
        "across experiments."
    )


def _patients(hospitals: Iterable[Hospital]) -> int:
    return sum(hospital.patients for hospital in hospitals)


def _section(experiment: Experiment) -> str:
    """One experiment of the page."""
    finding = f"\n\n**Found.** {experiment.finding}" if experiment.finding else ""
    steps = {arm.steps for arm in experiment.arms} - {Arm("").steps}
    other = f" {' or '.join(f'{n:,}' for n in sorted(steps))} steps a site." if steps else ""
    return (
        f"## {experiment.title}\n\n{experiment.question}\n\n**Expected.** {experiment.expected}{finding}\n\n"
        f"`hemafed-sim run {experiment.name}`: {_cost(experiment)}{other}\n\n{TABLES[experiment.table](experiment)}"
    )


def _cost(experiment: Experiment) -> str:
    """Describe where and how long it ran, and how much of it is stored."""
    every = list(jobs(experiment))
    contents = [json.loads(job.result.read_text()) for job in every if job.done()]
    state = f"{len(contents)} of {len(every)} results stored"
    if not contents:
        return state
    machine = contents[0]["machine"]
    commits = ", ".join(sorted({c["commit"] for c in contents}))
    minutes = sum(c["seconds"] for c in contents) / 60
    return (
        f"{state}, {minutes:.0f} minutes of training one after the other, a thread each, on {machine['processor']} "
        f"({machine['cores']} cores, accelerator {machine['accelerator']}); commit {commits}."
    )


def _write_head(experiment: Experiment) -> None:
    """The comment at the top of an experiment's file: question, command, cost, result, expectation."""
    path: Path = FOLDER / f"{experiment.name}.toml"
    body = path.read_text().splitlines()
    while body and (body[0].startswith("#") or not body[0].strip()):
        body.pop(0)
    head = [
        f"Question: {experiment.question}",
        f"Command:  hemafed-sim run {experiment.name}",
        f"Cost:     {_cost(experiment)}",
        f"Expected: {experiment.expected}",
        f"Found:    {experiment.finding or 'not yet told'}",
        "Result, made by hemafed-sim table:",
        *TABLES[experiment.table](experiment).splitlines(),
    ]
    path.write_text("\n".join(f"# {line}".rstrip() for line in head) + "\n\n" + "\n".join(body) + "\n")
