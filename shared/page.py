"""One look for the project's pages: style, charts, and pictures inside the page.

A page is one file without links to others, so that it can be moved and read anywhere.
"""

from __future__ import annotations

import base64
import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["svg.fonttype"] = "path"
matplotlib.rcParams["svg.hashsalt"] = "hemafed"
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#d4a017", "#4a5859", "#b56576", "#2a9d8f")

STYLE = """
 body { font: 15px/1.5 system-ui, sans-serif; color: #20282b; margin: 0 auto; max-width: 1040px; padding: 32px 24px 80px; }
 h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 18px; margin: 40px 0 8px; border-bottom: 1px solid #d9dfe1; padding-bottom: 4px }
 p.note { color: #5b676b; margin: 4px 0 12px } .cards { display: flex; gap: 16px; flex-wrap: wrap; margin: 20px 0 }
 .card { flex: 1 1 200px; border: 1px solid #d9dfe1; border-radius: 8px; padding: 12px 16px } .card b { font-size: 28px; display: block }
 .card span { color: #5b676b } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
 th { text-align: left; color: #5b676b; font-weight: 600; border-bottom: 2px solid #d9dfe1; padding: 4px 8px }
 td { border-bottom: 1px solid #e8ecee; padding: 4px 8px } td.n, th.n { text-align: right; white-space: nowrap }
 .ci { color: #5b676b; font-size: 13px } img { max-width: 100% } .scroll { overflow-x: auto } code { font-size: 13px }
 details { margin-top: 8px } .bad { color: #a63d2f }
"""


def plain_axes(axes: Axes, title: str, x_label: str) -> None:
    """One look for all charts."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eef1f2", lw=0.8)


def svg_uri(figure: Figure) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a data URI, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
