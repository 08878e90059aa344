"""The pieces of an experiment that a worker does: draw hospitals, train one model, measure one arm."""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from server.federation.heads import fit_probe
from shared.config import RunConfig, parse_config
from shared.host.files import replace_text
from shared.metrics import Scores
from shared.model.batches import Batch, read_batch
from shared.model.swin import VARIANTS, MultiTaskSwin
from shared.slices import SliceCache
from shared.wire.records import Tensors
from simulations.phantom.draw_caches import AS_DRAWN, View, draw_hospitals, draw_missing
from simulations.phantom.hospitals import Hospital
from simulations.studies.adapting import brain_level_hu, calibrated, retrained
from simulations.studies.ceiling import fit_radiomics, oracle_scores, radiomics, radiomics_scores
from simulations.studies.consortia import DEVELOPMENT, Consortium, consortium
from simulations.studies.design import Arm, Job, Training, trainings
from simulations.studies.measures import (
    Voter,
    attention,
    load,
    reliance,
    score,
    scores_as_json,
    similarity,
    task_cosines,
)
from simulations.studies.training import Trained, pool, read_trained, save_trained, train, with_steps

_COSINE_SLICES = 48
_NOISELESS = View(noiseless=True, tested=True)  # what the ceiling's reader sees, in the order of the tested slices
_COSINE_MOMENTS = 10  # of a training, at which the tasks' gradients are compared


@dataclass(frozen=True)
class Drawn:
    """A consortium's slices, drawn as they are needed.

    Attributes:
      group: whose.
      seed: of the patients.
      store: where drawn slices are kept.
    """

    group: Consortium
    seed: int
    store: Path

    def caches(self, hospitals: Sequence[Hospital], view: View = AS_DRAWN) -> dict[str, SliceCache]:
        """Name -> slices."""
        return draw_hospitals(hospitals, self.seed, self.store / "hospitals", view, workers=1)

    def training(self, view: View = AS_DRAWN) -> dict[str, SliceCache]:
        """The training hospitals."""
        return self.caches(self.group.training, view)

    def tests(self, view: View = AS_DRAWN) -> dict[str, dict[str, SliceCache]]:
        """Group -> name -> slices, of those that are tested whole."""
        return {name: self.caches(hospitals, view) for name, hospitals in self.group.tests.items()}


def draw_for(jobs: Iterable[Job], store: Path, say: Callable[[str], None]) -> None:
    """Draw all hospitals that jobs need, on every core."""

    def told(name: str, done: int, total: int) -> None:
        if done == total:
            say(f"drew {name}")

    draw_missing([one for job in jobs for one in _needed(job)], store / "hospitals", progress=told)


def _needed(job: Job) -> list[tuple[Hospital, int, View]]:
    """The hospitals of one job, and how they are drawn."""
    arm, group = job.arm, consortium(job.arm.consortium)
    every = [*group.training, *(h for hospitals in group.tests.values() for h in hospitals)]
    wanted = [(hospital, AS_DRAWN) for hospital in every]
    if arm.heads == "probe":
        wanted.append((DEVELOPMENT, AS_DRAWN))
    if "reliance" in arm.measures:
        wanted += [(hospital, _edited(on)) for on in (True, False) for hospital in group.training]
    if "ceiling" in arm.measures:
        wanted += [(hospital, _NOISELESS) for hospital in every]
    return [(hospital, job.seed, view) for hospital, view in wanted]


def _edited(feature_on: bool) -> View:
    """The counterfactual: tested patients with the planted feature, or without it."""
    return View(feature_on=feature_on, tested=True)


def train_one(training: Training, store: Path) -> str:
    """Train one model and keep it; a line about it."""
    drawn = Drawn(consortium(training.consortium), training.seed, store)
    caches = drawn.caches([h for h in drawn.group.training if h.number in training.hospitals])
    config = training_config(training, drawn)
    rounds = config.federation.rounds
    first_kept = rounds - round(training.last * rounds)
    every = max(1, rounds // _COSINE_MOMENTS)
    probe = _probe_batch(caches, config) if training.cosines else None
    tail: list[Tensors] = []
    cosines: list[dict[str, float]] = []

    def after_round(number: int, arrays: Tensors, model: MultiTaskSwin) -> None:
        if number > first_kept:
            tail.append(arrays)
        if probe is not None and (number % every == 0 or number == 1):
            cosines.append({"round": number, "rounds": rounds} | task_cosines(model, probe))

    trained = train(caches, config, training.mode, training.adjust, training.attack, after_round=after_round)
    if tail:  # stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) of the global encoder
        trained = replace(trained, encoder={n: np.mean([a[n] for a in tail], axis=0) for n in trained.encoder})
    save_trained(training.folder(store), replace(trained, cosines=tuple(cosines)))
    what = f"{training.consortium}, {training.mode}, seed {training.seed}"
    return f"{what}: {trained.images} slices in {trained.seconds:.0f} s"


def training_config(training: Training, drawn: Drawn) -> RunConfig:
    """The run config with the number of rounds that its steps need."""
    caches = drawn.caches([h for h in drawn.group.training if h.number in training.hospitals])
    sites = {"pool": pool(caches)} if training.mode == "pooled" else caches
    return with_steps(parse_config(training.config), sites, training.steps)


def _probe_batch(caches: dict[str, SliceCache], config: RunConfig) -> Batch:
    """Validation slices with a label, evenly over hospitals, as one batch."""
    whole = pool(caches)
    rows = np.nonzero((whole.split == "val") & ~np.isnan(whole.label))[0]
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _COSINE_SLICES).astype(int))]
    return read_batch(whole, rows, config.model.windows(), VARIANTS[config.model.variant].image_size)


