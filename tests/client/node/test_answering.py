"""The process that answers: warm, one message at a time, without the node's key, and replaceable."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flwr.app import ConfigRecord, RecordDict

import client.node.answering
from client.node.answering import AnswerError, Answering, StoppedError, answering_user, watcher
from client.node.frames import FrameError, receive_frames, send_frames
from client.node.private import keep_from_others
from shared.config import parse_config
from shared.host.processes import owned
from shared.model.scoring import build_model
from shared.wire.records import to_arrays, to_record
from tests.conftest import SmallHospitals, small_config
from tests.support.orders import Sender, opened

ALWAYS = lambda: True  # noqa: E731


@pytest.fixture(scope="module")
def sender(hospitals: SmallHospitals, tmp_path_factory: pytest.TempPathFactory) -> Sender:
    root = tmp_path_factory.mktemp("sender")
    shutil.copytree(hospitals.untouched / "hospital-01", root / "hospital-01")
    config = small_config(train__epochs=30)
    return Sender(root, root / "hospital-01" / "site.yaml", "hospital-01", config)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def answering(sender: Sender, said: list[str], tmp_path: Path) -> Iterator[Answering]:
    made = Answering(tmp_path, sender.site_yaml, said.append)
    yield made
    made.close()
    assert owned(tmp_path) == []


def hello(answering: Answering, sender: Sender) -> str:
    reply = opened(answering.ask(sender.task(sender.message()), ALWAYS))
    return str(reply.content["facts"]["site"])


def test_one_process_answers_message_after_message_and_a_new_one_after_its_death(
    answering: Answering, sender: Sender, said: list[str]
) -> None:
    assert hello(answering, sender) == "hospital-01"
    first = answering._process.pid
    assert hello(answering, sender) == "hospital-01"
    assert answering._process.pid == first
    os.kill(first, signal.SIGKILL)
    answering._process.wait()
    assert hello(answering, sender) == "hospital-01"
    assert answering._process.pid != first
    assert said == ["the process that answers ended"]


def test_the_process_holds_nothing_of_the_node_and_listens_nowhere(answering: Answering, sender: Sender) -> None:
    answering.warm_up()
    process = psutil.Process(answering._process.pid)
    assert process.num_threads() == 1, "it forks"
    assert [line for line in process.net_connections("inet") if line.status == psutil.CONN_LISTEN] == []
    assert not any("key" in Path(file.path).name for file in process.open_files())
    assert all(len(argument) < 300 for argument in process.cmdline())


def test_a_child_that_is_killed_costs_its_message_alone(answering: Answering, sender: Sender) -> None:
    answering.warm_up()
    parent = psutil.Process(answering._process.pid)

    def kill_child() -> None:
        while not (children := parent.children()):
            time.sleep(0.001)
        children[0].kill()

    thread = threading.Thread(target=kill_child)
    thread.start()
    task = sender.task(sender.message())
    big = type(task)(task.place, task.run, task.bundle, task.tree, (*task.objects, bytes(200 << 20)))
    with pytest.raises(AnswerError, match="ended"):
        answering.ask(big, ALWAYS)
    thread.join()
    assert parent.is_running()
    assert hello(answering, sender) == "hospital-01"


def test_an_answer_that_is_not_wanted_any_more_is_ended(answering: Answering, sender: Sender) -> None:
    config = parse_config(sender.config)
    arrays = to_arrays(build_model(config.model, config.run.seed).state_dict(), ("encoder",))
    order = ConfigRecord({"run": "unwanted", "server-round": 1})
    content = RecordDict({"arrays": to_record(arrays), "config": order})
    with pytest.raises(StoppedError):
        answering.ask(sender.task(sender.message("train", content)), lambda: False)
    assert answering._process is None


def test_a_process_with_old_code_is_replaced(
    answering: Answering, sender: Sender, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering.warm_up()
    first = answering._process.pid
    monkeypatch.setattr(client.node.answering, "code_hash", lambda: "another")
    answering.warm_up()
    assert answering._process.pid != first
    assert said == ["the process that answers has old code"]


def test_where_libraries_start_threads_each_message_has_a_process(
    answering: Answering, sender: Sender, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.node.answering, "QUIET", {"OPENBLAS_NUM_THREADS": "2"})
    answering.warm_up()
    assert said == ["this machine's libraries have threads from the start: each message gets a process of its own"]
    assert hello(answering, sender) == "hospital-01"
    first = answering._process
    assert hello(answering, sender) == "hospital-01"
    assert answering._process is not first
    assert said[1:] == []


def test_a_process_that_does_not_start_is_told(
    answering: Answering, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.node.answering, "ROOT", Path("/nowhere"))
    monkeypatch.setattr(client.node.answering.sys, "executable", "/bin/false")
    with pytest.raises(AnswerError, match="ended at its start"):
        answering.warm_up()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_started_by_root_the_key_is_out_of_reach_of_who_answers(tmp_path: Path) -> None:
    site_yaml, folder = tmp_path / "site.yaml", tmp_path / "state" / "centre"
    folder.mkdir(parents=True)
    site_yaml.touch()
    (folder / "node.key").write_text("secret")
    os.chmod(tmp_path, 0o755)
    for path in (site_yaml, folder, folder / "node.key"):
        os.chown(path, 65534, 65534)
    read = ["cat", str(folder / "node.key")]
    theirs = answering_user(site_yaml)
    assert theirs == {"user": 65534, "group": 65534, "extra_groups": []}
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o001 == 0 and parent.is_relative_to("/tmp"):
            os.chmod(parent, 0o711)
    assert subprocess.run(read, **theirs, capture_output=True, check=False).stdout == b"secret", "else it says nothing"
    keep_from_others(folder, 65534)
    assert subprocess.run(read, **theirs, capture_output=True, check=False).stdout == b""
    os.chown(site_yaml, 0, 0)
    assert answering_user(site_yaml) == {}


def test_a_run_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def running() -> bool:
        looks.append(1)
        return len(looks) < 2

    go_on = watcher(lambda: False, running)
    assert go_on()
    assert looks == []
    monkeypatch.setattr(client.node.answering, "LOOK_S", 0.0)
    assert go_on()
    assert not go_on()
    assert not watcher(lambda: True, running)()


def test_frames_come_as_they_were_sent() -> None:
    one, other = socket.socketpair()
    with one, other:
        frames = [b"", b"a", bytes(3 << 20), b"\x00\xff"]
        thread = threading.Thread(target=send_frames, args=(one, frames))
        thread.start()
        assert receive_frames(other) == frames
        thread.join()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"", "ended"),
        (struct.pack("<I", 2) + struct.pack("<Q", 1) + b"a", "ended"),
        (struct.pack("<I", 1 << 31), "expected at most"),
        (struct.pack("<I", 1) + struct.pack("<Q", 1 << 40), "more than"),
    ],
)
def test_frames_that_are_none_are_refused_before_memory_is_taken(sent: bytes, told: str) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(sent)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(FrameError, match=told):
            receive_frames(other)
