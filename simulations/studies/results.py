"""Read stored results: metrics of groups of hospitals, with their bootstrap samples.

Intervals are percentile bootstraps over patients, drawn within each hospital and seed, of the mean over seeds. The draws
depend on hospital and seed alone, so that two arms are compared on the same patients and a difference has an interval of
its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from shared.metrics import Counts, auc, best_threshold, count_scores, f1, merge_counts
from simulations.studies.design import Experiment, Job, jobs
from simulations.studies.measures import scores_from_json

REPLICATES = 1000
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
    """Read the stored result of an arm under the present recipe; None if there is none."""
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
        metrics = {
            "auc": auc(tally.counts),
            "dice": tally.dice_sum / tally.dice_slices,
            "alarms": tally.clear[:, 1] / tally.clear[:, 0],
            "detection": auc(tally.found),
        }
    if validation != "null":
        metrics["f1"] = f1(tally.counts, best_threshold(_tally(validation, seed, 0).counts[0]))
    return metrics


def _tally(content: str, seed: int, replicates: int) -> Counts:
    """Counts of hospitals together; the same draws of each one's patients for every arm."""
    return merge_counts(
        count_scores(scores_from_json(one), replicates, np.random.default_rng([zlib.crc32(name.encode()), seed]))
        for name, one in json.loads(content).items()
    )


def state(experiment: Experiment) -> tuple[int, int, int]:
    """Results that are stored, that are stored but of another recipe, and that are wanted."""
    every: list[Job] = list(jobs(experiment))
    done = sum(job.done() for job in every)
    return done, sum(job.result.is_file() for job in every) - done, len(every)
