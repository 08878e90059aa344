from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from threading import Event

import pytest
from flwr.app import Message, RecordDict

from server.federation import exchange, roster
from server.federation.exchange import send_and_receive
from server.federation.roster import QuorumError, RunContext, wait_for_quorum
from server.federation.strategy import repeat_round
from shared.config import FederationSettings
from shared.refusals import TEXTS, Refusal
from tests.conftest import SmallHospitals, small_config
from tests.support.loopback import LoopbackGrid
from tests.support.rounds import NAMES, beginning


def test_replies_come_one_at_a_time_in_order_of_names(two: SmallHospitals) -> None:
    grid = LoopbackGrid([two.files[n] for n in reversed(NAMES)], small_config(), late={1: 3})
    messages = {str(n): Message(RecordDict(), dst_node_id=n, message_type="query.hello") for n in (1, 2)}
    replies = send_and_receive(grid, messages, 30.0)
    name, _ = next(replies)
    assert name == "1"
    assert len(grid.replies) == 1, "the second reply waits in the SuperLink"
    assert [name for name, _ in replies] == ["2"]


def test_a_hospital_that_was_slow_to_say_who_it_is_takes_part_once_it_has(
    two: SmallHospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "HELLO_TIMEOUT_S", 0.1)
    monkeypatch.setattr(exchange, "LAST_LOOK_S", 0.1)
    flat = small_config(federation__wait_s=60.0)
    grid = LoopbackGrid([two.files[n] for n in NAMES], flat, late={2: 6})
    session, _, _ = beginning(grid, flat, two)
    assert [member.site for member in wait_for_quorum(session)] == NAMES
    assert [message.metadata.dst_node_id for message in grid.asked] == [1, 2], "asked once"
    assert not session.roster.silent


def test_who_lacks_something_takes_part_but_makes_no_quorum(two: SmallHospitals) -> None:
    flat = small_config(federation__quorum=1, federation__wait_s=0.0)
    grid = LoopbackGrid([two.files[n] for n in NAMES], flat)
    session, _, _ = beginning(grid, flat, two)
    one = wait_for_quorum(session, lambda member: "no heads" if member.site == "hospital-02" else "")
    assert [member.site for member in one] == NAMES
    with pytest.raises(
        QuorumError, match=r"hospital-02 \(not counted\)[\s\S]*hospital-01: no heads\n  hospital-02: no heads"
    ):
        wait_for_quorum(session, lambda member: "no heads")


def test_a_late_hospital_is_not_asked_again_before_it_answered(two: SmallHospitals) -> None:
    flat = small_config(federation__rounds=3, federation__quorum=1, federation__round_deadline_s=1.0)
    grid = LoopbackGrid([two.files[name] for name in NAMES], flat)
    session, strategy, arrays = beginning(grid, flat, two)
    wait_for_quorum(session)
    grid.late = {2: 12}  # polls: past the deadline, and two more rounds' looks
    first = repeat_round(session, strategy, arrays, 1)
    assert "no reply within 1 s" in first.refused["hospital-02"]
    assert list(session.roster.late) == ["hospital-02"]
    asked = len(grid.asked)
    second = repeat_round(session, strategy, first.arrays, 2)
    assert [list(second.sites), second.refused, len(grid.asked) - asked] == [["hospital-01"], {}, 1]
    for _ in range(12):
        session.roster.fetch_late()
    assert session.roster.late == {}
    grid.late = {}
    assert list(repeat_round(session, strategy, second.arrays, 3).sites) == NAMES


