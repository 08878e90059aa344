"""Stored results to tables: EXPERIMENTS.md and the heads of the experiments' files.

Every number comes from simulations/results; intervals are percentile bootstraps over patients, drawn within each hospital
and seed, of the mean over seeds. The draws depend on hospital and seed alone, so that two arms are compared on the same
patients and a difference has an interval of its own.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.metrics import Counts, auc, best_threshold, count_scores, f1, merge_counts
from simulations.phantom.hospitals import Hospital
from simulations.studies.consortia import consortium
from simulations.studies.design import FOLDER, ROOT, Arm, Experiment, Job, all_experiments, jobs
from simulations.studies.measures import REGIONS, scores_from_json

REPLICATES = 1000
PAGE = ROOT / "EXPERIMENTS.md"
Rows = NDArray[np.float64]  # (REPLICATES + 1,): the value, then its bootstrap samples


@dataclass(frozen=True)
class Result:
    """Stored results of one arm, one per seed, in order of the seeds."""

    seeds: tuple[int, ...]
    contents: tuple[dict, ...]

    def rows(self, group: str, metric: str = "auc") -> Rows:
        """A metric of a group of hospitals, mean over seeds, with its bootstrap samples."""
        return np.mean([_rows(c["measures"]["scores"], group, metric, seed) for seed, c in self._pairs()], axis=0)

    def _pairs(self) -> Iterable[tuple[int, dict]]:
        return zip(self.seeds, self.contents, strict=True)


def read_result(experiment: Experiment, arm: str) -> Result | None:
    """What is stored of an arm by the present recipe; None if nothing is."""
    found = [
        (job.seed, json.loads(job.result.read_text())) for job in jobs(experiment) if job.arm.name == arm and job.done()
    ]
    return Result(*zip(*found, strict=True)) if found else None


def _rows(scores: dict, group: str, metric: str, seed: int) -> Rows:
    """A metric with its bootstrap samples, from one seed's stored scores."""
    return _metrics(json.dumps(scores[group], sort_keys=True), json.dumps(scores.get("val"), sort_keys=True), seed)[
        metric
    ]


@cache  # of metrics: tallies of all results would take 16 MB a hospital
def _metrics(content: str, validation: str, seed: int) -> dict[str, Rows]:
    """Metrics of a group of hospitals, each with its bootstrap samples; F1 at the threshold that validation chooses."""
    tally = _tally(content, seed, REPLICATES)
    with np.errstate(invalid="ignore", divide="ignore"):
        metrics = {"auc": auc(tally.counts), "dice": tally.dice_sum / tally.dice_slices}
    if validation != "null":
        metrics["f1"] = f1(tally.counts, best_threshold(_tally(validation, seed, 0).counts[0]))
    return metrics


def _tally(content: str, seed: int, replicates: int) -> Counts:
    """Counts of hospitals together; the same draws of each one's patients for every arm."""
    return merge_counts(
        count_scores(scores_from_json(one), replicates, np.random.default_rng([zlib.crc32(name.encode()), seed]))
        for name, one in json.loads(content).items()
    )


def text(rows: Rows, signed: bool = False, digits: int = 3) -> str:
    """A value and its 95 % interval."""
    value, low, high = rows[0], *np.nanpercentile(rows[1:], [2.5, 97.5])
    if np.isnan(value):
        return "–"
    show = f"{{:{'+' if signed else ''}.{digits}f}}"
    return re.sub(r"\b0\.", ".", f"{show.format(value)} [{show.format(low)}, {show.format(high)}]")


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, the first column to the left."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def scores_table(experiment: Experiment) -> str:
    """Seen and unseen AUC, the gap, F1, Dice, and the difference to the reference on unseen hospitals."""
    head = ["arm", "AUC seen", "AUC unseen", "gap", f"unseen, minus {experiment.reference}", "F1 unseen", "Dice unseen"]
    reference = read_result(experiment, experiment.reference)
    lines = []
    for arm in experiment.arms:
        result = read_result(experiment, arm.name)
        if result is None:
            lines.append([arm.name, "not run"] + [""] * (len(head) - 2))
            continue
        seen, unseen = result.rows("seen"), result.rows("unseen")
        difference = "" if reference is None or arm.name == experiment.reference else _difference(result, reference)
        trained = result.contents[0]["config"]["loss.seg"] > 0
        dice = text(result.rows("unseen", "dice")) if trained else "–"
        lines.append(
            [
                arm.name,
                text(seen),
                text(unseen),
                text(seen - unseen, True),
                difference,
                text(result.rows("unseen", "f1")),
                dice,
            ]
        )
    return table(head, lines)


def _difference(result: Result, reference: Result, group: str = "unseen") -> str:
    """AUC minus the reference's, on the seeds that both have."""
    both = [seed for seed in result.seeds if seed in reference.seeds]
    if not both:
        return ""
    rows = [
        _rows(one.contents[one.seeds.index(seed)]["measures"]["scores"], group, "auc", seed)
        for seed in both
        for one in (result, reference)
    ]
    return text(np.mean(rows[0::2], axis=0) - np.mean(rows[1::2], axis=0), True)


def baseline_table(experiment: Experiment) -> str:
    """The scores, the ceiling, and where Grad-CAM's evidence lies."""
    parts = [scores_table(experiment)]
    first = read_result(experiment, experiment.arms[0].name)
    if first is not None:
        lines = []
        for reader, name in (
            ("oracle", "oracle: noiseless lesion, true mask"),
            ("radiomics", "radiomics on the true mask"),
        ):
            rows = [
                np.mean([_rows(c["measures"]["ceiling"][reader], g, "auc", s) for s, c in first._pairs()], axis=0)
                for g in ("seen", "unseen")
            ]
            lines.append([name, *map(text, rows)])
        parts.append(table(["what could be reached", "AUC seen", "AUC unseen"], lines))
    parts.append(attention_table(experiment, ("seen", "unseen")))
    return "\n\n".join(parts)


