"""A round as its line of rounds.jsonl, and in words."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from server.federation.strategy import RoundResult, SiteRound
from server.storage.lines import RoundLine, SiteLine
from shared.metrics import auc
from shared.tally import spread

LOSSES = ("total", "cls", "seg", "rec")


def describe_round(number: int, result: RoundResult) -> RoundLine:
    """Return a round's line."""
    return RoundLine(
        round=number,
        time=time.time(),
        seconds=result.seconds,
        bytes_down=result.bytes_down,
        bytes_up=sum(site.bytes_up for site in result.sites.values()),
        sites={name: _site_line(site, result.shrunk.get(name)) for name, site in result.sites.items()},
        refused=result.refused,
        agreement=_agreement(result),
    )


def _agreement(result: RoundResult) -> float | None:
    length = float(np.mean([site.norm for site in result.sites.values()])) if result.sites else 0.0
    return float(f"{result.moved / length:.4g}") if length else None


def _site_line(site: SiteRound, shrunk: float | None) -> SiteLine:
    slices, area, dice = site.metrics.get("slices"), None, None
    losses = {name: site.metrics[name] / slices for name in LOSSES if name in site.metrics} if slices else {}
    if site.tally is not None:
        area = float(auc(spread(site.tally).counts[0]))
        area = None if np.isnan(area) else area
        dice = float(site.tally.dice_sum[0] / max(site.tally.dice_slices[0], 1))
    return SiteLine(
        weight=site.weight,
        bytes_up=site.bytes_up,
        norm=float(f"{site.norm:.6g}"),
        audit=site.audit,
        shrunk=shrunk,
        withheld=site.withheld,
        seconds=site.metrics.get("seconds"),
        val_auc_before=area,
        val_dice_before=dice,
        **losses,
    )


def round_text(line: RoundLine, rounds: int) -> str:
    """Return a round as a line of the log, and one for each hospital with which something was wrong."""
    sites = line.sites.values()
    means = {name: _mean(getattr(site, name) for site in sites) for name in LOSSES}
    text = f"round {line.round}/{rounds}: {len(line.sites)} hospitals, {line.seconds:.1f} s"
    if None not in means.values():
        text += ", loss " + " ".join(f"{name} {value:.3f}" for name, value in means.items())
    area = _mean(site.val_auc_before for site in sites)
    if area is not None:
        text += f", validation AUC before it {area:.3f}"
    shrunk = {name: site.shrunk for name, site in line.sites.items() if site.shrunk is not None}
    text += "".join(
        f"\n  {name}: its update was shortened to {share:.2g} of its length" for name, share in shrunk.items()
    )
    return text + "".join(f"\n  refused {site}: {why}" for site, why in line.refused.items())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
