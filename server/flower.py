"""Flower's own commands and programs, as the centre calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from server.centre import Centre, CentreError
from shared.processes import flower_environment

PROGRAMS = Path(sys.executable).parent  # of this environment: flwr, flower-superlink, flower-superexec


def centre_environment(centre: Centre) -> dict[str, str]:
    """For Flower's programs and commands of this centre."""
    path = os.pathsep.join([str(PROGRAMS), os.environ.get("PATH", "")])
    return flower_environment(centre.folder, centre.flower, PATH=path)


def flwr(centre: Centre, *arguments: str) -> dict:
    """Run one of Flower's commands against the centre's SuperLink; what it prints as JSON.

    Raises:
      CentreError: it failed; with its words.
    """
    command = [str(PROGRAMS / "flwr"), *arguments, "--format", "json"]
    done = subprocess.run(
        command, env=centre_environment(centre), cwd=centre.flower, capture_output=True, text=True, check=False
    )
    try:
        content = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        content = {}
    if done.returncode or not content or content.get("success") is False:
        told = content.get("error-message") or (done.stderr or done.stdout).strip()[-500:]
        raise CentreError(f"'flwr {' '.join(arguments[:2])}' failed: {told or f'exit status {done.returncode}'}")
    return content