def attention_table(experiment: Experiment, groups: tuple[str, ...]) -> str:
    """Share of Grad-CAM's evidence per region, beside the region's share of the picture; mean over seeds."""
    lines = []
    for arm in experiment.arms:
        result = read_result(experiment, arm.name)
        if result is None or "attention" not in result.contents[0]["measures"]:
            continue
        for group in groups:
            shares = [c["measures"]["attention"][group] for c in result.contents]
            lines.append([f"{arm.name}, {group}"] + [_spread([s[f"cam_{r}"] for s in shares]) for r in REGIONS])
    if not lines:
        return "Grad-CAM: not run"
    area = [f"{np.mean([s[f'area_{r}'] for s in shares]):.2f}" for r in REGIONS]
    return table(["Grad-CAM, positive slices", *REGIONS], [*lines, ["share of the picture", *area]])


def _spread(values: list[float], digits: int = 2) -> str:
    """Mean and range over seeds."""
    show = f"{{:.{digits}f}}"
    inner = f"{show.format(np.mean(values))} ({show.format(min(values))} to {show.format(max(values))})"
    return inner if len(values) > 1 else show.format(values[0])


def shift_table(experiment: Experiment) -> str:
    """AUC on one hospital as it is, and what each single cause changes, per arm; the same patients."""
    results = {arm.name: read_result(experiment, arm.name) for arm in experiment.arms}
    ready = {name: result for name, result in results.items() if result is not None}
    if not ready:
        return "not run"
    groups = [
        g for g in next(iter(ready.values())).contents[0]["measures"]["scores"] if g not in ("val", "seen", "unseen")
    ]
    lines = []
    for group in groups:
        line = [group]
        for result in ready.values():
            rows = result.rows(group)
            line += [text(rows), "" if group == "reference" else text(rows - result.rows("reference"), True)]
        lines.append(line)
    head = ["cause"] + [part for name in ready for part in (f"AUC, {name}", "change")]
    return table(head, lines)


def spurious_table(experiment: Experiment) -> str:
    """AUC where the feature helps, says nothing and misleads, and how much the feature alone moves the model."""
    head = [
        "feature: tasks",
        "AUC seen (rho .9)",
        "AUC rho 0",
        "AUC rho -.9",
        "shift of logit, SD",
        "calls that flip",
        "Grad-CAM in hematoma",
    ]
    lines = []
    for arm in experiment.arms:
        result = read_result(experiment, arm.name)
        if result is None:
            lines.append([arm.name, "not run"] + [""] * (len(head) - 2))
            continue
        measures = [c["measures"] for c in result.contents]
        lines.append(
            [arm.name, *(text(result.rows(g)) for g in ("seen", "rho 0", "rho -0.9"))]
            + [_spread([m["reliance"][k] for m in measures]) for k in ("shift", "flips")]
            + [_spread([m["attention"]["seen"]["cam_hematoma"] for m in measures])]
        )
    return table(head, lines)


def similarity_table(experiment: Experiment) -> str:
    """CKA and CCA per stage, and cosines of the tasks' gradients."""
    lines, moments = [], []
    for arm in experiment.arms:
        result = read_result(experiment, arm.name)
        if result is None:
            continue
        measures = [c["measures"] for c in result.contents]
        if "similarity" in measures[0]:
            for kind in ("cka", "cca"):
                stages = [_spread([m["similarity"][kind][stage] for m in measures]) for stage in range(4)]
                lines.append([f"{kind.upper()}, {arm.name} and {arm.against}", *stages])
        if "cosines" in measures[0]:
            moments = [m["cosines"] for m in measures]
    parts = [table(["alike", *(f"stage {n}" for n in range(1, 5))], lines)] if lines else ["not run"]
    if moments:
        pairs = ("cls-seg", "cls-rec", "seg-rec")
        count = min(len(m) for m in moments)
        rounds = [f"{moments[0][i]['round'] / moments[0][i]['rounds']:.0%}" for i in range(count)]
        cosine_lines = [[rounds[i], *(_spread([m[i][p] for m in moments]) for p in pairs)] for i in range(count)]
        parts.append(table(["share of the training", *(f"cosine {p}" for p in pairs)], cosine_lines))
    return "\n\n".join(parts)


def groups_table(experiment: Experiment) -> str:
    """AUC per group of patients or protocols."""
    lines = []
    for arm in experiment.arms:
        result = read_result(experiment, arm.name)
        if result is None:
            lines.append([arm.name, "not run", ""])
            continue
        for group in result.contents[0]["measures"]["scores"]:
            if group != "val":
                change = "" if group == "seen" else text(result.rows(group) - result.rows("seen"), True)
                lines.append([f"{arm.name}, {group}", text(result.rows(group)), change])
    return table(["arm and group", "AUC", "minus seen"], lines)


TABLES: dict[str, Callable[[Experiment], str]] = {
    "scores": scores_table,
    "baseline": baseline_table,
    "shift": shift_table,
    "spurious": spurious_table,
    "similarity": similarity_table,
    "groups": groups_table,
}


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
    """What every arm begins with, in words."""
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
    """Where and how long it ran, and how much of it is stored."""
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


def state(experiment: Experiment) -> tuple[int, int, int]:
    """Results that are stored, that are stored but of another recipe, and that are wanted."""
    every: list[Job] = list(jobs(experiment))
    done = sum(job.done() for job in every)
    return done, sum(job.result.is_file() for job in every) - done, len(every)
