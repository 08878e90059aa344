"""Whatever answers in the centre's place, a call ends in one of four errors, and the daemon does not end."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import client.node.calls
import client.node.daemon
from client.node.calls import CentreFaultError, ConnectionLostError, NodeError
from client.node.connection import Connection, check_metadata
from client.node.daemon import Daemon
from client.node.enrol import Centre, read_known_centre
from client.node.frames import MOST_FRAMES
from server.centre.config import read_centre
from shared.site import read_site
from tests.client.node.test_daemon import unanswered
from tests.support.centres import enrol, make_centre, serving


@dataclass
class Place:
    """What stands where the centre should.

    Attributes:
      site_yaml: of the hospital that calls it.
      centre: as the hospital knows it.
      answers: what is said to a path's last part; "" for all others.
    """

    site_yaml: Path
    centre: Centre
    answers: dict[str, bytes | Callable[[socket.socket], None]]


def request_path(line: socket.socket) -> str:
    """The last part of the path of a request that is read whole; what is left unread would reset the line."""
    head, _, body = line.recv(65536).partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
    while len(body) < length:
        body += line.recv(65536)
    return head.split(b" ", 2)[1].decode().rpartition("/")[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("node")
    centre = make_centre(root / "centre")
    site_yaml = enrol(centre, root / "hospital")
    pair = read_centre(root / "centre").public
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    answers: dict[str, bytes | Callable] = {}

    def answer(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True) as secure:
            path = request_path(secure)
            said = answers.get(path, answers.get("", b""))
            said(secure) if callable(said) else secure.sendall(said)

    with serving(answer) as port:
        known = read_known_centre(read_site(site_yaml))
        (known.folder / "centre.json").write_text(json.dumps({"address": f"localhost:{port}", "site": known.site}))
        yield Place(site_yaml, read_known_centre(read_site(site_yaml)), answers)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    monkeypatch.setattr(client.node.calls, "CALL_TIMEOUT_S", 0.0)
    place.answers.clear()


def http(status: int = 200, body: bytes = b"", *headers: bytes) -> bytes:
    head = [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def call_all(centre: Centre) -> None:
    """Every call of a node; raises what is none of ours."""
    connection = Connection(centre)
    try:
        assert connection._beat() in (True, False)
        for call in (connection.pull, lambda: connection.push(17, [b"", b""]), connection.__enter__):
            with suppress(NodeError):
                call()
        if connection._heartbeat.is_running:
            connection._heartbeat.stop()
        assert connection.is_running(17) in (True, False)
    finally:
        connection._close()


BODIES = [
    b'{"code":' + b"1" * 5000 + b"}",
    b"[" * 5000,
    b'{"code":2004,"detail":"x"}',
    b"\xff\xfe",
    b"",
    b"\x0a\x01",
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("status", [200, 302, 403, 500, 503, 999])
def test_a_body_that_is_none_ends_in_an_error_of_ours(place: Place, status: int, body: bytes) -> None:
    place.answers[""] = http(status, body, b"Content-Type: text/plain; charset=zip")
    call_all(place.centre)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(100, 999),
    st.one_of(st.binary(max_size=60), st.sampled_from(BODIES)),
    st.lists(st.binary(max_size=30), max_size=3),
    st.binary(max_size=20),
)
def test_whatever_is_answered_ends_in_an_error_of_ours(
    place: Place, status: int, body: bytes, headers: list[bytes], before: bytes
) -> None:
    place.answers[""] = http(status, body, *headers)
    place.answers["pull-messages"] = before + http(status, body, *headers)
    call_all(place.centre)


@pytest.mark.parametrize("part", [b"X: ", b"Content-Length: 100000\r\n\r\n"], ids=["head", "body"])
def test_an_answer_byte_by_byte_ends_with_its_call(place: Place, part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte alone comes in time, and the call would last as long as its answer."""
    monkeypatch.setattr(client.node.calls, "WHOLE_CALL_S", 1.0)

    def drip(line: socket.socket) -> None:
        line.sendall(b"HTTP/1.1 200 OK\r\n" + part)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            line.sendall(b"a")
            time.sleep(0.05)

    place.answers[""] = drip
    connection, start = Connection(place.centre), time.monotonic()
    with pytest.raises(ConnectionLostError):
        connection.pull()
    assert time.monotonic() - start < 10
    connection._close()


def pulled(message: MessageProto, tree: ObjectTree) -> bytes:
    return http(200, PullMessagesResponse(messages_list=[message], message_object_trees=[tree]).SerializeToString())


def test_a_list_of_more_than_a_message_has_is_refused(place: Place) -> None:
    many = [ObjectTree(object_id="a")] * (2 * MOST_FRAMES)
    place.answers.update({"pull-messages": pulled(unanswered(), ObjectTree(children=many)), "": http()})
    connection = Connection(place.centre)
    with pytest.raises(CentreFaultError, match="objects or more"):
        connection.pull()
    place.answers["pull-messages"] = http(200, bytes(client.node.calls.MOST_TOLD + 1))
    with pytest.raises(CentreFaultError, match="answers with more than"):
        connection.pull()
    connection._close()


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata(run_id=17, message_type="no kind \x1b"),
        Metadata(run_id=17, message_type="train", message_id="a" * 1000),
        Metadata(run_id=17, message_type="train", group_id="a" * 1000),
    ],
)
def test_a_message_that_cannot_be_answered_is_refused_and_not_noted(place: Place, metadata: Metadata) -> None:
    place.answers["pull-messages"] = pulled(MessageProto(metadata=metadata), ObjectTree())
    noted: list = []
    connection = Connection(place.centre, noted.append)
    with pytest.raises(CentreFaultError):
        connection.pull()
    assert noted == []
    connection._close()


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Metadata, run_id=st.integers(0, 9), message_type=st.text(max_size=9), ttl=st.floats(), created_at=st.floats()
    )
)
def test_metadata_are_taken_or_refused(metadata: Metadata) -> None:
    try:
        check_metadata(MessageProto(metadata=metadata), 5)
    except CentreFaultError:
        return


class Idle:
    """In place of the process that answers."""

    def warm_up(self) -> None:
        """It is there."""

    def close(self) -> None:
        """It ends."""


def test_the_daemon_goes_on_whatever_the_centre_says(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.node.daemon, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(client.node.daemon, "BUSY_POLL_S", 0.01)
    monkeypatch.setattr(client.node.daemon, "IDLE_POLL_S", 0.01)
    bad = MessageProto(metadata=Metadata(run_id=17, message_type="\x1b[2J"))
    place.answers.update(
        {
            "activate-node": http(200, ActivateNodeResponse(node_id=5).SerializeToString()),
            "pull-messages": pulled(bad, ObjectTree()),
            "": http(500, BODIES[0]),
        }
    )
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if sum("not connected" in one for one in said) == 3:
            daemon.stop()
        if sum("not connected" in one for one in said) == 2:
            monkeypatch.setattr(Connection, "pull", lambda self: 1 / 0)

    daemon = Daemon(read_site(place.site_yaml), place.site_yaml, say)
    daemon._answering = Idle()
    daemon.run()
    reasons = [line for line in said if "not connected" in line]
    assert "a message that cannot be answered" in reasons[0]
    assert "ZeroDivisionError" in reasons[2]
    assert all(line.isprintable() for line in said)
