"""segments.html: what a model marked in a folder, to look at.

One file without links to others. It shows slices of patients under codes: it stays in the hospital.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from client.check.check import Picture
from client.check.page import WINDOW_HU, contact_sheet
from client.dicom.faults import Fault, by_reason
from client.segment.segment import Choices, SegmentedSeries
from shared.page import STYLE, data_uri

MOST_PICTURES = 60
SHOWN = 8  # of those left out for one reason

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hematomas that a model marked</title>
<style>{{ style }} code { color: #5b676b }</style></head><body>
<h1>Hematomas that a model marked</h1>
<p class="note"><b>Research use only, not for diagnosis.</b> Model {{ model.name }} (sha256 <code>{{ model.sha256[:16] }}</code>), trained on: {{ model.data }}. A pixel is hematoma from a probability of {{ choices.threshold }}; spots below {{ choices.least_mm2|round|int }} mm² of a slice are left away.</p>
<div class="cards">
{% for title, value, note in cards %}<div class="card"><span>{{ title }}</span><b>{{ value }}</b><span>{{ note }}</span></div>
{% endfor %}</div>

<h2>What it looks like</h2>
{% if sheet %}<img alt="Slices with what was marked" src="{{ sheet }}">
<p class="note">The slice with most hematoma of each series, or its middle one ({{ shown }} of {{ series|length }} series; those with hematoma first); window {{ window[0] }} to {{ window[1] }} HU, what was marked is outlined; 22.4 cm wide, the patient's left on the right. These are pictures of patients: keep this page where scans may be kept.</p>{% else %}<p>No slice.</p>{% endif %}

<h2>Series</h2>
<div class="scroll"><table><tr><th>Series</th><th class="n">Slices</th><th class="n">With hematoma</th><th class="n">Largest area, mm²</th><th class="n">Volume, ml</th></tr>
{% for one in series %}<tr><td><code>{{ one.name }}</code></td><td class="n">{{ one.images|length }}</td><td class="n">{{ one.marked }}</td><td class="n">{{ "%.0f"|format(one.largest) }}</td><td class="n">{% if one.ml is none %}unknown{% else %}{{ "%.1f"|format(one.ml) }}{% endif %}</td></tr>
{% endfor %}</table></div>
<p class="note">Codes of series are those of segments.csv, which names the files. Volume is area times the distance of slices.</p>

<h2>Left out</h2>
{% if groups %}<div class="scroll"><table><tr><th class="n">Number</th><th>Reason</th><th>Which</th></tr>
{% for reason, which in groups %}<tr><td class="n">{{ which|length }}</td><td>{{ reason }}</td><td><code>{{ which[:most]|join(", ") }}{% if which|length > most %} and {{ which|length - most }} more{% endif %}</code></td></tr>
{% endfor %}</table></div>{% else %}<p>Nothing.</p>{% endif %}
</body></html>
""")


def write_page(
    path: Path, all_series: Sequence[SegmentedSeries], faults: Sequence[Fault], choices: Choices, model: dict[str, str]
) -> None:
    """Write the page.

    Args:
      path: of the file.
      all_series: what was segmented.
      faults: what was left out.
      choices: what counted as hematoma.
      model: name, sha256 and data.
    """
    rows = [_row(one) for one in all_series]
    order = sorted((one for one in all_series if one.images), key=lambda one: -_most(one)[1])[:MOST_PICTURES]
    pictures = tuple(_picture(one) for one in order)
    page = _PAGE.render(
        style=Markup(STYLE),
        model=model,
        choices=choices,
        cards=_cards(rows),
        sheet=data_uri(contact_sheet(pictures), "image/png") if pictures else "",
        shown=len(pictures),
        window=WINDOW_HU,
        series=rows,
        groups=by_reason(tuple(faults)),
        most=SHOWN,
    )
    path.write_text(page, encoding="utf-8")


def _row(series: SegmentedSeries) -> dict:
    areas = [one.area_mm2 for one in series.images]
    ml = series.volume_ml if series.spacing_mm else None
    marked = sum(area > 0 for area in areas)
    return {"name": series.name, "images": areas, "marked": marked, "largest": max(areas, default=0.0), "ml": ml}


def _cards(rows: list[dict]) -> list[tuple[str, int, str]]:
    slices, marked = sum(len(row["images"]) for row in rows), sum(row["marked"] for row in rows)
    bleeding = sum(bool(row["marked"]) for row in rows)
    return [
        ("Series", len(rows), f"{bleeding} with hematoma"),
        ("Slices", slices, f"{marked} with hematoma, {slices - marked} with nothing marked"),
    ]


def _most(series: SegmentedSeries) -> tuple[int, float]:
    """Number and area of the slice with most hematoma; the middle one without any."""
    areas = [one.area_mm2 for one in series.images]
    best = int(np.argmax(areas)) if any(areas) else len(areas) // 2
    return best, areas[best]


def _picture(series: SegmentedSeries) -> Picture:
    best, area = _most(series)
    one = series.images[best]
    return Picture(f"{series.name[:8]}, {area:.0f} mm2" if area else series.name[:8], one.small_hu, one.small_mask)
