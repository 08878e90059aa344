from __future__ import annotations

import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from client.gate import ROOT, RUNNING
from flwr.supercore.error.base import ApiErrorCode
from flwr.supernode import fleet_http_connection, start_client_internal

import client.join
from client.enrol import read_known_centre
from client.join import Daemon, _answering, _reason, install_unit, site_unit
from shared.enrol import EnrolError
from shared.processes import flower_environment, hold, is_held, owned
from shared.site import read_site
from tests.centres import enrol, make_centre
from tests.small_sites import make_site

RECEIVING = "INFO :      Receiving: train message (ID: 6f0c)"
SENDING = "INFO :      Sending: train message (ID: 91ab)"
ENDS = [
    "INFO :      Sent successfully",
    "ERROR :     Failed to receive message 6f0c: timed out",
    "ERROR :     Failed to send message 91ab: [Errno 104] Connection reset by peer",
    "INFO :      Run ID 17 is not in `RUNNING` status. Ignoring message 6f0c.",
    "INFO :      Run ID 17 is not in `RUNNING` status. Ignoring reply message 91ab.",
    "INFO :      Run transitioned to a non-`RUNNING` status while receiving a message. Ignoring the message.",
]


@pytest.fixture
def site_yaml(tmp_path: Path) -> Path:
    return enrol(make_centre(tmp_path / "centre"), tmp_path / "hospital", "hospital-01")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def daemon(site_yaml: Path, said: list[str]) -> Daemon:
    return Daemon(read_site(site_yaml), site_yaml, said.append)


def wait(until: object, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_message_is_being_answered_from_its_arrival_until_its_reply_is_sent() -> None:
    assert _answering(RECEIVING, False)
    for line in ("INFO :      [RUN 17, ROUND 3]", "INFO :      Received successfully", SENDING, "epoch 1 of 2", ""):
        assert _answering(line, True)
        assert not _answering(line, False)
    for line in ENDS:
        assert not _answering(line, True)


def test_the_node_of_flower_writes_these_lines() -> None:
    """Another version of Flower may have other words; then the daemon would end nodes that work, or none."""
    source = inspect.getsource(start_client_internal)
    for text in (
        '"Receiving: %s message (ID: %s)"',
        '"Sending: %s message (ID: %s)"',
        '"Sent successfully"',
        '"Failed to receive message %s: %s"',
        '"Failed to send message %s: %s"',
        '"Run ID %s is not in `RUNNING` status. Ignoring message %s."',
        '"Run ID %s is not in `RUNNING` status. Ignoring reply message %s."',
        '"Ignoring the message."',
    ):
        assert text in source, text
    source = inspect.getsource(fleet_http_connection)
    assert 'f"[code: {flower_error.code}] {flower_error.message}"' in source
    assert '"recognize this SuperNode."' in source
    assert ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED == 2004


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "[code: 2004] Node activation failed.",
            "it is not registered or revoked (ask the centre), or it still counts",
        ),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer (_ssl.c:1006)",
            "the centre's certificate cannot be trusted; 'hemafed-client join --check' says why",
        ),
        (
            "ERROR :     Heartbeat failed unexpectedly. The SuperLink does not recognize this SuperNode.",
            "the centre has forgotten this node, as it does when it starts anew",
        ),
    ],
)
def test_an_end_is_told_in_words_with_the_next_step(line: str, told: str) -> None:
    assert told in _reason(line)


@pytest.mark.parametrize("line", ["", RECEIVING, *ENDS, "[code: 2008] Failed to get run.", "code: 2004"])
def test_other_lines_tell_nothing_of_an_end(line: str) -> None:
    assert _reason(line) == ""


def test_a_site_without_a_centre_has_nothing_to_join(tmp_path: Path) -> None:
    site_yaml = make_site(tmp_path, {}, site="hospital-01")
    with pytest.raises(EnrolError, match="site 'hospital-01' answered no invitation"):
        Daemon(read_site(site_yaml), site_yaml, print)


