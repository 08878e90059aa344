from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from shared.host.processes import (
    OWNER,
    HeldError,
    answers,
    end_all,
    end_owned,
    flower_environment,
    hold,
    is_held,
    owned,
)
from tests.support.centres import closed_port, page, serving

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from shared.host.processes import hold
with hold(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[2]))
    child.kill()
"""
# The child says its own number: at its start a process has no environment yet, and so no marker.
PARENT = """
import subprocess, sys
child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", child])
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""
WILLING = """
import signal, sys, time
def end(*_):
    print("goes in order", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def running(code: str, *arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process of its own and its first line; it ends with the block if not before."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def ended_after(pid: int) -> Iterator[psutil.Process]:
    """Somebody else's child, which ends with the block."""
    process = psutil.Process(pid)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its status any more does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    assert not is_held(path)
    with running(HOLDER, path, 60) as (holder, child), ended_after(int(child)):
        assert is_held(path)
        with pytest.raises(HeldError, match=str(path)), hold(path, wait_s=0.0):
            pytest.fail("held twice")
        holder.kill()
        holder.wait()
        assert lives(int(child)), "what it started goes on, and holds nothing"
        assert not is_held(path)
        with hold(path, wait_s=0.0):
            assert is_held(path)
    assert not is_held(path)


def test_a_lock_that_is_let_go_meanwhile_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with running(HOLDER, path, 0.5), hold(path, wait_s=20.0):
        assert is_held(path)


def test_a_lock_that_is_not_let_go_is_waited_for_as_long_as_said(tmp_path: Path) -> None:
    path, begin = tmp_path / "lock", time.monotonic()
    with hold(path), pytest.raises(HeldError), hold(path, wait_s=0.3):
        pytest.fail("held twice")
    assert 0.3 <= time.monotonic() - begin < 5


def test_a_lock_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "lock"):
        _ = 1 / 0
    assert not is_held(tmp_path / "lock")


def test_a_look_at_a_lock_does_not_keep_a_daemon_from_it(tmp_path: Path) -> None:
    """A look takes the lock for a moment; a daemon that starts at that moment waits for it."""
    looks = "import sys; from pathlib import Path; from shared.host.processes import is_held; print(1, flush=True)\n"
    looks += "while True: is_held(Path(sys.argv[1]))"
    with running(looks, tmp_path / "lock"):
        for _ in range(5):
            with hold(tmp_path / "lock", wait_s=20.0):
                assert is_held(tmp_path / "lock")


def test_what_a_killed_parent_left_is_found_by_its_owner_and_nothing_else(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a", tmp_path / "ab"
    with (
        running(PARENT, **{OWNER: str(ours)}) as (parent, child),
        running(PARENT, **{OWNER: str(theirs)}) as (_, other),
        running(PARENT, HEMAFED_OTHER=str(ours)) as (_, unmarked),
        ended_after(int(child)),
        ended_after(int(other)),
        ended_after(int(unmarked)),
    ):
        assert {process.pid for process in owned(ours)} == {parent.pid, int(child)}
        parent.kill()
        parent.wait()
        assert [process.pid for process in owned(ours)] == [int(child)]
        assert int(other) in {process.pid for process in owned(theirs)}
        end_all(owned(ours), timeout_s=3)
        assert owned(ours) == []
        assert len(owned(theirs)) == 2, "nobody else's is ended"
        assert lives(int(unmarked))


def test_who_does_not_listen_is_killed_and_who_does_may_put_things_in_order(tmp_path: Path) -> None:
    with running(STUBBORN) as (stubborn, _), running(WILLING) as (willing, _), running(STUBBORN) as (stopped, _):
        stopped.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        end_all([psutil.Process(process.pid) for process in (stubborn, willing, stopped)], timeout_s=1.0)
        assert 1.0 <= time.monotonic() - begin < 10
        assert willing.stdout.read() == "goes in order\n"
        for process in (stubborn, willing, stopped):
            assert not lives(process.pid)


def test_those_who_listen_are_not_waited_for_in_vain() -> None:
    with running(WILLING) as (willing, _):
        begin = time.monotonic()
        end_all([psutil.Process(willing.pid)], timeout_s=60.0)
        assert time.monotonic() - begin < 30


def test_a_process_that_is_gone_already_is_no_trouble() -> None:
    with running(PARENT) as (parent, child), ended_after(int(child)) as left:
        gone = psutil.Process(parent.pid)
        parent.kill()
        parent.wait()
        end_all([gone, left], timeout_s=3)
        assert not lives(left.pid)
    end_all([])


def test_programs_of_flower_inherit_the_mark_and_neither_telemetry_nor_an_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "pacs.hospital")
    monkeypatch.delenv("no_proxy", raising=False)
    made = flower_environment(tmp_path / "centre", tmp_path / "flower", MORE="1")
    assert made[OWNER] == str(tmp_path / "centre")
    assert made["FLWR_HOME"] == str(tmp_path / "flower")
    assert made["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (made["HTTPS_PROXY"], made["MORE"]) == ("http://proxy:3128", "1")
    assert made["NO_PROXY"] == made["no_proxy"] == "pacs.hospital,127.0.0.1,localhost"
    assert "PYTHONPATH" not in made
    assert OWNER not in os.environ
    with running(PARENT, **made) as (_, child), ended_after(int(child)):
        assert int(child) in {process.pid for process in owned(tmp_path / "centre")}


def test_a_server_on_this_machine_is_asked_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda line: line.sendall(page()) if line.recv(65536) else None) as port:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
        assert not answers(f"http://127.0.0.1:{port}/"), "a page that is not there"
    with serving(
        lambda line: line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") if line.recv(65536) else None
    ) as port:
        assert answers(f"http://127.0.0.1:{port}/")
    assert not answers(f"http://127.0.0.1:{closed_port()}/")


def test_a_process_that_hides_its_environment_is_known_by_its_arguments(tmp_path: Path) -> None:
    """As flower-superexec does; root sees it all the same, so who looks here has not root's rights."""
    confined = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv, and root sees everything")
        confined = ["setpriv", "--bounding-set=-sys_ptrace,-sys_admin,-perfmon", "--inh-caps=-all"]
    hide = "import ctypes, time; ctypes.CDLL(None).prctl(4, 0); print('hidden', flush=True); time.sleep(60)"
    look = (
        "import sys; from pathlib import Path; from shared.host.processes import owned; "
        "print([process.pid for process in owned(Path(sys.argv[1]))])"
    )
    folder, other = tmp_path / "centre", tmp_path / "centre-2"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", hide, str(one / "key")], env=os.environ | {OWNER: str(one)}, stdout=subprocess.PIPE
        )
        for one in (folder, other)
    ]
    try:
        for process in started:
            assert process.stdout.read(6) == b"hidden"
        seen = subprocess.check_output([*confined, sys.executable, "-c", look, str(folder)], cwd=ROOT, text=True)
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    assert seen.strip() == f"[{started[0].pid}]"


def test_a_child_without_a_mark_is_ended_too(tmp_path: Path) -> None:
    """As every child is in the moment of its start; waiting for it would never end."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        end_owned(tmp_path, [child])
        assert not lives(child.pid)
    finally:
        child.kill()


def test_children_that_have_ended_already_are_no_reason_to_wait(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    end_owned(tmp_path, [child])
    assert child.returncode == 0


def test_a_look_at_a_lock_makes_no_file(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "state" / "lock")
    assert list(tmp_path.iterdir()) == []
