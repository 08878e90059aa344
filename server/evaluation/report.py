"""One page about a run: how good, for whom, at what cost.

In: a run's folder. Out: report.html, one file without links to others. It shows what is in the folder and computes no
metric of its own.
"""

from __future__ import annotations

from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from server.storage.lines import RoundLine, SiteSummary, Summary
from server.storage.run_folder import EXAMPLES, load_tallies, read_config, read_rounds, read_summary
from shared.metrics import AREAS_MM2, roc_points
from shared.page import COLOURS, STYLE, data_uri, plain_axes, svg_uri
from shared.tally import pooled

SEEN, UNSEEN, QUIET = COLOURS[0], COLOURS[1], "#9aa5ab"

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>hemafed run {{ run }}</title>
<style>
{{ style }}</style></head><body>
<h1>Run {{ run }}</h1>
<p class="note">{{ config.federation.rounds }} rounds of {{ config.federation.strategy }} on {{ training|length }} training hospitals; shared: {{ config.federation.share }}; heads of the global model: {{ config.federation.heads }}; model {{ config.model.variant }}; config {{ config_hash }}; seed {{ config.run.seed }}.</p>
<div class="cards">
{% for card in cards %}<div class="card"><span>{{ card.title }}</span><b>{{ card.value }}</b><span>{{ card.note }}</span></div>
{% endfor %}</div>

<h2>How good</h2>
<p class="note">Slices of patients that were not trained on. Intervals: 95 %, bootstrap over patients within each hospital ({{ config.evaluation.replicates }} samples). Dice: mean over slices with blood. Alarms: share of the slices without blood in which the model marks {{ alarm_mm2|round|int }} mm² or more. Detection: AUC of a patient with blood against one without, by the largest area marked in a slice. F1 at the threshold that was best on the training hospitals' validation slices (a dash if their policies kept those counts). Hospitals count in cells of neighbouring scores with several patients each, so curves and F1 are interpolated within cells.{% if not unseen %} No held-out hospital has been tested yet: <code>hemafed-server evaluate</code>.{% endif %}</p>
<div class="scroll"><table><tr><th>Hospitals</th><th>Model</th><th class="n">AUC</th><th class="n">F1</th><th class="n">Dice</th><th class="n">Alarms</th><th class="n">Detection</th><th class="n">Slices</th><th class="n">Patients</th></tr>
{% for row in main_rows %}<tr><td>{{ row.part }}</td><td>{{ row.stage }}</td>{% for m in row.metrics %}<td class="n">{{ m.value }} <span class="ci">{{ m.interval }}</span></td>{% endfor %}<td class="n">{{ row.slices }}</td><td class="n">{{ row.patients }}</td></tr>
{% endfor %}</table></div>

<h2>Per hospital</h2>
<div class="scroll"><table><tr><th>Hospital</th><th>Part</th><th class="n">Patients</th><th class="n">Slices</th><th class="n">Positive</th><th class="n">AUC</th><th class="n">F1</th><th class="n">Dice</th><th class="n">Alarms</th><th class="n">Detection</th></tr>
{% for row in site_rows %}<tr><td>{{ row.site }}</td><td>{{ row.part }}</td><td class="n">{{ row.patients }}</td><td class="n">{{ row.slices }}</td><td class="n">{{ row.positives }}</td>{% for m in row.metrics %}<td class="n">{{ m.value }} <span class="ci">{{ m.interval }}</span></td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="note">Patients, slices and positives count the whole hospital; a dash is a number that the hospital's policy held back or that is not defined.</p>

<h2>Round by round</h2>
<img alt="Losses, validation AUC and agreement of updates per round" src="{{ curves }}">
<p class="note">Losses: mean over the slices of a local round. Validation AUC: the global encoder as a hospital received it, with that hospital's own head; the first point is the model before training. Agreement: length of the mean update in mean lengths of the hospitals' own; 1 is one direction, the dashed line updates that have nothing in common.</p>

<h2>ROC</h2>
<img alt="ROC curves" src="{{ roc }}">

