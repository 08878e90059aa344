"""What reaches the client app of a hospital, and what is turned away before it."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import run_from_proto, run_to_proto
from flwr.proto.run_pb2 import Run as RunProto
from hypothesis import given, settings
from hypothesis import strategies as st

from client.boundary.audit import read_entries, verify
from client.boundary.code import code_hash
from client.node.answer import ANSWERED, MOST_ANSWERED, answer, first_time
from client.node.task import Task
from shared.refusals import TEXTS
from shared.site import read_site
from shared.wire.instructions import InstructionError
from tests.conftest import SmallHospitals, small_config
from tests.support.orders import RUN_ID, Sender, opened, project_bundle


@pytest.fixture
def sender(copied_hospitals: SmallHospitals, tmp_path: Path) -> Sender:
    site_yaml = copied_hospitals.files["hospital-01"]
    (read_site(site_yaml).state / "audit.jsonl").unlink(missing_ok=True)
    return Sender(tmp_path, site_yaml, "hospital-01", small_config())


def asked(task: Task) -> Message:
    return opened(answer(task, code_hash()))


def entries(sender: Sender) -> list[dict]:
    return [entry for _, _, entry in read_entries(read_site(sender.site_yaml).state)]


def changed_bundle(**changes: bytes) -> bytes:
    """This project's bundle with some files replaced or added; '__' in names for '/'."""
    content = BytesIO()
    with zipfile.ZipFile(BytesIO(project_bundle())) as old, zipfile.ZipFile(content, "w") as new:
        files = {name: old.read(name) for name in old.namelist()}
        for name, data in (files | {f"{k.replace('__', '/')}.py": v for k, v in changes.items()}).items():
            new.writestr(name, data)
    return content.getvalue()


def with_config(task: Task, **changes: object) -> Task:
    """A task whose run config was altered on its way; '__' in keys for '.'."""
    run = run_from_proto(RunProto.FromString(task.run))
    run.override_config = run.override_config | {key.replace("__", "."): value for key, value in changes.items()}
    return replace(task, run=run_to_proto(run).SerializeToString())


def other_config(sender: Sender) -> Task:
    return with_config(sender.task(sender.message()), train__epochs=3)


def no_config(sender: Sender) -> Task:
    return with_config(sender.task(sender.message()), train__epoch=3)


def test_a_signed_instruction_of_this_code_is_answered(sender: Sender) -> None:
    reply = asked(sender.task(sender.message()))
    assert reply.content["facts"]["site"] == "hospital-01"
    assert reply.metadata.run_id == RUN_ID
    assert entries(sender)[-1]["event"] == "released"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda s: s.task(s.message(), sign=False), "answers only what its centre signed"),
        (lambda s: replace(s, site="hospital-02").task(s.message()), "answers only what its centre signed"),
        (
            lambda s: s.task(s.message(), bundle=changed_bundle(client__train=b"")),
            "other client code than the site installed",
        ),
        (
            lambda s: s.task(s.message(), bundle=changed_bundle(client__deep__extra=b"")),
            "other client code than the site installed",
        ),
        (other_config, "answers only what its centre signed"),
        (no_config, "answers only what its centre signed"),
        (lambda s: s.task(s.message(), bundle=b"PK"), "bundle cannot be read"),
        (lambda s: s.task(s.message(), fab_hash="0" * 64), "bundle cannot be read"),
    ],
    ids=[
        "unsigned",
        "another site's",
        "other code",
        "more code",
        "other config",
        "no config",
        "no bundle",
        "another bundle",
    ],
)
def test_what_is_turned_away_stands_in_the_audit_log_and_never_reaches_the_app(
    sender: Sender, spoil: Callable[[Sender], Task], told: str
) -> None:
    reply = asked(spoil(sender))
    assert told in reply.error.reason
    (entry,) = entries(sender)
    assert entry["event"] == "refused"
    assert entry["code"] == reply.error.code


