"""hemafed-sim: the whole story in one command, and the experiments.

`demo` writes the hospitals, ingests them, trains through Flower, tests on hospitals that never trained and prints the table.
Each step reuses what is there. `run` runs experiments, `list` shows them, `table` rebuilds their tables.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import tomli_w
import typer
from rich.table import Table

from client.dicom.elements import silence_readers
from client.ingest.ingest import ingest
from server.evaluation.results_table import evaluate_run, result_table
from server.storage.run_folder import flatten, new_run_name, read_keys
from shared.config import ConfigError, parse_config
from shared.errors import HemafedError
from shared.host.console import Bars, console, fail, say
from shared.site import read_site
from simulations.heads.pretrain import make_recipe, pretrain_model
from simulations.heads.sheet import write_sheet
from simulations.importers import IMPORTERS, SourceError
from simulations.phantom.physics import physics_table
from simulations.phantom.write_hospitals import write_hospitals
from simulations.rehearsal.superlink import run_app, start_superlink
from simulations.studies.design import STORE, all_experiments, jobs, read_experiment
from simulations.studies.experiments_page import write_tables
from simulations.studies.results import state
from simulations.studies.runner import run_jobs

ROOT = Path(__file__).resolve().parent.parent
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Synthetic hospitals and studies on them.",
)

Folder = Annotated[Path, typer.Option(help="where the hospitals are, or are written")]
Seed = Annotated[int, typer.Option(help="decides every byte of the hospitals")]


@app.command("sites")
def sites_command(hospitals: Folder = Path("hospitals"), seed: Seed = 0) -> None:
    """Write the eleven hospitals as DICOM and ingest them, unless they are there."""
    try:
        sites(hospitals, seed)
    except HemafedError as error:
        fail(error)


def sites(hospitals: Path, seed: int) -> list[Path]:
    """Write and ingest the hospitals; the site.yaml of each."""
    with Bars() as bars:
        files = write_hospitals(
            hospitals.absolute(), seed, progress=lambda name, *count: bars.show(f"write {name}", *count)
        )
        for file in files:
            name = file.parent.name
            report = ingest(
                read_site(file), progress=lambda what, *count, name=name: bars.show(f"ingest {name}: {what}", *count)
            )
            if report.unchanged:
                bars.show(f"ingest {name}: series", report.series, report.series)
            for fault in report.faults:
                console.print(f"{file.parent.name}: left out: {fault.reason}", style="red", markup=False)
    return files


@app.command()
def demo(
    hospitals: Folder = Path("hospitals"),
    runs: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs"),
    preset: Annotated[Path, typer.Option(help="TOML file of run config keys")] = ROOT / "simulations" / "demo.toml",
    keys: Annotated[list[str] | None, typer.Option("--set", help="one more key, such as federation.rounds=3")] = None,
    seed: Seed = 0,
) -> None:
    """Hospitals, ingest, federation, evaluation, report."""
    try:
        config = _run_config(preset, keys or [], hospitals, runs)
        files = sites(hospitals, seed)
        opened = [read_site(file) for file in files]
        supernodes = sum(site.role == "train" for site in opened)
        home = ROOT / ".flwr" / str(os.getpid())  # two simulations at a time do not meet
        home.mkdir(parents=True, exist_ok=True)
        chosen = home / "run-config.toml"
        chosen.write_text(tomli_w.dumps(config))
        console.rule(f"federation of {supernodes} hospitals")
        with start_superlink(home) as link:
            run_app(link, ROOT, chosen, supernodes)
        shutil.rmtree(home)
        console.rule("evaluation on hospitals that never trained")
        folder = runs.absolute() / config["run"]["id"]
        held_out = [file for file, site in zip(files, opened, strict=True) if site.role == "held-out"]
        page, summary = evaluate_run(folder, held_out, say, repeats=True)
    except HemafedError as error:
        fail(error)
    console.print(result_table(summary))
    console.print(f"report:  {page}\nsummary: {folder / 'summary.json'}", highlight=False)


@app.command("heads")
def heads_command(
    picture: Annotated[Path, typer.Argument(help="PNG file to write")] = Path("heads.png"),
    outlines: Annotated[bool, typer.Option(help="outline bleedings")] = True,
    seed: Annotated[int, typer.Option(help="decides the heads")] = 0,
    real: Annotated[Path | None, typer.Option(help="folder of real DICOM, shown first")] = None,
) -> None:
    """Draw 48 random heads from a brain template, with bleedings of nine kinds, on one picture."""
    from simulations.phantom.realism import read_slices  # scikit-learn is slow to load

    silence_readers()
    write_sheet(picture, seed, outlines, read_slices(real) if real else ())
    say(f"{picture}: 48 slices, window 0 to 80 HU{', the real ones first' if real else ''}")


@app.command("realism")
def realism_command(
    folder: Annotated[Path, typer.Argument(help="with DICOM files of real heads")],
    drawn: Annotated[int, typer.Option(help="slices to draw beside them", min=8)] = 48,
    seed: Annotated[int, typer.Option(help="decides the drawn ones")] = 0,
) -> None:
    """Measure how easily a small classifier tells drawn slices from real ones, patch by patch."""
    from simulations.phantom.realism import compare  # scikit-learn is slow to load

    silence_readers()
    try:
        result = compare(folder, drawn, seed)
    except HemafedError as error:
        fail(error)
    say(
        f"AUC {result.auc:.3f} (.5: cannot tell, 1: always can); {result.real_patches} patches of {result.real_slices} real slices, "
        f"{result.drawn_patches} of {result.drawn_slices} drawn"
    )


@app.command("pretrain")
def pretrain_command(
    folder: Annotated[Path, typer.Argument(help="pool, checkpoint, curve and the encoder are kept here")],
    variant: Annotated[str, typer.Option(help="of the model, as model.variant")] = "demo",
    shards: Annotated[int, typer.Option(help="of 256 slices to draw; one in twenty is held out")] = 60,
    steps: Annotated[int, typer.Option(help="of training")] = 20_000,
    batch: Annotated[int, typer.Option(help="slices a step")] = 16,
    seed: Annotated[int, typer.Option(help="decides heads and training")] = 0,
    begin: Annotated[str, typer.Option(help="go on from: synthetic, or a model file; empty for random weights")] = "",
    rate: Annotated[float, typer.Option(help="of the default rates; less where a model goes on")] = 1.0,
) -> None:
    """Train a starting encoder on random heads; stopped and called again, it resumes."""
    try:
        recipe = make_recipe(variant, steps, batch, seed, begin, rate)
        say(f"model: {pretrain_model(folder, shards, recipe, say)}")
    except HemafedError as error:
        fail(error)


@app.command("federation")
def federation_command(
    hospitals: Folder = Path("hospitals"),
    folder: Annotated[Path, typer.Option(help="where the federation is created, in place of an earlier one")] = Path(
        "federation"
    ),
    preset: Annotated[Path, typer.Option(help="TOML file of run config keys")] = ROOT
    / "simulations"
    / "federation.toml",
    keys: Annotated[list[str] | None, typer.Option("--set", help="one more key, such as federation.rounds=3")] = None,
    seed: Seed = 0,
) -> None:
    """Run a deployed centre and three hospitals on this machine, cut the power of each, and compare with a simulation."""
    from simulations.rehearsal.rehearse import rehearse

    try:
        config = flatten(read_keys(preset, keys or []))
        parse_config(config)
        outcome = rehearse(folder.absolute(), sites(hospitals, seed), config, say)
    except HemafedError as error:
        fail(error)
    console.print(result_table(outcome.summary))
    deployed = outcome.deployed
    console.print(
        f"unseen AUC: deployed {deployed['value']:.3f} [{deployed['low']:.3f}, {deployed['high']:.3f}], simulated "
        f"{outcome.simulated:.3f}; largest difference of a value of the encoders: {outcome.difference:g}\n"
        f"report: {outcome.page}",
        highlight=False,
    )
    if not outcome.agrees:
        console.print("the deployed run and the simulation do not agree", style="red")
        raise typer.Exit(1)


@app.command("list")
def list_command() -> None:
    """The experiments and how much of each is stored."""
    page = Table("experiment", "stored", "of", "of another recipe", "question")
    for experiment in all_experiments():
        done, stale, wanted = state(experiment)
        page.add_row(experiment.name, str(done), str(wanted), str(stale or ""), experiment.question)
    console.print(page)


@app.command("run")
def run_command(
    names: Annotated[list[str], typer.Argument(help="experiments as `list` shows them, or 'all'")],
    seeds: Annotated[str, typer.Option(help="only these, such as 0,1")] = "",
    store: Annotated[Path, typer.Option(help="drawn hospitals and trained models; safe to delete")] = STORE,
    workers: Annotated[int | None, typer.Option(help="processes; by default one per core")] = None,
) -> None:
    """Run experiments: what is stored is left alone, what was stopped goes on; then rebuild the tables."""
    try:
        chosen = all_experiments() if names == ["all"] else [read_experiment(name) for name in names]
        only = {int(seed) for seed in seeds.split(",")} if seeds else None
        wanted = [job for e in chosen for job in jobs(e) if only is None or job.seed in only]
        run_jobs(wanted, store, workers, say)
    except (HemafedError, ValueError) as error:
        fail(error)
    console.print(f"tables: {write_tables()}", highlight=False)


@app.command("table")
def table_command() -> None:
    """Rebuild EXPERIMENTS.md and the heads of the experiments' files from the stored results."""
    console.print(f"tables: {write_tables()}", highlight=False)


