"""What strangers, one registered hospital and other users of the centre's machine can do to the centre: nothing that lasts.

Each attack got through once; its figure of then stands with it. All run against a real centre (nginx, TLS, SuperLink, its
executor) while a run's messages to an honest hospital go on beside them.
"""

from __future__ import annotations

import os
import resource
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import FLWR_TASK_TOKEN_LENGTH, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.superexec.executor import subprocess_executor

from client.node.enrol import centre_context, read_known_centre
from server.centre.config import CONNECTION
from server.centre.flower_commands import flwr
from server.centre.proxy import CALLS_PER_S
from server.centre.registry import revoke
from server.superlink.filter import DESTINATION, OBJECT, PULL, SOURCE, TOO_LARGE, TWICE, UNASKED
from server.superlink.local_calls import LOGIN_CALLS
from shared.host.processes import owned
from shared.site import read_site
from tests.support.centres import wait_for
from tests.support.fleet_node import FleetNode, reply_of, small, status_of
from tests.support.siege import REPLY_MB, Besieged, held, siege

PIECE = 5_000_000


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    with siege(tmp_path_factory.mktemp("siege")) as made:
        yield made


def unfinished(besieged: Besieged, trust: ssl.SSLContext, length: int, sent: int) -> socket.socket:
    """A connection on which a body of a call was sent in part, or as much of it as the door takes."""
    line = trust.wrap_socket(socket.create_connection(("127.0.0.1", besieged.centre.port)), server_hostname="localhost")
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
    line.settimeout(5)
    with suppress(OSError):
        line.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        line.sendall(bytes(sent))
    return line


@pytest.mark.parametrize("who", ["stranger", "mallory"])
@pytest.mark.parametrize("length", [64_000_000, 8_000_000])
def test_unfinished_bodies_cost_no_memory(besieged: Besieged, who: str, length: int) -> None:
    """Before: 20 of 64 MB without a key brought the SuperLink to 1.35 GB."""
    trust = ssl.create_default_context(cafile=str(besieged.centre.authority.certificate))
    if who == "mallory":
        trust = centre_context(read_known_centre(read_site(besieged.sites[who])))
    with held(besieged), ExitStack() as lines:
        for _ in range(20):
            lines.enter_context(unfinished(besieged, trust, length, length - 1))


def test_connections_of_one_byte_lock_nobody_out(besieged: Besieged) -> None:
    """Before: 2,079 of them, and no hospital came in for as long as they were held."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    try:
        with held(besieged), ExitStack() as lines:
            for _ in range(2079):
                line = lines.enter_context(socket.create_connection(("127.0.0.1", besieged.centre.port)))
                line.send(b"\x16")
            node = FleetNode(besieged.sites["victim"])  # on a connection of its own
            node.number = besieged.nodes["victim"].number
            node.beat()
            during = len(besieged.honest.done())
            wait_for(lambda: len(besieged.honest.done()) > during + 1, 120)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_four_hundred_megabytes_that_nobody_asked_for_are_not_read(besieged: Besieged) -> None:
    """Before: one registered hospital brought the SuperLink above a gigabyte with them."""
    mallory = besieged.nodes["mallory"]
    with held(besieged):
        for number in range(80):
            status = status_of(partial(mallory.put, besieged.honest.run, "", f"{number:064x}", bytes(PIECE)))
            assert status in (403, 0)  # 0: the answer came while the body was still being sent
    assert f"refused: mallory {OBJECT} (64 times)" in besieged.log()
    assert besieged.log().count(OBJECT) < 10, "a line for each would fill the disk"


def test_a_reply_has_a_largest_size_and_its_own_objects_alone(besieged: Besieged) -> None:
    mallory, asked = besieged.nodes["mallory"], besieged.ask("mallory")
    instruction = instruction_for(mallory)
    values = [np.random.default_rng(n).random(PIECE // 4, dtype=np.float32) for n in range(8)]
    content = RecordDict({"update": ArrayRecord({f"a{n}": Array(value) for n, value in enumerate(values)})})
    reply = reply_of(mallory.number, instruction, content)
    with held(besieged):
        assert status_of(lambda: mallory.push(reply)) == 200
        objects, stored = sent_objects(mallory, reply, asked.run)
        assert 0 < stored <= REPLY_MB * 1e6
        assert stored < sum(map(len, objects.values())), "else the limit was not reached"
        assert f"refused: mallory {TOO_LARGE}" in besieged.log()
        other = reply_of(mallory.number, instruction, small())
        assert status_of(lambda: mallory.push(other)) == 403
        assert f"refused: mallory {TWICE}" in besieged.log()
    flwr(besieged.centre, "stop", str(asked.run), CONNECTION)


def instruction_for(node: FleetNode) -> Message:
    """The next instruction to a node, without its content."""
    got = []

    def pulled() -> bool:
        node.beat()
        got.extend(node.pull().messages_list)
        return bool(got)

    wait_for(pulled, 120)
    return message_from_proto(got[0])


def sent_objects(node: FleetNode, reply: Message, run: int) -> tuple[dict[str, bytes], int]:
    """Send a reply's objects until one is refused: all of them, and how many bytes were stored."""
    taken = node.push(reply)
    objects = {number: one.deflate() for number, one in get_all_nested_objects(reply).items()}
    stored = 0
    for number in taken.objects_to_push:
        if status_of(lambda number=number: node.put(run, taken.session_id, number, objects[number])) != 200:
            break
        stored += len(objects[number])
    return objects, stored


