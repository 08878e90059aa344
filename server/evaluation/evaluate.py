"""Evaluation of the global model on hospitals that never trained.

In: a finished run's folder and the site.yaml files of held-out hospitals whose caches lie at the server. Out: the
counts of every site under `evaluation/`, and the completed summary.json. The threshold for F1 comes from the training
hospitals' validation slices alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from server.evaluation.examples import draw_examples
from server.storage.checkpoint import load_checkpoint, read_tensors
from server.storage.lines import SiteSummary
from server.storage.run_folder import (
    EXAMPLES,
    STAGES,
    load_tallies,
    read_rounds,
    read_summary,
    save_tally,
    write_summary,
)
from shared.config import RunConfig
from shared.errors import HemafedError
from shared.groups import group
from shared.metrics import Counts, MetricsError, Tally, best_threshold, summarise
from shared.model.scoring import best_device, build_model, score_slices
from shared.model.swin import MultiTaskSwin
from shared.site import Site, read_site
from shared.slices import SliceCache, read_cache
from shared.tally import pooled, spread, tally_scores


class EvaluationError(HemafedError, ValueError):
    """An evaluation cannot be made; names the site and the next step."""


def open_held_out(path: Path) -> tuple[Site, SliceCache]:
    """A site on which the global model may be tested.

    Raises:
      EvaluationError: the site's role is not held-out, or it has no slices.
      SiteError, CacheError: no such site, or it was not ingested.
    """
    site = read_site(path)
    if site.role != "held-out":
        raise EvaluationError(
            f"site {site.name!r} has role {site.role!r}, expected 'held-out': a site that trained or was used to choose is "
            "no test of unseen hospitals"
        )
    cache = read_cache(site.cache)
    if not len(cache.label):
        raise EvaluationError(f"site {site.name!r}: its cache holds no slice; ingest a folder with head CT")
    return site, cache


def load_model(run: Path, config: RunConfig, stage: str) -> tuple[MultiTaskSwin, list[dict[str, torch.Tensor]]]:
    """The global model of a run before ("initial") or after ("final") training, and its sets of heads."""
    model = build_model(config.model, config.run.seed)
    if stage == "initial":
        arrays, _ = read_tensors(run / "checkpoint" / "initial.safetensors")
    else:
        saved = load_checkpoint(run / "checkpoint")
        if saved.round_number != config.federation.rounds:
            raise EvaluationError(
                f"run {run.resolve().name!r} has a whole checkpoint of round {saved.round_number}, expected of its last, "
                f"{config.federation.rounds}: resume the run first"
            )
        arrays = saved.arrays
    model.load_state_dict({n: torch.from_numpy(v) for n, v in arrays.items()}, strict=False)
    sets = []
    for path in sorted((run / "checkpoint").glob(f"heads-{stage}-*.safetensors")):
        tensors, _ = read_tensors(path)
        sets.append({n: torch.from_numpy(v) for n, v in tensors.items()})
    if not sets:
        raise EvaluationError(
            f"run {run.resolve().name!r} has no heads of its {stage} model: it did not finish; resume it first"
        )
    return model.to(best_device()), sets


def evaluate_site(
    model: MultiTaskSwin,
    heads: Sequence[Mapping[str, torch.Tensor]],
    site: Site,
    cache: SliceCache,
    config: RunConfig,
    repeats: bool = False,
) -> Tally:
    """Counts of one held-out site, all its slices; as coarse as what a training hospital sends.

    Args:
      model, heads: what is tested.
      site, cache: on which.
      config: of the run.
      repeats: whether the bootstrap's draws follow from the seed; for synthetic hospitals, since draws that two tests share
        would link their patients.
    """
    scores = score_slices(model, heads, cache, cache.rows(), config.model, config.train.precision)
    rng = np.random.default_rng([*site.key()[:8], config.run.seed] if repeats else None)
    return tally_scores(scores, site.policy.min_patients, config.evaluation.replicates, rng)


def evaluate_unseen(
    run: Path,
    config: RunConfig,
    site_files: Sequence[Path],
    progress: Callable[[str], None] = lambda line: None,
    repeats: bool = False,
) -> None:
    """Test the initial and the final model on held-out sites and complete the run's summary.

    Counts of other held-out sites, of earlier calls or sent by their hospitals, stay.

    Args:
      run: folder of a run that has finished training.
      config: the run's.
      site_files: site.yaml of each held-out site.
      progress: called with what is tested.
      repeats: see evaluate_site.
    Raises:
      EvaluationError, SiteError, CacheError: a site cannot be used; nothing is written then.
      EvaluationError, RunError: counts of another site cannot be used; those of this call are kept.
    """
    sites = [open_held_out(path) for path in site_files]
    if len({site.name for site, _ in sites}) != len(sites):
        raise EvaluationError(f"sites {[site.name for site, _ in sites]}: a name stands twice; expected each site once")
    trained = {site.name for site, _ in sites} & trained_sites(run)
    if trained:
        raise EvaluationError(f"sites {sorted(trained)} trained in this run; expected hospitals that never did")
    models = {stage: load_model(run, config, stage) for stage in STAGES}
    hashes = {stage: model_hash(*loaded) for stage, loaded in models.items()}
    for stage, (model, heads) in models.items():
        for site, cache in sites:
            progress(f"{stage} model on {site.name}: {len(cache.label)} slices")
            tally = evaluate_site(model, heads, site, cache, config, repeats)
            save_tally(run, stage, "unseen", site.name, tally, hashes[stage])
    check_unseen(run, hashes.__getitem__)
    draw_examples(run / "evaluation" / EXAMPLES, model, heads, {site.name: cache for site, cache in sites}, config)
    tested = {site.name: SiteSummary(site.role, **cache.counts()) for site, cache in sites}
    summary = read_summary(run)
    write_summary(run, replace(summary, sites=summary.sites | tested))
    summarise_run(run)


def trained_sites(run: Path) -> set[str]:
    """Names of the sites that took part in a round."""
    return {site for line in read_rounds(run) for site in line.sites}


def model_hash(model: MultiTaskSwin, heads: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """12 hexadecimal digits of a global model: its encoder and its sets of heads."""
    digest = hashlib.sha256()
    encoder = {name: value for name, value in model.state_dict().items() if group(name) == "encoder"}
    for tensors in (encoder, *heads):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def check_unseen(run: Path, hash_of: Callable[[str], str]) -> None:
    """That the counts of held-out hospitals, which may have come from other machines, are of this run's models.

    Args:
      run: the run's folder.
      hash_of: model_hash of the model of a stage; asked only where there are counts.
    Raises:
      EvaluationError, RunError: a file is of another model or site, of a site that trained, or alone.
    """
    sites = {stage: {path.stem for path in (run / "evaluation" / stage / "unseen").glob("*.npz")} for stage in STAGES}
    alone = sites["initial"] ^ sites["final"]
    if alone:
        raise EvaluationError(
            f"counts of {sorted(alone)} are in one of {' and '.join(str(run / 'evaluation' / s / 'unseen') for s in STAGES)}; expected in "
            "both: the hospital sends two files; or test it again"
        )
    trained = sites["final"] & trained_sites(run)
    if trained:
        raise EvaluationError(
            f"counts of {sorted(trained)} are among the unseen, and these trained in this run; remove them"
        )
    for stage in STAGES if sites["final"] else ():
        load_tallies(run, stage, "unseen", hash_of(stage))


def summarise_run(run: Path) -> None:
    """Compute every metric from the counts that are there, and put them into summary.json."""
    results = {stage: _summarise_stage(run, stage) for stage in STAGES}
    changes = {"evaluation": results["final"], "evaluation_before_training": results["initial"]}
    write_summary(run, replace(read_summary(run), **changes))


def _summarise_stage(run: Path, stage: str) -> dict:
    """Metrics of one model: seen, unseen, per site."""
    validation = load_tallies(run, stage, "val")
    try:
        threshold = best_threshold(pooled(validation.values()).counts[0])
    except MetricsError:
        threshold = None  # the hospitals' policies keep their validation counts: F1 stays undefined
    result: dict = {"threshold_bin": threshold, "per_site": {}}
    for part in ("seen", "unseen"):
        tallies = load_tallies(run, stage, part)
        if not tallies:
            continue
        result[part] = _as_dict(pooled(tallies.values()), threshold)
        for site, tally in tallies.items():
            result["per_site"][site] = {"part": part, **_as_dict(spread(tally), threshold)}
    return result


def _as_dict(counts: Counts, threshold: int | None) -> dict:
    """Estimates as plain numbers."""
    return {name: asdict(estimate) for name, estimate in summarise(counts, threshold).items()}
