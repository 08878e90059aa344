"""check.html: what a check found, to look at.

One file without links to others. It shows slices of patients, in the brain window with mask outlines: it stays in the
hospital. Shape suffixes: Y row, X column.
"""

from __future__ import annotations

import io
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from client.check.check import Check, Picture
from client.dicom.faults import by_reason
from client.dicom.hounsfield import BIN_HU, BINS, LOW_HU
from shared.page import COLOURS, STYLE, data_uri, plain_axes, svg_uri

WINDOW_HU = (0, 80)  # the brain window
OUTLINE = (235, 92, 60)
TILES_PER_ROW = 6
TILE_PX, CAPTION_PX = 172, 20
SHOWN = 8  # of those left out for one reason
MOST_STUDIES = 200  # in the table of choices

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Check of {{ check.site }}</title>
<style>{{ style }}
 .verdict { border-radius: 8px; padding: 12px 16px; margin: 16px 0; border: 1px solid } .ready { border-color: #6a994e; background: #f2f7ee }
 .not { border-color: #c8553d; background: #fcf1ee } .pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 8px 32px }
 h3 { font-size: 14px; margin: 16px 0 2px } code { color: #5b676b }
</style></head><body>
<h1>Check of {{ check.site }}</h1>
<p class="note">Role {{ check.role }}. Every image was read as an ingest would read it; nothing was written but this page and check.json.{% if check.temporary %} The hospital has no key yet: hashes on this page are temporary and change at the first ingest.{% endif %}</p>
<div class="verdict {{ "ready" if check.ready else "not" }}"><b>{{ "Ready." if check.ready else "Not ready." }}</b>
{% if check.ready %}{{ check.faults|length }} things are left out; see below.{% else %}<ul>{% for problem in check.problems %}<li>{{ problem }}</li>{% endfor %}</ul>{% endif %}</div>
<p class="note">Patients, studies, series and files have codes of 16 letters and digits in place of names. <code>hemafed-client find SITE_YAML CODE</code> shows on your screen what a code stands for; the first 8 will do.</p>
{% for note in check.notes %}<p class="note">{{ note }}.</p>
{% endfor %}<div class="cards">
{% for title, value, note in cards %}<div class="card"><span>{{ title }}</span><b>{{ value }}</b><span>{{ note }}</span></div>
{% endfor %}</div>

<h2>Left out</h2>
{% if groups %}<p class="note">By reason.</p>
<div class="scroll"><table><tr><th class="n">Number</th><th>Reason</th><th>Which</th></tr>
{% for reason, which in groups %}<tr><td class="n">{{ which|length }}</td><td>{{ reason }}</td><td><code>{{ which[:shown]|join(", ") }}{% if which|length > shown %} and {{ which|length - shown }} more{% endif %}</code></td></tr>
{% endfor %}</table></div>{% else %}<p>Nothing.</p>{% endif %}

{% if check.masks %}<h2>Masks</h2>
<div class="scroll"><table><tr><th>Of the mask files</th><th class="n">In</th><th class="n">Taken</th><th class="n">Left out</th><th>Reason</th></tr>
{% for kind, row in check.masks.items() %}<tr><td>{{ kind }}</td><td class="n">{{ row.in }}</td><td class="n">{{ row.taken }}</td><td class="n">{{ row.in - row.taken }}</td><td>{% for group in row.left_out %}{{ group.count }}: {{ group.reason }}{% if not loop.last %}<br>{% endif %}{% endfor %}</td></tr>
{% endfor %}</table></div>{% endif %}

<h2>Values</h2>
<img alt="Histogram of HU per scanner" src="{{ histogram }}">
<p class="note">Air should stand near -1000, fat near -100, brain between 20 and 45 HU. A curve beside the others is a calibration or a rescale to ask about.</p>

<h2>What it looks like</h2>
{% if sheet %}<img alt="One slice per series" src="{{ sheet }}">
<p class="note">One slice per series, the one with most hematoma ({{ shown_taken }} of {{ check.counts.series }} series), under its patient's code; window {{ window[0] }} to {{ window[1] }} HU, the mask outlined; 22.4 cm wide, the patient's left on the right.{% if shown_refused %} The last {{ shown_refused }} are of series that are left out, in a window of their own values.{% endif %} These are pictures of patients: keep this page where scans may be kept.</p>{% else %}<p>No slice.</p>{% endif %}

<h2>Where it comes from</h2>
<div class="pairs">{% for name, counter in check.tables.items() %}<div><h3>{{ name }}</h3><table>{% for value, number in counter.items() %}<tr><td>{{ value }}</td><td class="n">{{ number }}</td></tr>{% endfor %}</table></div>{% endfor %}</div>
<p class="note">Number of series.</p>

<h2>Patients and labels</h2>
<div class="pairs"><div><h3>Splits</h3><table><tr><th>Split</th><th class="n">Patients</th><th class="n">Slices</th><th class="n">Positive</th></tr>
{% for name, row in check.splits.items() %}<tr><td>{{ name }}</td><td class="n">{{ row.patients }}</td><td class="n">{{ row.slices }}</td><td class="n">{{ row.positives }}</td></tr>{% endfor %}</table></div>
<div><h3>Scanners</h3><table><tr><th>Scanner</th><th class="n">Labelled</th><th class="n">Positive</th></tr>
{% for name, pair in check.positives_by_scanner.items() %}<tr><td>{{ name }}</td><td class="n">{{ pair[0] }}</td><td class="n">{{ pair[1] }}</td></tr>{% endfor %}</table></div></div>

<h2>Which series of each study</h2>
<details><summary>{{ check.choices|length }} studies</summary><div class="scroll"><table><tr><th>Study</th><th>Series taken</th><th>Why</th></tr>
{% for choice in check.choices[:most] %}<tr><td><code>{{ choice.study }}</code></td><td><code>{{ choice.taken|join(" ") }}</code></td><td>{{ choice.reason }}</td></tr>
{% endfor %}</table></div>{% if check.choices|length > most %}<p class="note">and {{ check.choices|length - most }} more in check.json</p>{% endif %}</details>
</body></html>
""")


def write_page(check: Check, folder: Path) -> Path:
    """Write check.html into a folder; returns its path."""
    page = _PAGE.render(
        style=Markup(STYLE),
        check=check,
        cards=_cards(check),
        groups=by_reason(check.faults),
        shown=SHOWN,
        shown_taken=sum(not picture.refused for picture in check.pictures),
        shown_refused=sum(picture.refused for picture in check.pictures),
        most=MOST_STUDIES,
        window=WINDOW_HU,
        histogram=svg_uri(_histogram(check)),
        sheet=data_uri(contact_sheet(check.pictures), "image/png") if check.pictures else "",
    )
    path = folder / "check.html"
    path.write_text(page, encoding="utf-8")
    return path


def _cards(check: Check) -> list[tuple[str, int, str]]:
    """The headline."""
    counts = check.counts
    return [
        ("Patients", counts["patients"], f"{counts['series']} series"),
        ("Slices", counts["slices"], f"of {counts['files']} files"),
        ("With the marker", counts["positives"], f"of {counts['labelled']} labelled slices"),
        ("With hematoma", counts["hematoma"], f"of {counts['masked']} slices with a mask"),
    ]


def _histogram(check: Check) -> Figure:
    """HU of each scanner: the whole range, and soft tissue."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    middles = LOW_HU + BIN_HU * (np.arange(BINS) + 0.5)
    for axes, (low, high, title) in zip(
        panels, ((-1200, 2000, "share of pixels, all values (log)"), (-150, 150, "soft tissue")), strict=True
    ):
        inside = (middles >= low) & (middles <= high)
        for number, (name, counts) in enumerate(sorted(check.histograms.items())):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(middles[inside], counts[inside] / max(1, counts.sum()), color=colour, lw=1.2, label=name)
        plain_axes(axes, title, "HU")
    if check.histograms:
        panels[0].set_yscale("log")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def contact_sheet(pictures: tuple[Picture, ...]) -> bytes:
    """Slices side by side with their masks outlined, as PNG."""
    rows = -(-len(pictures) // TILES_PER_ROW)
    sheet = Image.new("RGB", (TILES_PER_ROW * TILE_PX, rows * (TILE_PX + CAPTION_PX)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, picture in enumerate(pictures):
        left, top = number % TILES_PER_ROW * TILE_PX, number // TILES_PER_ROW * (TILE_PX + CAPTION_PX)
        sheet.paste(_tile(picture).resize((TILE_PX - 4, TILE_PX - 4), Image.Resampling.LANCZOS), (left, top))
        draw.text((left, top + TILE_PX - 3), picture.title, fill="#3c474b", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _tile(picture: Picture) -> Image.Image:
    """One slice in the brain window, its mask outlined from outside, so that the outline hides nothing of it."""
    low, high = np.percentile(picture.hu, (2, 98)) if picture.refused else WINDOW_HU
    high = max(high, low + 1)
    grey_YX = np.clip((picture.hu.astype(np.float32) - low) / (high - low), 0, 1) * 255
    rgb = np.repeat(grey_YX.astype(np.uint8)[..., None], 3, axis=2)
    inside_YX = picture.mask > 0
    rgb[ndimage.binary_dilation(inside_YX) & ~inside_YX] = OUTLINE
    return Image.fromarray(rgb)
