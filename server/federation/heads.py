"""Heads of the global model: the hospitals' own at the end of a run, as one mean or an ensemble, or the centre's probe.

Heads stay in the hospitals during a run; at its end those come here that hospitals release.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from server.federation.aggregate import WeightedSum, fold, mean
from server.federation.exchange import content_or_raise, send_and_receive
from server.federation.robust import combine, is_plain
from server.federation.roster import Participant, QuorumError
from shared.config import ConfigError, FederationSettings, RunConfig
from shared.errors import HemafedError
from shared.groups import HEADS, TENSOR_GROUPS
from shared.model.batches import read_batch
from shared.model.swin import MultiTaskSwin, autocast
from shared.site import read_site
from shared.slices import SliceCache, read_cache
from shared.wire.records import Tensors, UpdateError, expected_shapes, from_record, to_arrays, typed_record

log = logging.getLogger("hemafed.server")

PROBE_BATCH = 32
PROBE_WORDS = "federation.heads = 'probe' and federation.development_site, data of your own on which a head for classification is fitted"


class ProbeError(HemafedError, ValueError):
    """A head cannot be fitted on the development site."""


def keeps_heads(settings: FederationSettings, member: Participant) -> str:
    """Return why a hospital cannot supply heads of the final model; empty if it can, or if none are needed."""
    if settings.share == "all" or settings.heads == "probe" or member.release.issuperset(HEADS):
        return ""
    return (
        f"its policy.release is {sorted(member.release)}, and federation.heads = {settings.heads!r} needs its heads at the end; ask it "
        f"for {list(TENSOR_GROUPS)}, or use {PROBE_WORDS}"
    )


def final_heads(
    grid: Grid, members: list[Participant], config: RunConfig, run: str, arrays: Tensors, model: MultiTaskSwin
) -> dict[str, Tensors]:
    """Build the heads of the global model: name -> tensors; several make an ensemble.

    The average is by federation.rule and federation.norm_bound, as that of a round.

    Raises:
      QuorumError: with average or ensemble, fewer hospitals than federation.quorum release their heads.
    """
    settings = config.federation
    if settings.share == "all":
        return {"average": {name: value for name, value in arrays.items() if not name.startswith("encoder.")}}
    if settings.heads == "probe":
        site = read_site(Path(settings.development_site))
        if site.role == "held-out":
            raise ConfigError(
                f"federation.development_site {site.name!r} has role held-out; expected a site that no result comes from"
            )
        model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=False)
        return {"probe": fit_probe(model, read_cache(site.cache), config)}
    expected = expected_shapes(model.state_dict(), HEADS)
    order = RecordDict({"config": ConfigRecord({"run": run, "groups": ",".join(HEADS)})})
    messages = {m.site: Message(order, dst_node_id=m.node_id, message_type="query.heads") for m in members}
    weights = {m.site: m.weight for m in members}
    total, released, refused = WeightedSum({}), {}, {}
    each = settings.heads == "ensemble" or not is_plain(settings)
    for site, reply in send_and_receive(grid, messages, settings.round_deadline_s):
        try:
            tensors = from_record(
                typed_record(content_or_raise(reply, settings.round_deadline_s), "update", ArrayRecord), expected
            )
        except UpdateError as error:
            refused[site] = str(error)
            log.warning(f"{site}: no heads: {error}")
            continue
        if each:
            released[site] = tensors
        else:
            total = fold(total, tensors, weights[site])
    given = len(messages) - len(refused)
    if given < settings.quorum:
        reasons = "".join(f"\n  {site}: {why}" for site, why in refused.items())
        raise QuorumError(
            f"heads came from {given} hospitals, federation.quorum is {settings.quorum}; every round is kept: resume the run "
            f"when they release them, or with {PROBE_WORDS}{reasons}"
        )
    if settings.heads == "ensemble":
        return released
    if not each:
        return {"average": mean(total)}
    # As in a round; all hospitals' heads began as those of the run's initial model.
    combined = combine(released, weights, to_arrays(model.state_dict(), HEADS), settings)
    for site, share in combined.shrunk.items():
        log.warning(f"{site}: its heads' way from the initial ones was shortened to {share:.2g} of its length")
    return {"average": combined.arrays}


def fit_probe(model: MultiTaskSwin, cache: SliceCache, config: RunConfig) -> dict[str, NDArray[np.float32]]:
    """A linear classification head fitted on a development site, for federation.heads = "probe".

    Logistic regression on the pooled last stage, standardised by the head's own norm.

    Returns:
      Tensors cls.weight (1, D), cls.bias (1,), cls.norm.running_mean and cls.norm.running_var (D,).
    Raises:
      ProbeError: the development site's labels are all alike.
    """
    rows = cache.rows()[~np.isnan(cache.label)]
    labels = cache.label[rows].astype(int)
    if len(np.unique(labels)) < 2:
        raise ProbeError("the development site's labels are all alike; expected slices with and without the marker")
    features = []
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad(), autocast(config.train.precision, device):
        for start in range(0, len(rows), PROBE_BATCH):
            batch = read_batch(cache, rows[start : start + PROBE_BATCH], config.model.windows(), model.shape.image_size)
            features.append(model.pool(model.encode(batch.image.to(device))).float().cpu().numpy())
    scaler, regression = StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)
    make_pipeline(scaler, regression).fit(np.concatenate(features), labels)
    spread = np.sqrt(scaler.scale_**2 + model.cls.norm.eps)  # what the head's norm will divide by
    head = {
        "cls.weight": regression.coef_ * spread / scaler.scale_,
        "cls.bias": regression.intercept_,
        "cls.norm.running_mean": scaler.mean_,
        "cls.norm.running_var": scaler.scale_**2,
    }
    return {name: value.astype(np.float32) for name, value in head.items()}
