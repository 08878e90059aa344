"""hemafed-client: the hospital's commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from client.dicom.elements import silence_readers
from client.dicom.faults import Fault, by_reason
from client.ingest.ingest import IngestReport, ingest
from shared.errors import HemafedError
from shared.host.console import Bars, fail, say
from shared.host.files import private_files
from shared.site import Site, read_site

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What a hospital does with its own data.",
)
SiteFile = Annotated[Path, typer.Argument(help="the hospital's site.yaml")]
Workers = Annotated[int | None, typer.Option(help="processes; by default one per core", min=1)]
SHOWN = 3  # of those left out for one reason


@app.callback()
def about() -> None:
    """Commands for a hospital's own data; none of them sends anything."""


@app.command("ingest")
def ingest_command(
    site_yaml: SiteFile,
    workers: Workers = None,
) -> None:
    """Read the hospital's DICOM, masks and labels into its slice cache."""
    silence_readers()
    try:
        site = read_site(site_yaml)
        with private_files(), Bars(site.name) as bars:
            report = ingest(site, workers, bars.show)
    except HemafedError as error:
        fail(error)
    say(report_text(site.name, report))


@app.command("check")
def check_command(site_yaml: SiteFile, workers: Workers = None) -> None:
    """Read every image as ingest would and say whether the data are ready: check.html and check.json beside SITE_YAML.

    Exits with 0 if they are ready, 1 if not, 2 if they could not be checked.
    """
    from client.check.check import (  # the page's libraries are slow to load, and only this command needs them
        check,
        write_json,
    )
    from client.check.page import write_page

    silence_readers()
    try:
        site = read_site(site_yaml)
        with Bars(site.name) as bars:
            result = check(site, workers, bars.show)
        pages = [write_page(result, site_yaml.absolute().parent), write_json(result, site_yaml.absolute().parent)]
    except (HemafedError, OSError) as error:
        fail(error, 2)
    counts = result.counts
    say(
        f"{site.name}: {counts['patients']} patients, {counts['series']} series, {counts['slices']} slices: "
        f"{counts['positives']} of {counts['labelled']} labelled ones with the marker, {counts['masked']} with a mask"
        f"{faults_text(result.faults)}"
    )
    for problem in result.problems:
        say(f"  problem: {problem}")
    for note in result.notes:
        say(f"  note: {note}")
    if result.faults or result.problems:
        say(f"  what a code of 16 letters and digits stands for: hemafed-client find {site_yaml} CODE")
    say(
        f"{site.name}: {'ready' if result.ready else 'not ready'}; see {pages[0].name} and {pages[1].name} beside {site_yaml.name}"
    )
    raise typer.Exit(0 if result.ready else 1)


@app.command("segment")
def segment_command(
    folder: Annotated[Path, typer.Argument(help="with DICOM files of head CT, in any order and depth")],
    out: Annotated[Path, typer.Argument(help="masks, table and page are written here")],
    model: Annotated[
        str, typer.Option(help="'small' or 'demo', which come with hemafed, or a file of hemafed-server export")
    ] = "small",
    form: Annotated[str, typer.Option(help="npy, seg (DICOM), or both")] = "npy",
    threshold: Annotated[float, typer.Option(help="least probability of a pixel", min=0.01, max=0.99)] = 0.4,
    least_mm2: Annotated[float, typer.Option(help="smaller spots of a slice are left away", min=0.0)] = 30.0,
    workers: Workers = None,
) -> None:
    """Mark hematomas in a folder of head CT: masks on the images' own pixels, a table and a page. Not for diagnosis."""
    from client.segment.command import segment_to_files  # torch is slow to load, and only this command needs it

    silence_readers()
    try:
        with private_files(), Bars("segment") as bars:
            result = segment_to_files(folder, out, model, form, threshold, least_mm2, workers, bars.show)
    except (HemafedError, OSError) as error:
        fail(error)
    say(
        f"{result.slices} slices of {result.series} series: {result.marked} with hematoma, "
        f"{result.slices - result.marked} with nothing marked{faults_text(result.faults)}"
    )
    say(f"see {out / 'segments.html'} and {out / 'segments.csv'}; research use only, not for diagnosis")


@app.command("find")
def find_command(
    site_yaml: SiteFile, codes: Annotated[list[str], typer.Argument(help="as a report names a file, series or patient")]
) -> None:
    """Tell which file, series or patient a report's code is. Shows identifiers, on the screen only."""
    from client.check.find import find

    silence_readers()
    try:
        site = read_site(site_yaml)
        found = 0
        for code, what in find(site, codes):
            found += 1
            say(f"{code}: {what}")
    except (HemafedError, OSError) as error:
        fail(error, 2)
    if found < len(set(codes)):
        say(f"{len(set(codes)) - found} codes are not of this folder as it is now; run the report again")
        raise typer.Exit(1)


