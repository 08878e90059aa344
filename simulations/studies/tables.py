"""Make the tables of experiments from their stored results, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from simulations.studies.design import Experiment
from simulations.studies.measures import REGIONS
from simulations.studies.results import Result, Rows, _rows, read_result


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
    """Seen and unseen AUC, the gap, the difference to the reference, and what is marked on unseen hospitals."""
    head = ["arm", "AUC seen", "AUC unseen", "gap", f"unseen, minus {experiment.reference}", "F1 unseen", "Dice unseen"]
    head += ["alarms unseen", "detection unseen"]
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
        marked = [text(result.rows("unseen", name)) if trained else "–" for name in ("dice", "alarms", "detection")]
        lines.append(
            [
                arm.name,
                text(seen),
                text(unseen),
                text(seen - unseen, True),
                difference,
                text(result.rows("unseen", "f1")),
                *marked,
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