def test_a_bundle_whose_version_is_a_path_runs_nothing_and_writes_nothing(sender: Sender, tmp_path: Path) -> None:
    """Flower's installer unpacked it outside of its apps folder, and its client app answered with a slice."""
    evil = changed_bundle(client__app=f"open({str(tmp_path / 'loot.txt')!r}, 'w')".encode())
    with zipfile.ZipFile(BytesIO(evil)) as archive:
        project = archive.read("pyproject.toml").replace(b'version = "', b'version = "0/../../../../../loot/', 1)
    content = BytesIO()
    with zipfile.ZipFile(BytesIO(evil)) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, project if name == "pyproject.toml" else old.read(name))
    before = {path for path in tmp_path.rglob("*") if "state" not in path.parts}
    reply = asked(sender.task(sender.message(), bundle=content.getvalue()))
    assert "other client code than the site installed" in reply.error.reason
    assert {path for path in tmp_path.rglob("*") if "state" not in path.parts} == before
    assert "loot" not in str(sys.path)


def test_an_instruction_is_answered_once(sender: Sender) -> None:
    task = sender.task(sender.message())
    assert asked(task).has_content()
    reply = asked(task)
    assert "answered this instruction before" in reply.error.reason
    assert [entry["event"] for entry in entries(sender)] == ["released", "refused"]


def test_an_instruction_is_forgotten_when_it_does_not_count_any_more(tmp_path: Path) -> None:
    assert first_time(tmp_path, "a", 100.0, lambda: 50.0)
    assert not first_time(tmp_path, "a", 100.0, lambda: 99.0)
    assert first_time(tmp_path, "b", 300.0, lambda: 101.0)
    assert json.loads((tmp_path / ANSWERED).read_text()) == {"b": 300.0}


def test_an_instruction_that_cannot_be_remembered_is_not_answered(tmp_path: Path) -> None:
    (tmp_path / ANSWERED).write_text("{")
    with pytest.raises(InstructionError, match="cannot be read or written"):
        first_time(tmp_path, "a", 100.0)
    (tmp_path / ANSWERED).write_text(json.dumps({str(n): 1e12 for n in range(MOST_ANSWERED)}))
    with pytest.raises(InstructionError, match="more than 100000 instructions"):
        first_time(tmp_path, "a", 100.0)


def test_the_defaults_of_the_bundle_are_the_run_config(sender: Sender) -> None:
    """They are the centre's words, and as much the policy's business as what the run overrides."""
    with zipfile.ZipFile(BytesIO(project_bundle())) as archive:
        project = archive.read("pyproject.toml").replace(b"epochs = 2", b"epochs = 60", 1)
    content = BytesIO()
    with zipfile.ZipFile(BytesIO(project_bundle())) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, project if name == "pyproject.toml" else old.read(name))
    plain = {key: value for key, value in sender.config.items() if key != "train.epochs"}
    order = RecordDict({"config": ConfigRecord({"run": "x", "groups": "cls"})})
    task = replace(sender, config=plain).task(sender.message("query.heads", order), bundle=content.getvalue())
    assert asked(task).has_error()
    assert entries(sender)[-1]["config"]["train.epochs"] == 60


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_the_centre_sends_no_text_of_it_leaves(data: st.DataObject, sender: Sender) -> None:
    """A reply or an exception, which ends this message's process alone; the node then answers with a fixed text."""
    task = sender.task(sender.message())
    part = data.draw(st.sampled_from(["run", "bundle", "tree", "objects"]))
    value = getattr(task, part)
    content = bytearray(value[-1] if part == "objects" else value)
    for _ in range(data.draw(st.integers(1, 5))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = (*value[:-1], bytes(content)) if part == "objects" else bytes(content)
    try:
        reply = asked(replace(task, **{part: changed}))
    except Exception:
        return
    assert reply.has_content() or reply.error.reason == TEXTS[reply.error.code]


def test_the_log_of_all_this_is_whole(sender: Sender) -> None:
    for _ in range(2):
        asked(sender.task(sender.message(), sign=False))
        asked(sender.task(sender.message()))
    assert verify(read_site(sender.site_yaml).state).faults == ()
