"""Flower's own commands and programs, as the centre calls them."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import yaml

from server.centre.authority import write_private
from server.centre.config import Centre, CentreError
from shared.host.processes import flower_environment

PROGRAMS = Path(sys.executable).parent  # of this environment: flwr, flower-superlink, flower-superexec


def centre_environment(centre: Centre) -> dict[str, str]:
    """For Flower's programs and commands of this centre."""
    path = os.pathsep.join([str(PROGRAMS), os.environ.get("PATH", "")])
    return flower_environment(centre.folder, centre.flower, PATH=path)


def operator_token(centre: Centre) -> str:
    """Return the token by which the SuperLink knows the centre's own commands from those of other users of this machine."""
    return hmac.new(centre.secret.read_bytes(), b"operator", hashlib.sha256).hexdigest()


def write_credentials(centre: Centre) -> None:
    """Write the operator's token where Flower's commands look for it; readable by its owner only."""
    host, token = f"127.0.0.1:{centre.loopback_port}", operator_token(centre)
    # Flower sends a bearer token where it believes that somebody logged in; flwr/cli/constant.py has the names.
    texts = {"authn-type": "oidc", "oidc-access-token": token, "oidc-refresh-token": "none"}
    content = {f"flower.account-auth.{host}.{name}": b64encode(text.encode()).decode() for name, text in texts.items()}
    write_private(centre.flower / "credentials.yaml", yaml.safe_dump(content).encode())


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
