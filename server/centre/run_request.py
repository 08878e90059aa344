"""The run that the centre is to carry out: a file that the operator's commands change and the running centre acts on."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from server.centre.config import Centre, CentreError
from shared.host.files import replace_text
from shared.host.processes import is_held

log = logging.getLogger("hemafed.server")

TERMINAL = ("finished", "failed", "stopped")


@dataclass(frozen=True)
class RunRequest:
    """The run that the centre is to carry out, in state/run.json.

    Attributes:
      name: of its folder in runs/.
      config: sections of its run config.
      status: waiting (to be started or resumed), running, or one of TERMINAL.
      attempts: how often it was started.
      flower_run: Flower's number of it.
      error: why it failed, or why it was started again.
      not_before: time of the next attempt.
      stop: whether it is to be stopped.
    """

    name: str
    config: dict[str, dict]
    status: str = "waiting"
    attempts: int = 0
    flower_run: str = ""
    error: str = ""
    not_before: float = 0.0
    stop: bool = False


def read_request(centre: Centre) -> RunRequest | None:
    """Return the request of the present or last run; None if there never was one."""
    path = centre.state / "run.json"
    return RunRequest(**json.loads(path.read_text())) if path.is_file() else None


def write_request(centre: Centre, request: RunRequest) -> None:
    """Replace state/run.json in one step."""
    replace_text(centre.state / "run.json", json.dumps(asdict(request), indent=2) + "\n")


def request_run(centre: Centre, name: str, config: dict[str, dict]) -> None:
    """Ask for a run.

    Raises:
      CentreError: another one is going on.
    """
    last = read_request(centre)
    if last is not None and last.status not in TERMINAL:
        raise CentreError(
            f"run {last.name!r} is {last.status}; a centre carries out one run at a time: wait, or 'hemafed-server stop' it"
        )
    write_request(centre, RunRequest(name, config))


def write_trouble(centre: Centre, text: str) -> None:
    """Say in state/trouble.txt why the centre does not serve; nothing is the end of the trouble."""
    path = centre.state / "trouble.txt"
    try:
        if text:
            replace_text(path, text + "\n")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # a full disk may be the trouble
        log.warning(f"{path} cannot be written ({error.strerror}): {text}")


def read_trouble(centre: Centre) -> str:
    """Return why the centre does not serve; empty if it does."""
    try:
        return (centre.state / "trouble.txt").read_text().strip()
    except FileNotFoundError:
        return ""


def lock_path(centre: Centre) -> Path:
    """The file that a running daemon of this centre holds."""
    return centre.state / "lock"


def is_running(centre: Centre) -> bool:
    """Whether a daemon of this centre is there."""
    return centre.state.is_dir() and is_held(lock_path(centre))