def test_a_second_daemon_of_a_site_is_refused(daemon: Daemon, site_yaml: Path, said: list[str]) -> None:
    lock = read_known_centre(read_site(site_yaml)).folder / "lock"
    daemon.stop()  # a daemon that does not see the lock ends at once, and fails the test
    with (
        hold(lock),
        pytest.raises(
            EnrolError, match=r"site 'hospital-01' takes part already, .* a site is joined once: end the other"
        ),
    ):
        daemon.run()
    assert said == []
    assert not is_held(lock)


def test_a_daemon_that_is_stopped_lets_its_lock_go(daemon: Daemon, site_yaml: Path, said: list[str]) -> None:
    daemon.stop()
    daemon.run()
    assert said == ["stopped"]
    assert not is_held(read_known_centre(read_site(site_yaml)).folder / "lock")


def test_a_daemon_ends_what_one_that_was_killed_left(daemon: Daemon, site_yaml: Path) -> None:
    folder = read_known_centre(read_site(site_yaml)).folder
    left = subprocess.Popen(["sleep", "60"], env=flower_environment(folder, folder))
    other = subprocess.Popen(["sleep", "60"], env=flower_environment(folder.parent, folder))
    try:
        wait(lambda: left.pid in {process.pid for process in owned(folder)})  # its environment comes after its start
        daemon.stop()
        daemon.run()
        assert left.poll() is not None
        assert other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", ["flwr-serverapp", "flwr-simulation", "flwr-agentapp", "flwr-connector", "flwr-model"])
