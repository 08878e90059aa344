"""Test a model of the run on the hospital's own validation and test splits; coarse counts leave, once for each model.

In: an order, checked; the run config; the slice cache. Out: arrays of counts for each split that the policy releases. What
is refused is refused before a slice is scored, and depends on no score.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from client.boundary.evaluations import keep_answer, kept_answer, reserve
from client.boundary.footing import ModelNotOfRunError, check_final, check_initial
from client.boundary.orders import EvaluationOrder
from client.boundary.policy import PATIENTS, PolicyError, metrics_refusal
from client.training.local_state import LocalState
from client.training.round import Learner, TrainError
from shared.config import RunConfig
from shared.groups import TENSOR_GROUPS, group
from shared.model.scoring import build_model, score_slices
from shared.model.swin import MultiTaskSwin
from shared.refusals import Refusal
from shared.site import Site
from shared.slices import SliceCache
from shared.tally import tally_scores
from shared.wire.records import PROBE, Tensors, expected_shapes, from_record, tally_to_arrays, tested_hash, to_arrays

SPLITS = ("val", "test")
Answer = dict[str, dict[str, NDArray]]  # split -> arrays of its tally


def counted_patients(cache: SliceCache, split: str) -> int:
    """Count the patients of a split with a label or a mask."""
    rows = cache.rows(split)
    counted = ~np.isnan(cache.label[rows]) | cache.has_mask[rows]
    return len(np.unique(cache.patient[rows][counted]))


def initial_model(config: RunConfig) -> dict[str, NDArray[np.float32]]:
    """The tensors that the run's seed gives."""
    return to_arrays(build_model(config.model, config.run.seed).state_dict(), TENSOR_GROUPS)


def evaluate_model(
    site: Site,
    config: RunConfig,
    cache: SliceCache,
    order: EvaluationOrder,
    local: tuple[Learner, LocalState, int],
    draws: Callable[[str], np.random.Generator],
) -> tuple[Answer, dict[str, str]]:
    """Answer an order to test a model, from the disk if it was answered before.

    Args:
      site, config, cache: the hospital's.
      order: what is asked.
      local: what learns here, where its state is kept, and the last round that it trained.
      draws: the bootstrap's draws for a split.
    Returns:
      Per split the arrays of its tally; and facts: why a split is withheld, and the model's hash.
    Raises:
      PolicyError: the policy withholds both splits.
      ModelNotOfRunError, TrainError, EvaluationsError, LedgerError, UpdateError: the model is not tested.
      MetricsError: it has diverged.
    """
    learner, state, _ = local
    kept = kept_answer(state.folder, order.stage)
    if kept is not None:
        arrays, facts = kept
        return _by_split(arrays), facts
    withheld = {split: metrics_refusal(site, counted_patients(cache, split)) for split in SPLITS}
    if all(withheld.values()):
        raise PolicyError(f"site {site.name!r} does not release counts of its splits: {withheld}", Refusal.METRICS)
    encoder, sets = _model_of_run(config, order, local)
    model = tested_hash(encoder, sets)
    reserve(site, order.run, order.stage, model)
    learner.model.load_state_dict({name: torch.from_numpy(value) for name, value in encoder.items()}, strict=False)
    heads = [{name: torch.from_numpy(value) for name, value in one.items()} for one in sets]
    answer = {}
    for split in SPLITS:
        if not withheld[split]:
            rows = cache.rows(split)
            scores = score_slices(learner.model, heads, cache, rows, config.model, config.train.precision)
            replicates = config.evaluation.replicates if split == "test" else 0
            tally = tally_scores(scores, site.policy.min_patients, replicates, draws(split))
            answer[split] = tally_to_arrays(tally)
    facts = {"withheld": "; ".join(f"{s}: {why}" for s, why in withheld.items() if why), "model": model}
    flat = {f"{split}/{name}": value for split, arrays in answer.items() for name, value in arrays.items()}
    keep_answer(state.folder, order.stage, flat, facts)
    return answer, facts


def patients_in(answer: Answer) -> int:
    """Return the fewest patients that a split's counts cover."""
    return min(int(arrays[PATIENTS][0]) for arrays in answer.values())


def _by_split(arrays: dict[str, NDArray]) -> Answer:
    answer: Answer = {}
    for name, value in arrays.items():
        split, _, key = name.partition("/")
        answer.setdefault(split, {})[key] = value
    return answer


def _model_of_run(
    config: RunConfig, order: EvaluationOrder, local: tuple[Learner, LocalState, int]
) -> tuple[Tensors, list[Tensors]]:
    """The encoder and the sets of heads, checked against what the hospital knows of the run."""
    learner, state, trained = local
    encoder, sets = _tensors(learner.model, config, order)
    built = initial_model(config)
    if order.stage == "initial":
        if trained:
            raise ModelNotOfRunError("the hospital has trained in this run; the initial model is tested before")
        check_initial(sets[0], built)
        if not config.model.brought:
            check_initial(encoder, built)
        return encoder, sets
    footing = state.footing()
    if not trained or footing is None:
        raise TrainError("the hospital has trained no round of this run", Refusal.NOT_TRAINED)
    own = {n: v for n, v in to_arrays(learner.model.state_dict(), TENSOR_GROUPS).items() if group(n) != "encoder"}
    check_final(config, footing, encoder, sets, own, built)
    return encoder, sets


def _tensors(model: MultiTaskSwin, config: RunConfig, order: EvaluationOrder) -> tuple[Tensors, list[Tensors]]:
    """Read the order's tensors as arrays of known names, shapes and finite values."""
    shapes = expected_shapes(model.state_dict(), TENSOR_GROUPS)
    encoder = from_record(order.encoder, {n: s for n, s in shapes.items() if group(n) == "encoder"})
    heads = {n: s for n, s in shapes.items() if group(n) != "encoder"}
    probe = order.stage == "final" and config.federation.heads == "probe" and config.federation.share != "all"
    expected = {name: heads[name] for name in PROBE} if probe else heads
    return encoder, [from_record(record, expected) for record in order.heads]
