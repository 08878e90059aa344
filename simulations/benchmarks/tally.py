"""Accuracy of coarse counts: AUC and F1 from tallies against the exact ones from single scores.

    python -m simulations.benchmarks.tally

Two sources of scores: the test splits of four hospitals in the stored results of the experiments (18 patients, 108 slices
each), and drawn ones, 14 patients with 7 slices each, whose scores vary between hospitals, patients and slices. F1's
threshold comes from the validation splits both times.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.metrics import Counts, Scores, auc, best_threshold, count_scores, f1, merge_counts
from shared.tally import spread, tally_scores
from simulations.studies.design import ROOT
from simulations.studies.measures import scores_from_json

Hospitals = dict[str, Scores]
Case = tuple[Hospitals, Hospitals]  # validation and test


def stored_cases(every: int = 1) -> list[Case]:
    """Validation and test scores of each stored result that has both."""
    cases = []
    for path in sorted((ROOT / "simulations" / "results").glob("*/*.json"))[::every]:
        scores = json.loads(path.read_text())["measures"].get("scores", {})
        if {"val", "seen"} <= scores.keys() and scores["val"].keys() == scores["seen"].keys():
            cases.append(tuple({n: scores_from_json(one) for n, one in scores[k].items()} for k in ("val", "seen")))
    return cases


def drawn_case(separation: float, patients: int, slices: int, seed: int, hospitals: int = 4) -> Case:
    """Scores of hospitals whose positives lie `separation` above the negatives, in spreads of a slice."""
    rng = np.random.default_rng(seed)

    def scores(number: int) -> Scores:
        owner = np.repeat(np.arange(number), slices)
        ill = np.resize([True, False], number)[rng.permutation(number)]
        label = (ill[owner] & (rng.random(len(owner)) < 0.7)).astype(float)
        noise = rng.normal(size=len(owner)) * 0.9 + rng.normal(size=number)[owner] * 0.44
        logit = separation * (label - 0.5) * 1.6 + 1.6 * noise + rng.normal() * 0.3
        return Scores(logit, label, np.full(len(owner), np.nan), owner.astype(str))

    sizes = (round(0.6 * patients), patients)  # as the ingest splits
    return tuple({f"hospital-{n:02}": scores(size) for n in range(hospitals)} for size in sizes)


def coarse(hospitals: Hospitals, least: int) -> Counts:
    """Counts of hospitals together, as the centre has them."""
    rng = np.random.default_rng(0)
    return merge_counts(spread(tally_scores(one, least, 0, rng)) for one in hospitals.values())


def exact(hospitals: Hospitals) -> Counts:
    """Counts of hospitals together in bins of .02, which the guide's figures call exact."""
    rng = np.random.default_rng(0)
    return merge_counts(count_scores(one, 0, rng) for one in hospitals.values())


def differences(cases: list[Case], least: int) -> dict[str, np.ndarray]:
    """Coarse minus exact, a value for each case."""
    found = {"auc": [], "f1": [], "exact": [], "cells": []}
    for validation, test in cases:
        values = []
        for count in (lambda one: coarse(one, least), exact):
            counts, chosen = count(test).counts[0], count(validation).counts[0]
            values.append((auc(counts), f1(counts, best_threshold(chosen)) if chosen[1].any() else np.nan))
        for key, (ours, true) in zip(("auc", "f1"), zip(*values, strict=True), strict=True):
            found[key].append(float(ours - true))
        found["exact"].append(float(values[1][0]))
        rng = np.random.default_rng(0)
        found["cells"] += [len(tally_scores(one, least, 0, rng).edges) - 1 for one in test.values()]
    return {key: np.array(value) for key, value in found.items()}


def main() -> None:
    """Print the table."""
    table = Table("scores", "min_patients", "AUC", "cells", "AUC: mean", "95 % within", "F1: mean", "95 % within")
    sources: dict[str, Callable[[], list[Case]]] = {
        "stored, 4 x 18 patients x 6": stored_cases,
        "drawn, 4 x 14 x 7": lambda: [drawn_case(2.7, 14, 7, seed) for seed in range(100)],
        "drawn, 4 x 14 x 7, harder": lambda: [drawn_case(1.2, 14, 7, seed) for seed in range(100)],
        "drawn, 4 x 400 x 7": lambda: [drawn_case(2.7, 400, 7, seed) for seed in range(20)],
        "drawn, 4 x 400 x 7, harder": lambda: [drawn_case(1.2, 400, 7, seed) for seed in range(20)],
    }
    for name, source in sources.items():
        cases = source()
        for least in (1, 5, 10):
            found = differences(cases, least)
            errors = [
                "– –"
                if np.isnan(found[k]).all()
                else f"{np.nanmean(found[k]):+.4f} {np.nanquantile(np.abs(found[k]), 0.95):.4f}"
                for k in ("auc", "f1")
            ]
            columns = [part for text in errors for part in text.split()]
            table.add_row(
                name, str(least), f"{np.median(found['exact']):.3f}", f"{found['cells'].mean():.1f}", *columns
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
