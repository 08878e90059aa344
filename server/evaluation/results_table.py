"""A finished run's result for people: tested on held-out hospitals, as a page and as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from server.evaluation.evaluate import (
    check_unseen,
    evaluate_unseen,
    load_model,
    model_hash,
    summarise_run,
)
from server.evaluation.report import metric_text, write_report
from server.storage.lines import Summary
from server.storage.run_folder import read_config, read_summary


def evaluate_run(
    run: Path, sites: list[Path], say: Callable[[str], None], repeats: bool = False
) -> tuple[Path, Summary]:
    """Test a run's global model on held-out hospitals; the report's page and the summary.

    Args:
      run: the run's folder.
      sites: site.yaml of each hospital.
      say: called with a line per hospital.
      repeats: whether intervals repeat with the seed, for synthetic hospitals.
    Raises:
      HemafedError: the folder is no run, or a site or the model cannot be read.
    """
    evaluate_unseen(run, read_config(run), sites, say, repeats)
    return write_report(run), read_summary(run)


def report_anew(run: Path) -> Path:
    """Summary and page of what a run's folder holds, counts that held-out hospitals sent among it; the page.

    Raises:
      HemafedError: the folder is no run, or a site or the model cannot be read.
    """
    config = read_config(run)
    check_unseen(run, lambda stage: model_hash(*load_model(run, config, stage)))
    summarise_run(run)
    return write_report(run)


def result_table(summary: Summary) -> Table:
    """Metrics with intervals: seen and unseen, before and after, and each hospital."""
    caption = (
        "with 95 % intervals: bootstrap over patients; Dice: of slices with blood; alarms: share of slices without blood where some "
        "is marked; found: AUC of a patient with blood"
    )
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    for name in ("hospitals", "AUC", "F1", "Dice", "alarms", "found", "patients"):
        table.add_column(name, justify="left" if name == "hospitals" else "right", no_wrap=True)
    before, after = summary.evaluation_before_training, summary.evaluation
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
    text = {name: metric_text(result.get(name)) for name in ("auc", "f1", "dice", "alarms", "detection")}
    both = {name: f"{t['value']} {t['interval']}".strip() for name, t in text.items()}
    plain = {name: t["value"] for name, t in text.items()}
    patients = str(result["auc"]["n_patients"])
    return [both["auc"], plain["f1"], both["dice"], plain["alarms"], plain["detection"], patients]