def test_a_site_runs_no_app_of_another_kind(daemon: Daemon, name: str) -> None:
    programs = daemon._write_programs()
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    assert shutil.which(name, path=path) == str(programs / name)
    done = subprocess.run([programs / name, "--token", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"this site runs no app of the kind {name}\n"


def test_every_program_of_an_app_that_flower_has_is_ours(daemon: Daemon) -> None:
    """A new kind of app in another version of Flower must not slip past."""
    programs = {path.name for path in daemon._write_programs().iterdir()}
    installed = {path.name for path in Path(sys.executable).parent.glob("flwr-*")}
    assert installed <= programs


def test_a_client_app_is_the_program_of_the_site(daemon: Daemon, tmp_path: Path) -> None:
    """It says which process it is, in the directory of the site's own code, and takes what flwr-clientapp takes."""
    program, pid_file = daemon._write_programs() / "flwr-clientapp", tmp_path / "app.pid"
    environment = flower_environment(tmp_path, tmp_path / "flower", **{RUNNING: str(pid_file)})
    started = subprocess.Popen(
        [program, "--help"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 0, output
    assert "--runtime-api-address" in output
    assert int(pid_file.read_text()) == started.pid
    assert f"cd {ROOT}" in program.read_text()


def test_programs_are_written_anew_whatever_was_there(daemon: Daemon) -> None:
    folder = daemon._write_programs()
    (folder / "flwr-serverapp").write_text("#!/bin/sh\nexit 0\n")
    (folder / "flwr-serverapp").chmod(0o644)
    assert daemon._write_programs() == folder
    assert subprocess.run([folder / "flwr-serverapp"], stderr=subprocess.DEVNULL, check=False).returncode == 1


@pytest.fixture
def watched(daemon: Daemon) -> Iterator[object]:
    """Watch a process that writes what a node would, in a thread; the process and its end."""
    begun = []

    def watch(script: str) -> tuple[subprocess.Popen, threading.Thread]:
        node = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
        thread = threading.Thread(target=daemon._watch, args=(node,))
        begun.append((node, thread))
        thread.start()
        return node, thread

    yield watch
    daemon.stop()
    for node, thread in begun:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        thread.join(10)


def gone_pid() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_node_is_watched_until_it_ends_and_its_last_reason_is_kept(
    watched: object, daemon: Daemon, said: list[str]
) -> None:
    _, thread = watched("echo 'INFO : Starting'; echo '[code: 2004] Node activation failed.'; echo; echo 'Bye'; exit 1")
    thread.join(20)
    assert not thread.is_alive()
    assert said == ["INFO : Starting", "[code: 2004] Node activation failed.", "Bye"]
    assert "the centre does not take this node" in daemon._reason


def test_a_node_is_watched_until_the_daemon_is_told_to_stop(watched: object, daemon: Daemon) -> None:
    node, thread = watched("sleep 60")
    daemon.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert node.poll() is None, "who watches ends nobody; the daemon does afterwards"


def test_a_node_that_waits_for_an_app_that_died_is_given_up(
    watched: object, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.join, "WEDGED_S", 0.3)
    daemon._running.write_text(str(gone_pid()))
    _, thread = watched(f"echo '{RECEIVING}'; sleep 60")
    thread.join(20)
    assert not thread.is_alive()
    assert daemon._reason == "its app ended without an answer"


BROKEN = "WARNING :   Giving up reconnection after 30.11 seconds and 2 tries."


def test_a_node_whose_connection_broke_and_did_not_come_back_is_given_up(
    watched: object, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.join, "WEDGED_S", 0.3)
    _, thread = watched(f"echo '{BROKEN}'; sleep 60")
    thread.join(20)
    assert not thread.is_alive()
    assert daemon._reason == "its connection broke, and it did not come back by itself"


@pytest.mark.parametrize(
    ("lines", "app"),
    [
        ([RECEIVING], "lives"),
        ([RECEIVING], "has not begun"),
        ([RECEIVING, SENDING, ENDS[0]], "ended"),
        ([], "ended"),
        ([BROKEN, "INFO : Connection successful after 16.95 seconds and 6 tries."], "ended"),
        ([RECEIVING, BROKEN], "lives"),
    ],
    ids=[
        "its app lives",
        "its app has not begun",
        "it has answered",
        "it was asked nothing",
        "its connection came back",
        "its app trains without a connection",
    ],
)
def test_a_node_is_not_given_up_while(
    watched: object,
    daemon: Daemon,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    app: str,
) -> None:
    monkeypatch.setattr(client.join, "WEDGED_S", 0.3)
    if app != "has not begun":
        daemon._running.write_text(str(os.getpid() if app == "lives" else gone_pid()))
    told = f"printf '%s\\n' {' '.join(map(shlex.quote, lines))};" if lines else ""  # all at once
    _, thread = watched(f"{told} sleep 60")
    wait(lambda: len(said) == len(lines))
    thread.join(1.5)
    assert thread.is_alive()


def verified(path: Path, user: bool, runtime: Path) -> list[str]:
    """What systemd says about a unit file."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    command = ["systemd-analyze", "verify", *(["--user"] if user else []), str(path)]
    runtime.mkdir(exist_ok=True)
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return [line for line in told.stderr.splitlines() if path.name in line] + [told.stderr] * (told.returncode != 0)


@pytest.mark.parametrize("user", [False, True], ids=["of the system", "of a user"])
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path, user: bool) -> None:
    unit = tmp_path / "hemafed-hospital-01.service"
    site_yaml = tmp_path / "the site's folder" / "site.yaml"
    site_yaml.parent.mkdir()
    site_yaml.touch()
    text = site_unit(site_yaml, user)
    unit.write_text(text)
    assert verified(unit, user, tmp_path / "run") == []
    assert f'" "join" "{site_yaml}"\n' in text
    assert text.endswith(f"WantedBy={'default.target' if user else 'multi-user.target'}\n")
    unit.write_text(text.replace("Restart=always", "Restart=allways"))
    assert any("allways" in line for line in verified(unit, user, tmp_path / "run")), "else the lines above say nothing"


def test_the_unit_of_a_user_is_written_where_systemd_looks_for_it(
    site_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(site_yaml.parent)
    path, commands = install_unit(read_site(site_yaml), Path("site.yaml"))
    assert path == tmp_path / "home" / ".config" / "systemd" / "user" / "hemafed-hospital-01.service"
    assert path.read_text() == site_unit(site_yaml.resolve(), user=True), "with its whole path"
    assert commands == [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now hemafed-hospital-01.service",
        "loginctl enable-linger  # so that it runs while nobody is logged in",
    ]


def test_the_unit_of_the_system_runs_as_the_owner_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_yaml = tmp_path / "site.yaml"
    site_yaml.touch()
    assert ("User=" in site_unit(site_yaml, user=False)) == (site_yaml.stat().st_uid != 0)
    monkeypatch.setattr(client.join, "user_name", lambda number: "radiology")
    assert "\nUser=radiology\n" in site_unit(site_yaml, user=False)
    assert "User=" not in site_unit(site_yaml, user=True), "a user's own manager runs as that user"