def test_a_hospital_neither_instructs_another_nor_answers_for_it(besieged: Besieged) -> None:
    """Before: the victim took mallory's instruction for the centre's, and answered it."""
    mallory, victim = besieged.nodes["mallory"], besieged.nodes["victim"]
    asked = besieged.ask("victim")
    theirs = instruction_for(victim)
    order = {"dst_node_id": victim.number, "reply_to_message_id": "", "message_type": "evaluate"}
    for message, reason in (
        (reply_of(SUPERLINK_NODE_ID, theirs, small(), **order), SOURCE),
        (reply_of(mallory.number, theirs, small(), **order), DESTINATION),
        (reply_of(mallory.number, theirs, small(), dst_node_id=victim.number), DESTINATION),
        (reply_of(mallory.number, theirs, small(), reply_to_message_id=""), DESTINATION),
        (reply_of(victim.number, theirs, small()), SOURCE),
        (reply_of(mallory.number, theirs, small()), UNASKED),
    ):
        assert status_of(lambda message=message: mallory.push(message)) == 403
        assert f"refused: mallory {reason}" in besieged.log()
    assert status_of(lambda: mallory.get(asked.run, theirs.metadata.message_id)) == 403
    assert status_of(lambda: mallory.confirm(asked.run, theirs.metadata.message_id)) == 403
    assert f"refused: mallory {PULL}" in besieged.log()
    assert not victim.pull().messages_list
    victim.answer(theirs, small())
    wait_for(lambda: asked.done(), 120)
    assert asked.done()[0] == {"from": str(victim.number), "error": False}
    flwr(besieged.centre, "stop", str(asked.run), CONNECTION)


def test_a_hospitals_calls_are_slowed_down_and_not_lost(besieged: Besieged) -> None:
    mallory = besieged.nodes["mallory"]
    with held(besieged):
        assert {status_of(mallory.beat) for _ in range(CALLS_PER_S + 20)} == {200}


def test_no_command_line_or_environment_holds_a_runs_token(besieged: Besieged) -> None:
    """Before: `ps` showed it to every user, who could then act as the run."""
    (app,) = [one for one in owned(besieged.centre.folder) if any("flwr-serverapp" in a for a in one.cmdline())][:1]
    place = Path(app.cmdline()[app.cmdline().index("--token-file") + 1].replace("self", str(app.pid)))
    token = place.read_text()
    assert len(token) == 2 * FLWR_TASK_TOKEN_LENGTH, "as its owner alone can"
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert not any(token in argument for argument in process.cmdline())
            assert token not in process.environ().values()
    assert "--token" in Path(subprocess_executor.__file__).read_text(), "Flower's own program does so still"


