"""What messages alone can make a hospital write is bounded, a message and a day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from client.boundary import daily
from client.boundary.audit import known_items, read_entries, verify
from client.boundary.code import code_hash
from client.boundary.daily import FILE, MOST_A_DAY, list_refusal
from client.node.answer import answer
from shared.refusals import Refusal
from tests.conftest import SmallHospitals, edit_site, small_config
from tests.support.asking import NAME, ask, refusal
from tests.support.orders import Sender, opened

MOST_BYTES = 2048
LONG = {f"k{number}": "x" * 1000 for number in range(199)}


def size(state: Path) -> int:
    return max(map(len, (state / "audit.jsonl").read_bytes().splitlines()))


def entries(state: Path) -> list[dict]:
    assert verify(state).faults == ()
    return [entry for _, _, entry in read_entries(state)]


def known_long() -> dict[str, str]:
    return dict.fromkeys(small_config(), "\x1b" * 999) | {"model.pretrained": "x" * 999, "run.id": "\u202e" * 999}


@pytest.mark.parametrize("config", [{}, LONG, known_long()], ids=["none", "unknown keys", "long values"])
@pytest.mark.parametrize("kind", ["query.hello", "query.heads", "train", "evaluate"])
def test_a_refused_messages_entry_is_short(
    copied_hospitals: SmallHospitals, kind: str, config: dict[str, object]
) -> None:
    """Before, a hello with 199 unknown keys of 1,000 characters left 200 KB, outside of the hours too."""
    file = copied_hospitals.files[NAME]
    edit_site(file, policy={"hours": "03:00-03:01"})
    for order in (LONG, {"run": "x" * 5000, "groups": "\x1b" * 990, "server-round": 1}):
        content = RecordDict({"config": ConfigRecord(order)})
        assert ask({"site": str(file)}, kind, content, small_config() | config).has_error()
    state = copied_hospitals.site(NAME).state
    assert (len(entries(state)), entries(state)[0]["event"]) == (2, "refused")
    assert size(state) < MOST_BYTES


@pytest.mark.parametrize("config", [LONG, known_long()], ids=["unknown keys", "long values"])
def test_an_answered_hellos_entry_is_short_and_says_what_left(
    copied_hospitals: SmallHospitals, config: dict[str, object]
) -> None:
    reply = ask({"site": str(copied_hospitals.files[NAME])}, "query.hello", flat=small_config() | config)
    assert not reply.has_error()
    state = copied_hospitals.site(NAME).state
    assert size(state) < MOST_BYTES
    assert entries(state)[-1]["metrics"] == dict(reply.content["metrics"])


def test_a_signed_hello_with_keys_leaves_a_short_entry(copied_hospitals: SmallHospitals, tmp_path: Path) -> None:
    sender = Sender(tmp_path, copied_hospitals.files[NAME], NAME, small_config())
    message = sender.message("query.hello", RecordDict({"config": ConfigRecord(LONG)}))
    assert refusal(opened(answer(sender.task(message), code_hash()))) == Refusal.ORDER
    unsigned = sender.message("query." + "x" * 900)
    assert refusal(opened(answer(sender.task(unsigned, sign=False), code_hash()))) == Refusal.NOT_FROM_CENTRE
    state = copied_hospitals.site(NAME).state
    assert [entry["code"] for entry in entries(state)] == [Refusal.ORDER, Refusal.NOT_FROM_CENTRE]
    assert size(state) < MOST_BYTES


def test_unknown_keys_are_a_number_and_a_hash_of_all_of_them() -> None:
    known = known_items({"run": "a", "b": 1, "c": 2}, ("run",))
    assert (known["run"], known["left_out_keys"]) == ("a", 2)
    assert known["left_out_sha256"] != known_items({"run": "a", "b": 1, "c": 3}, ("run",))["left_out_sha256"]
    assert known_items({"run": "a"}, ("run",)) == {"run": "a"}


def come(state: Path, kind: str, number: int, day: str | None = None) -> None:
    """Leave a hospital as if so many messages of a kind had come today, or on another day."""
    today = day or json.loads((state / FILE).read_text())["day"]
    (state / FILE).write_text(json.dumps({"day": today, "numbers": {kind: number}}))


def test_hellos_are_answered_so_often_a_day_and_the_rest_is_counted(copied_hospitals: SmallHospitals) -> None:
    node, state = {"site": str(copied_hospitals.files[NAME])}, copied_hospitals.site(NAME).state
    assert not ask(node, "query.hello").has_error()
    come(state, "query.hello", MOST_A_DAY - 1)
    assert not ask(node, "query.hello").has_error()
    for _ in range(5):
        assert refusal(ask(node, "query.hello")) == Refusal.POLICY
    assert [entry["event"] for entry in entries(state)] == ["released", "released", "refused"]
    assert "counted" in entries(state)[-1]["not_listed"]
    come(state, "query.hello", MOST_A_DAY + 5, day="2026-01-01")
    assert not ask(node, "query.hello").has_error()
    told, last = entries(state)[-2:]
    assert (told["event"], told["day"], told["refusals"]) == ("not listed", "2026-01-01", {"query.hello": 4})
    assert last["event"] == "released"


def test_other_refusals_are_listed_so_often_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daily, "MOST_A_DAY", 3)
    for number in range(8):
        list_refusal(tmp_path, {"asked": f"train.{number}", "code": 1})
    list_refusal(tmp_path, {"asked": "train", "code": 1})
    assert len(entries(tmp_path)) == 5
    assert json.loads((tmp_path / FILE).read_text())["numbers"] == {"refused other": 8, "refused train": 1}


@pytest.mark.parametrize("damage", ["", "null", "[]", '{"day": 1}', '{"day": "x", "numbers": {"a": "b"}}', "\x00"])
def test_a_damaged_number_begins_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage)
    list_refusal(tmp_path, {"asked": "train", "code": 1})
    assert len(entries(tmp_path)) == 1
