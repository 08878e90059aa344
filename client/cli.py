"""hemafed-client: the hospital's commands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.ingest import IngestError, IngestReport, ingest, short
from shared.site import SiteError, read_site
from shared.slices import CacheError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What a hospital does with its own data.")
console = Console()


@app.callback()
def about() -> None:
    """What a hospital does with its own data; nothing of it leaves."""


@app.command("ingest")
def ingest_command(
    site_yaml: Annotated[Path, typer.Argument(help="the hospital's site.yaml")],
    workers: Annotated[int | None, typer.Option(help="processes; by default one per core")] = None,
) -> None:
    """Read the hospital's DICOM, masks and labels into its slice cache."""
    try:
        site = read_site(site_yaml)
        columns = (TextColumn(f"{site.name}: series"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=None)
            report = ingest(site, workers, lambda done, total: bar.update(task, completed=done, total=total))
    except (SiteError, IngestError, CacheError) as error:
        console.print(f"[red]{type(error).__name__}[/red]: ", end="")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from error
    console.print(report_text(site.name, report), markup=False, highlight=False)
    for fault in report.faults[:20]:
        console.print(f"  left out {short(fault.what)}: {fault.reason}", markup=False, highlight=False)


def report_text(name: str, report: IngestReport) -> str:
    """An ingest in a few lines; counts and reasons only."""
    text = (
        f"{name}: {report.patients} patients, {report.series} series, {report.slices} slices: {report.positives} with the "
        f"marker, {report.unlabelled} without label, {report.masked} with a mask"
    )
    if report.unchanged:
        return text + " (unchanged)"
    reasons = Counter(fault.reason for fault in report.faults)
    return text + "".join(f"\n  left out {count}: {reason}" for reason, count in reasons.most_common())


def main() -> None:
    """Entry point."""
    app()