def measure_job(job: Job, store: Path, commit: str) -> str:
    """Measure one arm with one seed and store the result; a line about it."""
    started = time.perf_counter()
    arm, needed = job.arm, trainings(job)
    own = needed[:-1] if arm.against else needed
    drawn = Drawn(consortium(arm.consortium), job.seed, store)
    config = training_config(own[0], drawn)
    trained = [read_trained(t.folder(store)) for t in own]
    voters = [Voter(t.encoder, _heads(arm, t, config, drawn)) for t in trained]
    measures: dict[str, object] = {"scores": _scores(arm, voters, config, drawn)}
    if "attention" in arm.measures:
        groups = {"seen": drawn.training()} | drawn.tests()
        measures["attention"] = {name: attention(voters[0], caches, config) for name, caches in groups.items()}
    if "reliance" in arm.measures:
        on, off = (pool(drawn.training(_edited(state))) for state in (True, False))
        measures["reliance"] = reliance(voters[0], on, off, config)
    if "similarity" in arm.measures:
        other = read_trained(needed[-1].folder(store))
        against = Voter(other.encoder, (other.average(),))
        measures["similarity"] = similarity(voters[0], against, drawn.training(), config)
    if "cosines" in arm.measures:
        measures["cosines"] = trained[0].cosines
    if "ceiling" in arm.measures:
        measures["ceiling"] = _ceiling(drawn)
    _store(job, config, commit, trained, measures)
    return f"{job.experiment.name}, {arm.name}, seed {job.seed} in {time.perf_counter() - started:.0f} s"


def _heads(arm: Arm, trained: Trained, config: RunConfig, drawn: Drawn) -> tuple[Tensors, ...]:
    """Return the heads of a model, as federation.heads has them."""
    if arm.heads == "ensemble":
        return tuple(trained.heads.values())
    average = trained.average()
    if arm.heads == "average":
        return (average,)
    model = load(Voter(trained.encoder, (average,)), config)
    (cache,) = drawn.caches([DEVELOPMENT]).values()
    return (fit_probe(model, cache, config),)


def _scores(arm: Arm, voters: list[Voter], config: RunConfig, drawn: Drawn) -> dict[str, dict[str, dict]]:
    """Group -> hospital -> scores of slices; "val" and "seen" are splits of the training hospitals."""
    training = drawn.training()
    result: dict[str, dict[str, dict]] = {}
    for group, split in (("val", "val"), ("seen", "test")):
        result[group] = {
            name: scores_as_json(score(voters, cache, cache.rows(split), config)) for name, cache in training.items()
        }
    level_hu = 0.0
    if arm.adapt == "calibration":
        level_hu = float(np.median([brain_level_hu(cache) for cache in training.values()]))
    for group, caches in drawn.tests().items():
        result[group] = {}
        for name, cache in caches.items():
            tested = voters
            if arm.adapt == "calibration":
                cache = calibrated(cache, level_hu)
            if arm.adapt == "reconstruction":
                tested = [_retrained(voter, cache, config) for voter in voters]
            result[group][name] = scores_as_json(score(tested, cache, cache.rows(), config))
    return result


def _retrained(voter: Voter, cache: SliceCache, config: RunConfig) -> Voter:
    """A voter whose encoder was trained on to reconstruct a hospital's slices."""
    model = retrained(load(voter, config), cache, config)
    encoder = {n: v.detach().numpy() for n, v in model.state_dict().items() if n.startswith("encoder.")}
    return Voter(encoder, voter.heads)


def _ceiling(drawn: Drawn) -> dict[str, dict[str, dict[str, dict]]]:
    """Scores of the oracle and of radiomics fitted on the training hospitals' training patients."""
    training = pool(drawn.training())
    rows = training.rows("train")
    rows = rows[~np.isnan(training.label[rows])]
    features = radiomics(training.hu[rows], training.masks[rows])
    estimator = fit_radiomics(features, training.label[rows], seed=drawn.seed)
    groups = {"seen": (training, pool(drawn.training(_NOISELESS)), training.rows("test"))}
    for name, caches in drawn.tests().items():
        whole = pool(caches)
        groups[name] = (whole, pool(drawn.tests(_NOISELESS)[name]), whole.rows())
    result: dict = {"oracle": {}, "radiomics": {}}
    for name, (cache, clean, chosen) in groups.items():
        logits = {
            "oracle": np.log1p(oracle_scores(clean.hu, cache.masks[chosen])),  # within the bins of shared/metrics
            "radiomics": radiomics_scores(estimator, radiomics(cache.hu[chosen], cache.masks[chosen])),
        }
        for reader, logit in logits.items():
            nothing = np.full(len(chosen), np.nan)
            scores = Scores(logit, cache.label[chosen], nothing, cache.patient[chosen])
            result[reader][name] = {"all": scores_as_json(scores)}
    return result


def _store(job: Job, config: RunConfig, commit: str, trained: list[Trained], measures: dict) -> None:
    """Write a result beside its place, and move it there whole."""
    trace = trained[0].trace
    content = {
        "experiment": job.experiment.name,
        "arm": job.arm.name,
        "seed": job.seed,
        "recipe": job.digest(),
        "commit": commit,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(sum(t.seconds for t in trained), 1),
        "slices_trained": sum(t.images for t in trained),
        "config": config.flat(),
        "trace": [{k: round(v, 5) for k, v in line.items()} for line in trace[:: max(1, len(trace) // 12)]],
        "measures": measures,
    }
    job.result.parent.mkdir(parents=True, exist_ok=True)
    replace_text(job.result, json.dumps(content, separators=(",", ":")))


@functools.cache
def machine() -> dict[str, str]:
    """Describe the machine of the experiments."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": model, "cores": str(os.cpu_count()), "accelerator": accelerator, "torch": torch.__version__}
