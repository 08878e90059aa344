from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity

import client.node.daemon
from client.node.connection import ConnectionLostError, RunOverError
from client.node.daemon import Daemon, install_unit, site_unit
from client.node.enrol import read_known_centre
from shared.host.processes import flower_environment, hold, is_held, owned
from shared.refusals import Refusal
from shared.site import read_site
from shared.wire.enrolment import EnrolError
from tests.support.centres import enrol, make_centre
from tests.support.orders import opened
from tests.support.small_sites import make_site


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


class Line:
    """In place of the connection: keeps what is pushed, or fails as a connection does."""

    def __init__(self, node_id: int, fault: Exception | None = None):
        self.node_id, self.fault, self.forgotten, self.pushed = node_id, fault, False, []

    def push(self, run_id: int, frames: list[bytes]) -> None:
        if self.fault is not None:
            raise self.fault
        self.pushed.append((run_id, opened(frames)))


def unanswered() -> MessageProto:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 17, 1
    message = Message(RecordDict(), dst_node_id=5, message_type="train")
    message.metadata.__dict__["_message_id"] = "a" * 64
    return message_to_proto(message)


def test_a_message_that_a_power_cut_left_unanswered_is_given_up(daemon: Daemon, said: list[str]) -> None:
    """The centre would wait for it until its deadline, an hour by default."""
    daemon._remember(unanswered())
    line = Line(node_id=5)
    daemon._give_up_unanswered(line)
    ((run_id, reply),) = line.pushed
    assert (run_id, reply.error.code) == (17, Refusal.FAILED)
    assert reply.metadata.reply_to_message_id == "a" * 64
    assert said == ["gave up train of run 17, which was not answered"]
    daemon._give_up_unanswered(line)
    assert len(line.pushed) == 1


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (Line(node_id=6), False),
        (Line(5, RunOverError("the run has ended")), False),
        (Line(5, ConnectionLostError("down")), True),
    ],
    ids=["of a SuperLink that is gone", "of a run that has ended", "no connection"],
)
def test_what_is_given_up_is_forgotten_once_the_centre_knows(daemon: Daemon, line: Line, kept: bool) -> None:
    daemon._remember(unanswered())
    daemon._give_up_unanswered(line)
    assert line.pushed == []
    assert daemon._unanswered.exists() == kept


def test_a_note_that_is_no_message_is_removed(daemon: Daemon) -> None:
    daemon._unanswered.write_bytes(b"\xff\xff")
    daemon._give_up_unanswered(Line(5))
    assert not daemon._unanswered.exists()


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
    assert "\nUMask=0077\n" in text
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


def test_the_unit_of_the_system_leaves_the_key_to_root_and_answers_as_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_yaml = tmp_path / "site.yaml"
    site_yaml.touch()
    monkeypatch.setattr(client.node.daemon, "user_name", lambda number: "radiology")
    text = site_unit(site_yaml, user=False)
    assert "User=" not in text
    assert "# Messages are answered as radiology, the owner of site.yaml.\nCapabilityBoundingSet=CAP_SETUID" in text
    assert "CapabilityBoundingSet" not in site_unit(site_yaml, user=True), "a user's own manager has no such right"