@pytest.mark.parametrize("path", ["control/list-nodes", "control/start-run", "control/register-node"])
def test_another_user_of_the_machine_does_not_command_the_superlink(besieged: Besieged, path: str) -> None:
    """Before: whoever reached the port on loopback started any code as the centre."""
    assert called(besieged, path).status_code == 401
    assert called(besieged, path, "none").status_code == 401


@pytest.mark.parametrize("path", [*(f"control/{call}" for call in sorted(LOGIN_CALLS)), "other", "controls"])
def test_what_the_centre_does_not_use_is_not_there(besieged: Besieged, path: str) -> None:
    assert called(besieged, path).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "runtime/push-object",
        "runtime/acquire-task",
        "runtime/responses",
        "control/list-runs",
        "control/get-login-details",
        "no",
    ],
)
def test_another_user_of_the_machine_cannot_fill_the_superlinks_memory(besieged: Besieged, path: str) -> None:
    """Before: bodies of 400 MB without any token, unfinished, brought it to 1.3 GB."""
    trust = ssl.create_default_context(cafile=str(besieged.centre.authority.certificate))
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
    with held(besieged), ExitStack() as lines:
        for length in (f"Content-Length: {400 << 20}", "Transfer-Encoding: chunked"):
            address = ("127.0.0.1", besieged.centre.loopback_port)
            line = trust.wrap_socket(socket.create_connection(address), server_hostname="localhost")
            lines.enter_context(line).settimeout(5)
            with suppress(OSError):
                line.sendall(f"{head}{length}\r\n\r\n".encode())
                for _ in range(390):
                    line.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


@pytest.mark.parametrize(
    "call", ["acquire-task", "pull-task-input", "push-task-output", "push-messages", "pull-messages", "get-nodes"]
)
def test_another_user_of_the_machine_does_not_act_as_a_run(besieged: Besieged, call: str) -> None:
    assert called(besieged, f"runtime/{call}").status_code in (401, 403)


def called(besieged: Besieged, path: str, bearer: str = "") -> httpx.Response:
    """An answer to a call that comes from this machine."""
    trust = ssl.create_default_context(cafile=str(besieged.centre.authority.certificate))
    headers = {"content-type": PROTOBUF_MEDIA_TYPE} | ({"authorization": f"Bearer {bearer}"} if bearer else {})
    url = f"https://127.0.0.1:{besieged.centre.loopback_port}/v1/{path}"
    return httpx.post(url, headers=headers, verify=trust, trust_env=False)


def test_what_the_centre_keeps_for_itself_is_readable_by_its_owner_alone(besieged: Besieged) -> None:
    for path in (besieged.centre.flower / "credentials.yaml", besieged.centre.secret):
        assert path.stat().st_mode & 0o077 == 0
        assert path.stat().st_uid == os.geteuid()


def test_a_revoked_hospital_loses_its_open_connections_and_is_told(besieged: Besieged) -> None:
    leaver = besieged.nodes["leaver"]
    leaver.beat()
    context = centre_context(read_known_centre(read_site(besieged.sites["leaver"])))
    address = f"https://localhost:{besieged.centre.port}/"
    assert httpx.get(address, verify=context, trust_env=False).status_code == 404
    with held(besieged):
        revoke(besieged.centre, "leaver")
        wait_for(lambda: httpx.get(address, verify=context, trust_env=False).status_code == 403)
        assert "revoked" in httpx.get(address, verify=context, trust_env=False).text
        end = time.monotonic() + 60
        while status_of(leaver.beat) not in (0, 403):
            assert time.monotonic() < end
            time.sleep(0.2)
