"""hemafed-server: the coordinating centre's commands."""

from __future__ import annotations

import logging
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from server.centre.authority import days_left, fingerprint
from server.centre.config import Centre, CentreError, expiry_warnings, init_centre, read_centre, renew_certificates
from server.centre.daemon import Daemon
from server.centre.registry import INVITATION_DAYS, invitation_path, invite, register, revoke
from server.centre.run_request import TERMINAL, is_running, read_request, request_run, write_request
from server.centre.status import follow_run, sites_table, status_lines, write_unit
from server.storage.run_folder import check_run, flatten, new_run_name, read_keys
from shared.config import parse_config
from shared.errors import HemafedError
from shared.host.console import console, fail, say
from shared.host.log import start_log
from shared.wire.enrolment import Request, read_letter

log = logging.getLogger("hemafed.server")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What the coordinating centre does.",
)
CentreFolder = Annotated[Path, typer.Argument(metavar="DIR", help="the centre's folder")]
SiteName = Annotated[str, typer.Argument(help="the hospital's public name")]


@app.callback()
def about() -> None:
    """Commands of the coordinating centre: the centre itself, its hospitals, runs and their results."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where the centre is made")],
    host: Annotated[str, typer.Option(help="name or address by which hospitals reach it")],
    port: Annotated[int, typer.Option(help="the one port that hospitals reach")] = 443,
    listen: Annotated[str, typer.Option(help="address that this port is bound to")] = "0.0.0.0",
    loopback_port: Annotated[int, typer.Option(help="for Flower's SuperLink, on 127.0.0.1 only")] = 8443,
) -> None:
    """Make a centre: certificate authority, server certificates, config and a systemd unit."""
    try:
        centre = Centre(folder.absolute(), host, port, listen, loopback_port)
        init_centre(centre)
        unit = write_unit(centre)
    except (HemafedError, OSError, ValueError) as error:
        fail(error)
    say(
        f"made the centre of {host} in {folder}; its authority's fingerprint is {fingerprint(centre.authority.certificate)}"
    )
    where = shlex.quote(str(folder))
    say(
        f"next: hemafed-server invite {where} SITE for each hospital, and hemafed-server start {where}, or as a service:"
    )
    say(
        f"    cp {shlex.quote(str(unit))} /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --now {unit.name}"
    )


@app.command("invite")
def invite_command(
    folder: CentreFolder,
    site: SiteName,
    days: Annotated[int, typer.Option(help="until the invitation expires", min=1, max=365)] = INVITATION_DAYS,
) -> None:
    """Write an invitation for a hospital, to be sent to it over a way that you trust."""
    try:
        centre = read_centre(folder)
        invitation, path = invite(centre, site, days), invitation_path(centre, site)
    except (HemafedError, OSError) as error:
        fail(error)
    say(f"wrote {path}, good until {invitation.expires}; send it to the hospital, which answers with")
    say(f"    hemafed-client init {path.name} site.yaml")


@app.command("register")
def register_command(
    folder: CentreFolder, request: Annotated[Path, typer.Argument(help="the file that the hospital sent")]
) -> None:
    """Admit a hospital by the request that it sent."""
    try:
        centre = read_centre(folder)
        site = register(centre, read_letter(request, Request))
    except (HemafedError, OSError) as error:
        fail(error)
    say(f"site {site.site} is registered. Let the hospital read its fingerprint to you; it must be")
    say(f"    {site.fingerprint}")
    say(f"If it is another: hemafed-server revoke {folder} {site.site}")


@app.command("revoke")
def revoke_command(folder: CentreFolder, site: SiteName) -> None:
    """Turn a hospital away from now on; its key is never taken again."""
    try:
        centre = read_centre(folder)
        revoke(centre, site)
    except (HemafedError, OSError) as error:
        fail(error)
    say(f"site {site} is revoked{'; the running centre turns it away within seconds' if is_running(centre) else ''}")


@app.command("renew")
def renew_command(folder: CentreFolder) -> None:
    """Make new server certificates; the hospitals need nothing new."""
    try:
        centre = read_centre(folder)
        renew_certificates(centre)
    except (HemafedError, OSError) as error:
        fail(error)
    left = days_left(centre.public.certificate)
    say(f"new certificates, good for {left:.0f} days{'; restart the centre to use them' if is_running(centre) else ''}")


@app.command("sites")
def sites_command(folder: CentreFolder) -> None:
    """Show who is known, with which key, and who is online."""
    try:
        centre = read_centre(folder)
        console.print(sites_table(centre), width=None if console.is_terminal else 200)  # a line with its key
        for warning in expiry_warnings(centre):
            say(warning)
    except (HemafedError, OSError) as error:
        fail(error)


@app.command("start")
def start_command(folder: CentreFolder) -> None:
    """Serve hospitals and carry out runs until stopped; goes on with a run that was cut off."""
    try:
        start_log("hemafed.server")
        daemon = Daemon(read_centre(folder), log.info)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, daemon.stop)
        daemon.run()
    except (HemafedError, OSError) as error:
        fail(error)


@app.command("run")
def run_command(
    folder: CentreFolder,
    preset: Annotated[Path | None, typer.Option(help="TOML file of run config keys")] = None,
    keys: Annotated[list[str] | None, typer.Option("--set", help="one more key, such as federation.rounds=3")] = None,
    follow: Annotated[bool, typer.Option(help="wait for the end and show the rounds")] = True,
) -> None:
    """Have the running centre carry out a run; Ctrl-C leaves it to it."""
    try:
        centre = read_centre(folder)
        config = read_keys(preset, keys or [])
        parsed = parse_config(flatten(config))
        name = parsed.run.id or new_run_name(parsed)
        if not is_running(centre):
            raise CentreError(f"the centre in {folder} is not running; 'hemafed-server start {folder}' does that")
        check_run(centre.runs, name, parsed)
        request_run(centre, name, config)
        say(f"run {name} is on its way: hemafed-server status {folder}")
        ended = follow_run(centre, name, say) if follow else None
    except (HemafedError, OSError) as error:
        fail(error)
    if ended is not None and ended.status != "finished":
        fail(CentreError(f"run {name} {ended.status}: {ended.error or 'on request'}"))


@app.command("stop")
def stop_command(folder: CentreFolder) -> None:
    """Stop the run that is going on; its checkpoint stays, and `run --set run.resume=true` goes on with it."""
    try:
        centre = read_centre(folder)
        request = read_request(centre)
        if request is None or request.status in TERMINAL:
            raise CentreError("no run is going on; 'hemafed-server status' shows the last one")
        write_request(centre, replace(request, stop=True))
    except (HemafedError, OSError) as error:
        fail(error)
    own = shlex.quote(str(centre.runs / request.name / "config.toml"))
    say(f"run {request.name} is being stopped; to go on with it:")
    say(f"    hemafed-server run {shlex.quote(str(folder))} --preset {own} --set run.resume=true")


@app.command("status")
def status_command(folder: CentreFolder) -> None:
    """Show the centre, its run, whom it waits for and what went wrong last at each site."""
    try:
        for line in status_lines(read_centre(folder)):
            say(line)
    except (HemafedError, OSError) as error:
        fail(error)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run's folder, such as runs/latest")],
    site_yaml: Annotated[list[Path], typer.Argument(help="site.yaml of each held-out hospital, ingested")],
) -> None:
    """Test a run's global model on hospitals that never trained; complete its summary and report."""
    from server.evaluation.results_table import evaluate_run, result_table  # torch and all: slow, and only needed here

    try:
        page, summary = evaluate_run(run, site_yaml, lambda line: console.print(line, highlight=False))
    except HemafedError as error:
        fail(error)
    console.print(result_table(summary))
    console.print(f"report: {page}", highlight=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder, such as runs/latest")]) -> None:
    """Rewrite a run's summary and report.html with the counts that held-out hospitals sent."""
    from server.evaluation.results_table import report_anew

    try:
        console.print(f"report: {report_anew(run)}", highlight=False)
    except HemafedError as error:
        fail(error)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a finished run's folder, such as runs/latest")],
    file: Annotated[Path, typer.Argument(help="model file to write, NAME.safetensors")],
) -> None:
    """Write a run's final model as one file, which `hemafed-client segment` takes."""
    from server.evaluation.export import export_model  # torch is slow to load

    try:
        export_model(run, file)
    except (HemafedError, OSError) as error:
        fail(error)
    say(f"wrote {file}; research use only, not for diagnosis")


def main() -> None:
    """Entry point."""
    app()