@app.command("audit")
def audit_command(
    site_yaml: SiteFile,
    check: Annotated[bool, typer.Option("--verify", help="check the chain, show no entries")] = False,
    known: Annotated[list[str] | None, typer.Option(help="a hash that the coordinating centre received")] = None,
) -> None:
    """Show what the hospital was asked and what left, or check that the record is whole.

    Ends with 0 if it is, 1 if a line was changed, removed or added.
    """
    from client.boundary.audit import verify

    try:
        site = read_site(site_yaml)
        verdict = verify(site.state, tuple(known or ()))
        if not check:
            for line in audit_lines(site):
                say(line)
    except (HemafedError, OSError) as error:
        fail(error, 2)
    for fault in verdict.faults:
        say(f"fault: {fault}")
    whole = "changed" if verdict.faults else "whole"
    say(f"{site.name}: {verdict.entries} entries, the record is {whole}; its newest hash is {verdict.newest}")
    raise typer.Exit(1 if verdict.faults else 0)


def audit_lines(site: Site) -> Iterator[str]:
    """A line for each entry."""
    from client.boundary.audit import read_entries

    for number, _, entry in read_entries(site.state):
        if entry is None:
            yield f"{number}: no entry"
            continue
        order = entry.get("order", {})
        asked = f" {entry['asked']}" if "asked" in entry else ""
        asked += f" round {order['server-round']}" if "server-round" in order else ""
        asked += f" of run {order['run']}" if "run" in order else ""
        left = []
        for name, content in entry.items():
            if isinstance(content, dict) and "tensors" in content:
                size = sum(size for _, _, size, _ in content["tensors"])
                left.append(
                    f"{name}: {len(content['tensors'])} tensors, {size:,} bytes, sha256 {content['sha256'][:12]}"
                )
            elif name in ("metrics", "facts"):
                left.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in content.items() if value != ""))
        told = entry.get("reason") or "; ".join(left)
        yield f"{number}: {entry['time']} {entry['event']}{asked}" + (f": {told}" if told else "")


@app.command("init")
def init_command(
    invitation: Annotated[Path, typer.Argument(help="the file that the centre sent")],
    site_yaml: Annotated[Path, typer.Argument(help="the hospital's site.yaml; written where there is none")],
    request: Annotated[Path, typer.Option(help="where the answer is written")] = Path("request.json"),
) -> None:
    """Answer the centre's invitation: make the hospital's own key, which stays here, and a request to send back."""
    from client.node.enrol import init_site

    try:
        with private_files():
            centre, written = init_site(invitation, site_yaml, request)
    except (HemafedError, OSError) as error:
        fail(error)
    if written:
        say(f"wrote {site_yaml}: name the folders of your data in it")
    say(f"1. send {request.absolute()} to the centre; it may be sent openly, but holds a token that is good once")
    say(f"2. read them this fingerprint, by telephone: {centre.fingerprint()}")
    say(f"3. once they have registered you: hemafed-client join {site_yaml}")


@app.command("join")
def join_command(
    site_yaml: SiteFile,
    check: Annotated[bool, typer.Option("--check", help="only look whether all is ready")] = False,
    install: Annotated[bool, typer.Option("--install", help="write a systemd unit that does this for ever")] = False,
) -> None:
    """Take part: check data, key, authority, clock and connection, then stay connected until stopped.

    Ends with 1 if something is not ready and names it and the next step.
    """
    from client.node.daemon import install_unit, join
    from client.node.ready import check_ready

    try:
        site = read_site(site_yaml)
        findings = check_ready(site)
        for finding in findings:
            say(f"{'ok  ' if finding.good else 'NOT '} {finding.what}: {finding.text}")
        # A centre that is down comes back; the rest must be fixed by a person.
        if any(not finding.good and (check or install or finding.what != "connection") for finding in findings):
            raise typer.Exit(1)
        if check:
            say("whether the centre has registered this key shows when it joins")
            return
        if install:
            path, commands = install_unit(site, site_yaml)
            say(f"wrote {path}; start it with")
            for command in commands:
                say(f"    {command}")
            return
        with private_files():
            join(site, site_yaml, say)
    except (HemafedError, OSError) as error:
        fail(error)


@app.command("app")
def app_command() -> None:
    """Show the hash of the code that runs in this hospital, for policy.app."""
    from client.boundary.code import HOSPITAL_CODE, ROOT, code_hash

    say(f"{code_hash()}  {', '.join(f'{ROOT / folder}' for folder in HOSPITAL_CODE)}")


def report_text(name: str, report: IngestReport) -> str:
    """An ingest in a few lines; counts and reasons only."""
    text = (
        f"{name}: {report.patients} patients, {report.series} series, {report.slices} slices: {report.positives} with the "
        f"marker, {report.unlabelled} without label, {report.masked} with a mask"
    )
    return text + (" (unchanged)" if report.unchanged else "") + faults_text(report.faults)


def faults_text(faults: tuple[Fault, ...]) -> str:
    """Return what was left out, a line per reason, most frequent first."""
    text = ""
    for reason, which in by_reason(faults):
        shown = ", ".join(which[:SHOWN]) + (f" and {len(which) - SHOWN} more" if len(which) > SHOWN else "")
        text += f"\n  left out {len(which)}: {reason} ({shown})"
    return text


def main() -> None:
    """Entry point."""
    app()