{% if examples %}<h2>What it sees</h2>
<img alt="Example slices of held-out hospitals" src="{{ examples }}">
<p class="note">Slices of held-out hospitals, brain window 0 to 80 HU. Red: the reader's mask; yellow: the predicted hematoma. Grad-CAM: evidence for a hypodensity. These pictures are of patients of the held-out hospitals: share this page as their data may be shared.</p>{% endif %}

<h2>Who took part, and the cost</h2>
<div class="scroll"><table><tr><th>Hospital</th><th class="n">Weight</th><th class="n">Rounds</th><th class="n">Refused</th><th class="n">Sent per round</th><th class="n">Training per round</th></tr>
{% for row in part_rows %}<tr><td>{{ row.site }}</td><td class="n">{{ row.weight }}</td><td class="n">{{ row.rounds }}</td><td class="n">{{ row.refused }}</td><td class="n">{{ row.sent }}</td><td class="n">{{ row.seconds }}</td></tr>
{% endfor %}</table></div>
{% for line in refusals %}<p class="bad">{{ line }}</p>{% endfor %}

<details><summary>Config</summary><table>{% for key, value in config.flat().items() %}<tr><td><code>{{ key }}</code></td><td><code>{{ value }}</code></td></tr>{% endfor %}</table></details>
</body></html>
""")


def write_report(run: Path) -> Path:
    """Write report.html of a run, with what the folder holds so far.

    Args:
      run: a run's folder with a summary.
    Returns:
      The page's path.
    """
    config, summary, rounds = read_config(run), read_summary(run), read_rounds(run)
    after, before = summary.evaluation, summary.evaluation_before_training
    examples = run / "evaluation" / EXAMPLES
    page = _PAGE.render(
        style=Markup(STYLE),
        run=run.resolve().name,
        config=config,
        config_hash=summary.config_hash,
        training=[site for site in summary.sites.values() if site.role == "train"],
        unseen="unseen" in after,
        cards=_cards(summary, before, after),
        main_rows=_main_rows(before, after),
        site_rows=_site_rows(summary, after),
        part_rows=_part_rows(rounds),
        alarm_mm2=AREAS_MM2[0],
        refusals=[f"Round {r.round}: {site}: {why}" for r in rounds for site, why in r.refused.items()],
        curves=svg_uri(_curves(rounds)),
        roc=svg_uri(_roc(run)),
        examples=data_uri(examples.read_bytes(), "image/png") if examples.is_file() else "",
    )
    path = run / "report.html"
    path.write_text(page)
    return path


def metric_text(metric: dict | None) -> dict[str, str]:
    """A metric as "0.873" and "[0.81, 0.92]"; a dash for what is not defined."""
    if not metric or metric["value"] is None:
        return {"value": "–", "interval": ""}
    interval = "" if metric["low"] is None else f"[{metric['low']:.2f}, {metric['high']:.2f}]"
    return {"value": f"{metric['value']:.3f}", "interval": interval}


def _metrics(part: dict) -> list[dict[str, str]]:
    """A part's metrics as text."""
    return [metric_text(part.get(name)) for name in ("auc", "f1", "dice", "alarms", "detection")]


def _cards(summary: Summary, before: dict, after: dict) -> list[dict[str, str]]:
    """The headline."""
    cards = []
    for part, title in (("seen", "AUC, hospitals that trained"), ("unseen", "AUC, unseen hospitals")):
        if part in after:
            now, was = metric_text(after[part]["auc"]), metric_text(before.get(part, {}).get("auc"))
            cards.append(
                {"title": title, "value": now["value"], "note": f"{now['interval']}, {was['value']} before training"}
            )
    if summary.bytes_up_per_round is not None:
        note = f"{summary.seconds_per_round:.0f} s a round, {summary.rounds} rounds"
        cards.append(
            {"title": "Sent by all hospitals in a round", "value": _size(summary.bytes_up_per_round), "note": note}
        )
    return cards


