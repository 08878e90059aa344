"""hemafed-server: the coordinating centre's commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.checkpoint import CheckpointError
from server.evaluate import EvaluationError, evaluate_unseen
from server.report import metric_text, write_report
from server.runs import RunError, read_config, read_summary
from shared.config import ConfigError
from shared.site import SiteError
from shared.slices import CacheError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What the coordinating centre does.")
console = Console(width=None if sys.stdout.isatty() else 110)
ERRORS = (RunError, CheckpointError, EvaluationError, ConfigError, SiteError, CacheError)


@app.callback()
def about() -> None:
    """What the coordinating centre does with a run's folder."""


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run's folder, such as runs/latest")],
    site_yaml: Annotated[list[Path], typer.Argument(help="site.yaml of each held-out hospital, ingested")],
) -> None:
    """Test a run's global model on hospitals that never trained; complete its summary and report."""
    try:
        evaluate_unseen(run, read_config(run), site_yaml, lambda line: console.print(line, highlight=False))
        page = write_report(run)
    except ERRORS as error:
        fail(error)
    console.print(result_table(read_summary(run)))
    console.print(f"report: {page}", highlight=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder, such as runs/latest")]) -> None:
    """Write a run's report.html anew from what its folder holds."""
    try:
        console.print(f"report: {write_report(run)}", highlight=False)
    except ERRORS as error:
        fail(error)


def fail(error: Exception) -> None:
    """Say what is wrong and leave with exit status 1."""
    console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(1) from error


def result_table(summary: dict) -> Table:
    """AUC, F1 and Dice with intervals: seen and unseen, before and after, and each hospital."""
    table = Table(caption="with 95 % intervals: bootstrap over patients", caption_justify="left", box=SIMPLE_HEAD)
    for name in ("hospitals", "AUC", "F1", "Dice", "slices", "patients"):
        table.add_column(name, justify="left" if name == "hospitals" else "right", no_wrap=True)
    before, after = summary.get("evaluation_before_training", {}), summary.get("evaluation", {})
    for part, label in (("seen", "seen"), ("unseen", "unseen")):
        for stage, result in (("before training", before), ("after training", after)):
            if part in result:
                table.add_row(f"{label}, {stage}", *_cells(result[part]), style="bold" if result is after else "dim")
    table.add_section()
    for site, result in sorted(after.get("per_site", {}).items()):
        table.add_row(f"{site} ({result['part']})", *_cells(result))
    return table


def _cells(result: dict) -> list[str]:
    """A row's numbers."""
    texts = [metric_text(result[name]) for name in ("auc", "f1", "dice")]
    return [f"{t['value']} {t['interval']}".strip() for t in texts] + [
        str(result["auc"]["n_slices"]),
        str(result["auc"]["n_patients"]),
    ]


def main() -> None:
    """Entry point."""
    app()
