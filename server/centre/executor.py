"""Runs the server's part of runs: `python -m server.centre.executor ADDRESS AUTHORITY SECRET`

In place of flower-superexec, which puts each task's token on a command line, where every user of the machine reads it and
could then act as the run. Here the token is in a file in memory that only the process of the run and this one have open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
POLL_S, RETRY_S = 1.0, 5.0


def main(address: str, authority: str, secret: str) -> None:
    """Ask the SuperLink for runs to carry out, and start a process for each, until this one is ended.

    Args:
      address: "host:port" of the SuperLink.
      authority: file of the certificate authority that it is trusted by.
      secret: file that the SuperLink has too.
    """
    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=Path(authority).read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=load_superexec_auth_secret(secret_file=secret), protected_methods={ACQUIRE}
            ),
        ],
    )
    running: list[subprocess.Popen] = []
    while True:
        pause_s = POLL_S
        try:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if answer.HasField("task") and answer.token:
                running.append(start_app(address, authority, answer.token))
        except httpx.HTTPError as error:
            print(f"the SuperLink does not answer ({type(error).__name__}: {str(error)[:200]})", flush=True)
            pause_s = RETRY_S
        running = [process for process in running if process.poll() is None]  # ended ones are fetched
        time.sleep(pause_s)


def start_app(address: str, authority: str, token: str) -> subprocess.Popen:
    """Start Flower's program for one run; it ends with this process."""
    file = os.memfd_create("token")
    try:
        os.write(file, token.encode())
        program = Path(sys.executable).parent / "flwr-serverapp"
        command = [str(program), "--runtime-api-address", address, "--root-certificates", authority]
        command += ["--token-file", f"/proc/self/fd/{file}", "--parent-pid", str(os.getpid())]
        # Its output reaches the SuperLink through Flower, and from there `flwr log`.
        return subprocess.Popen(command, pass_fds=[file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        os.close(file)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main(*sys.argv[1:])