def _main_rows(before: dict, after: dict) -> list[dict]:
    """Seen and unseen, before and after training."""
    rows = []
    for part, label in (("seen", "trained (test split)"), ("unseen", "unseen")):
        for stage, result in (("before training", before), ("after training", after)):
            if part in result:
                auc = result[part]["auc"]
                rows.append(
                    {
                        "part": label,
                        "stage": stage,
                        "metrics": _metrics(result[part]),
                        "slices": auc["n_slices"],
                        "patients": auc["n_patients"],
                    }
                )
    return rows


def _site_rows(summary: Summary, after: dict) -> list[dict]:
    """One row per hospital; of one that sent its test's counts no more is known."""
    rows, known, tested = [], summary.sites, after.get("per_site", {})
    for site in sorted(known.keys() | tested.keys()):
        own, result = known.get(site, SiteSummary("")), tested.get(site, {})
        counts = {"patients": own.patients, "slices": own.slices, "positives": own.positives}
        shown = {name: "–" if count is None else count for name, count in counts.items()}
        rows.append({"site": site, "part": result.get("part", own.role), "metrics": _metrics(result), **shown})
    return rows


def _part_rows(rounds: list[RoundLine]) -> list[dict]:
    """Per training hospital: rounds, refusals, bytes, seconds."""
    names = sorted({name for line in rounds for name in [*line.sites, *line.refused]})
    rows = []
    for name in names:
        took = [line.sites[name] for line in rounds if name in line.sites]
        seconds = [site.seconds for site in took if site.seconds is not None]
        rows.append(
            {
                "site": name,
                "weight": f"{took[-1].weight:g}" if took else "–",
                "rounds": len(took),
                "refused": sum(name in line.refused for line in rounds),
                "sent": _size(float(np.mean([site.bytes_up for site in took]))) if took else "–",
                "seconds": f"{np.mean(seconds):.1f} s" if seconds else "–",
            }
        )
    return rows


def _size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _curves(rounds: list[RoundLine]) -> Figure:
    """Three losses and the validation AUC over the rounds, one line per hospital, and the agreement of their updates."""
    figure = Figure(figsize=(13, 2.9), layout="constrained")
    *panels, last = figure.subplots(1, 5)
    names = sorted({name for line in rounds for name in line.sites})
    titles = {
        "cls": "classification loss",
        "seg": "segmentation loss",
        "rec": "reconstruction loss",
        "val_auc_before": "validation AUC",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        shift = 1 if key == "val_auc_before" else 0  # measured before the round
        for number, name in enumerate(names):
            points = [
                (line.round - shift, getattr(line.sites[name], key))
                for line in rounds
                if name in line.sites and getattr(line.sites[name], key) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], lw=1.4, label=name)
        if key == "rec":
            axes.set_yscale("log")
        plain_axes(axes, title, "round")
    agreed = [(line.round, line.agreement, len(line.sites) ** -0.5) for line in rounds if line.agreement is not None]
    if agreed:
        number, found, unrelated = zip(*agreed, strict=True)
        last.plot(number, found, color=SEEN, lw=1.4)
        last.plot(number, unrelated, color=QUIET, lw=1.2, ls="--")
    last.set_ylim(0, 1)
    plain_axes(last, "agreement of updates", "round")
    if names:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 8) or 1, frameon=False, fontsize=8
        )
    return figure


def _roc(run: Path) -> Figure:
    """ROC of both parts, before and after training."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (part, title, colour) in zip(
        panels, (("seen", "hospitals that trained", SEEN), ("unseen", "unseen hospitals", UNSEEN)), strict=True
    ):
        axes.plot([0, 1], [0, 1], color="#d9dfe1", lw=1)
        for stage, style, label in (
            ("initial", {"color": QUIET, "ls": "--", "lw": 1.2}, "before training"),
            ("final", {"color": colour, "lw": 2}, "after training"),
        ):
            tallies = load_tallies(run, stage, part)
            counts = pooled(tallies.values()).counts[0] if tallies else np.zeros((2, 1))
            if counts.sum(axis=1).all():
                axes.plot(*roc_points(counts), label=label, **style)
        plain_axes(axes, title, "false positive rate")
        axes.set_ylabel("true positive rate", fontsize=8)
        axes.set_aspect("equal")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