class HalfSent(LoopbackGrid):
    """Waits for the rest of one node's training reply, as Flower does, until it is released."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.released, self.held = Event(), set()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        chosen = zip(ids, messages, strict=True)
        self.held |= {i for i, m in chosen if m.metadata.message_type == "train" and m.metadata.dst_node_id == 2}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        if self.held & set(ids):
            self.released.wait()
        return super().pull_messages(ids)


def test_a_reply_that_was_sent_in_part_does_not_hold_the_round_beyond_its_deadline(
    two: SmallHospitals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LAST_LOOK_S", 1.0)
    flat = small_config(federation__rounds=3, federation__quorum=1, federation__round_deadline_s=3.0)
    grid = HalfSent([two.files[name] for name in NAMES], flat)
    session, strategy, arrays = beginning(grid, flat, two)
    first = repeat_round(session, strategy, arrays, 1)
    assert list(first.sites) == ["hospital-01"]
    assert "no reply within 3 s" in first.refused["hospital-02"]
    assert list(repeat_round(session, strategy, first.arrays, 2).refused) == [], "it is not asked meanwhile"
    grid.released.set()
    assert list(repeat_round(session, strategy, first.arrays, 3).sites) == NAMES


def test_too_few_hospitals_at_the_start_is_an_error(two: SmallHospitals) -> None:
    settings = FederationSettings(quorum=2, wait_s=0.0)
    grid = LoopbackGrid([two.files["hospital-01"], two.files["hospital-05"]], small_config())
    with pytest.raises(QuorumError, match=r"1 training hospitals are connected \(hospital-01\)"):
        wait_for_quorum(RunContext(grid, settings, two.root, 1e6))


def test_a_second_node_of_the_same_name_is_left_out(two: SmallHospitals) -> None:
    grid = LoopbackGrid([two.files["hospital-01"], two.files["hospital-01"]], small_config())
    session = RunContext(grid, FederationSettings(quorum=1), two.root, 1e6)
    members = wait_for_quorum(session)
    assert [m.node_id for m in members] == [1]
    assert "one node per site" in session.roster.refused[2]


def test_a_node_is_the_site_that_its_key_was_registered_for(two: SmallHospitals) -> None:
    """Not the one that it says: another hospital would be pushed out, and this one counted as it."""
    grid = LoopbackGrid([two.files[n] for n in NAMES], small_config())
    registered = {1: "hospital-09", 2: "hospital-02"}
    session = RunContext(grid, FederationSettings(quorum=1), two.root, 1e6, registered=lambda: registered)
    assert [m.site for m in wait_for_quorum(session)] == ["hospital-02"]
    assert session.roster.refused[1] == (
        "hospital-09: says that it is site 'hospital-01', and is registered as 'hospital-09'; 'site' in its site.yaml must be the "
        "name that was invited"
    )
    del registered[2]
    session.roster.members.clear()
    with pytest.raises(QuorumError, match=r"node 2: says that it is site 'hospital-02', and is registered as 'none'"):
        wait_for_quorum(replace(session, settings=FederationSettings(quorum=1, wait_s=0.0)))


def test_a_hospital_that_cannot_open_its_data_is_left_out_with_the_reason(two: SmallHospitals) -> None:
    (two.site("hospital-02").cache / "cache.json").unlink()
    grid = LoopbackGrid([two.files[n] for n in NAMES], small_config())
    session = RunContext(grid, FederationSettings(quorum=1), two.root, 1e6)
    assert [m.site for m in wait_for_quorum(session)] == ["hospital-01"]
    assert TEXTS[Refusal.SITE] in session.roster.refused[2]


class Garbled(LoopbackGrid):
    """Raises what Flower does when it puts one node's training reply together from bytes that are none."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in super().pull_messages(message_ids):
            if reply.metadata.message_type == "train" and reply.metadata.src_node_id == 2:
                raise self.error
            yield reply


@pytest.mark.parametrize("error", [ValueError("x" * 10**6), KeyError("arraychunk_ids"), RecursionError(), IndexError()])
def test_bytes_that_are_no_reply_are_refused_and_the_round_goes_on(two: SmallHospitals, error: Exception) -> None:
    """Before: they ended the run for all."""
    flat = small_config(federation__quorum=1, federation__round_deadline_s=20.0)
    grid = Garbled([two.files[name] for name in NAMES], flat)
    grid.error = error
    session, strategy, arrays = beginning(grid, flat, two)
    result = repeat_round(session, strategy, arrays, 1)
    assert result.refused == {"hospital-02": f"a reply that cannot be read ({type(error).__name__})"}
    assert list(result.sites) == ["hospital-01"]


@pytest.mark.parametrize("error", [OSError("line"), RuntimeError("run stopped")])
def test_an_error_of_the_line_to_the_superlink_is_nobodys_reply(two: SmallHospitals, error: Exception) -> None:
    flat = small_config(federation__quorum=1)
    grid = Garbled([two.files[name] for name in NAMES], flat)
    grid.error = error
    session, strategy, arrays = beginning(grid, flat, two)
    with pytest.raises(type(error)):
        repeat_round(session, strategy, arrays, 1)
