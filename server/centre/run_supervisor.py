"""Start, resume, stop and follow the run that the operator asked for.

The running centre calls `supervise` about once a second. Everything that lasts is in state/run.json and in the run's own
folder, so that a centre that ended without warning goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import tomli_w

from server.centre.config import CONNECTION, Centre, CentreError
from server.centre.flower_commands import flwr
from server.centre.run_request import TERMINAL, RunRequest, read_request, write_request
from server.storage.run_folder import read_status, write_status

ROOT = Path(__file__).resolve().parents[2]
ASK_FLOWER_S = 15.0  # between two questions to Flower about a run that reports progress by itself
MOST_ATTEMPTS = 30  # of a run whose process ends without a reason; with pauses more than two hours
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0  # before another attempt
RESTARTED = "the server was restarted"


def after_restart(centre: Centre) -> None:
    """Let a run continue that was running when the SuperLink ended."""
    request = read_request(centre)
    if request is not None and request.status == "running":
        ended = read_status(centre.runs / request.name).state == "finished"
        _update(centre, request, status="finished" if ended else "waiting", error="" if ended else RESTARTED)


def supervise(centre: Centre, asked: float, say: Callable[[str], None]) -> float:
    """Bring the run to the state that its request wants.

    Args:
      centre: whose run.
      asked: when Flower was last asked about it, on the monotonic clock.
      say: called with a line for every change.
    Returns:
      When Flower was last asked about it.
    Raises:
      CentreError: Flower did not answer.
    """
    request = read_request(centre)
    if request is None or request.status in TERMINAL:
        return asked
    if request.stop:
        with suppress(CentreError):  # it may have ended by itself
            flwr(centre, "stop", request.flower_run, CONNECTION)
        _update(centre, request, status="stopped")
    elif request.status == "waiting" and time.time() >= request.not_before:
        _launch(centre, request, say)
    elif request.status == "running":
        return _follow(centre, request, asked, say)
    return asked


def _launch(centre: Centre, request: RunRequest, say: Callable[[str], None]) -> None:
    """Call `flwr run`, resuming if the run has a folder."""
    resume = (centre.runs / request.name / "config.toml").is_file()
    places = {"id": request.name, "folder": str(centre.runs), "resume": resume}
    config = request.config | {"run": request.config.get("run", {}) | places}
    if resume:
        write_status(centre.runs / request.name, "waiting", what="the start")  # the old status no longer holds
    path = centre.state / "run-config.toml"
    path.write_text(tomli_w.dumps(config))
    try:
        started = flwr(centre, "run", str(ROOT), CONNECTION, "--run-config", str(path))
    except CentreError as error:
        _update(centre, request, status="failed", error=str(error))
        return
    _update(centre, request, status="running", flower_run=str(started["run-id"]), attempts=request.attempts + 1)
    say(f"run {request.name}: {'resumed' if resume else 'started'} as Flower's run {started['run-id']}")


def _follow(centre: Centre, request: RunRequest, asked: float, say: Callable[[str], None]) -> float:
    """See whether the run has ended, and how; returns when Flower was last asked."""
    own = read_status(centre.runs / request.name)
    if own.state not in ("finished", "failed") and time.monotonic() - asked < ASK_FLOWER_S:
        return asked
    run = flwr(centre, "ls", CONNECTION, "--run-id", request.flower_run)["runs"][0]
    if run["status"].startswith("finished"):
        _conclude(centre, request, run, say)
    return time.monotonic()


def _conclude(centre: Centre, request: RunRequest, run: dict[str, str], say: Callable[[str], None]) -> None:
    """Record how a run ended, or try it again where its process ended without a reason."""
    status, own = run["status"], read_status(centre.runs / request.name)
    if status == "finished:completed":
        _update(centre, request, status="finished", error="")
    elif own.state in ("failed", ""):  # it gave a reason, or never began; another attempt would end the same
        _update(centre, request, status="failed", error=own.error or run.get("status-details", status))
    elif request.attempts >= MOST_ATTEMPTS:
        log = centre.state / "logs" / "superexec.log"
        _update(centre, request, status="failed", error=f"{status} {MOST_ATTEMPTS} times; see {log}")
    else:
        pause_s = min(FIRST_PAUSE_S * 2**request.attempts, LONGEST_PAUSE_S)
        again = time.time() + pause_s
        _update(centre, request, status="waiting", error=f"its process ended ({status})", not_before=again)
        say(f"run {request.name}: {status} without a reason; again in {pause_s:.0f} s")
        return
    say(f"run {request.name}: {read_request(centre).status} {own.error}")


def _update(centre: Centre, request: RunRequest, **changes: object) -> None:
    """Change state/run.json; a stop that was asked for meanwhile is kept."""
    write_request(centre, replace(read_request(centre) or request, **changes))