@app.command("physics")
def physics_command(patients: Annotated[int, typer.Option(help="synthetic patients measured per kernel")] = 8) -> None:
    """Measure the synthetic scans beside the ranges found on real ones."""
    console.print(physics_table(patients, said=say))


@app.command("import")
def import_command(
    data_set: Annotated[str, typer.Argument(metavar="[rsna|cq500|physionet-ich|bhsd]", help="which public set")],
    source: Annotated[Path, typer.Argument(help="its folder, as published")],
    target: Annotated[Path, typer.Argument(help="where the hospitals are written")],
) -> None:
    """Make hospitals of a public data set: site.yaml and labels for each, pixels where they are."""
    silence_readers()
    if data_set not in IMPORTERS:
        fail(SourceError(f"data set {data_set!r}, expected one of {', '.join(IMPORTERS)}"), 2)
    try:
        with Bars(data_set) as bars:
            files = IMPORTERS[data_set](source, target, lambda done, total: bars.show("files", done, total))
    except (HemafedError, OSError) as error:
        fail(error)
    for file in files:
        say(f"{file}: next, hemafed-client check {file}")


def _run_config(preset: Path, keys: list[str], hospitals: Path, runs: Path) -> dict:
    """The preset with the caller's keys and absolute folders, checked before anything slow starts.

    Raises:
      ConfigError: an unknown key or a wrong value.
    """
    config = read_keys(preset, keys)
    for section, key, folder, option in (
        ("run", "folder", runs, "--runs"),
        ("simulation", "hospitals", hospitals, "--hospitals"),
    ):
        if key in config.get(section, {}):
            raise ConfigError(
                f"{section}.{key} is set in the preset or with --set; here the folder is given by {option}"
            )
        config[section] = config.get(section, {}) | {key: str(folder.absolute())}
    config["run"] = {"id": new_run_name(parse_config(flatten(config)))} | config["run"]
    return config


def main() -> None:
    """Entry point."""
    sys.exit(app())
