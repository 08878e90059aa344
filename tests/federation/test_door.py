"""What of the centre can be reached from outside, and by whom."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from client.boundary.audit import read_entries
from client.node.enrol import Centre as Known
from client.node.enrol import centre_context, read_known_centre, read_node_key
from server.centre.authority import Pair, issue_server, make_authority
from server.centre.config import CONNECTION
from server.centre.flower_commands import flwr
from server.centre.proxy import FLEET_CALLS
from server.centre.registry import read_nodes
from server.storage.run_folder import read_status
from shared.site import read_site
from shared.wire.enrolment import ABSENT, UNKNOWN, make_certificate, make_node_key
from simulations.rehearsal.federation import Federation, FederationError, federate
from tests.support.centres import wait_for

ROOT = Path(__file__).resolve().parents[2]
INSIDE = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/pull-task-input",
    "/v1/runtime/push-task-output",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/health",
    "/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "//v1/control/list-runs",
    "/v1/fleet/pull-messages%0d%0a/v1/control/list-runs",
]


@pytest.fixture(scope="module")
def federation(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A running centre with one registered hospital."""
    folder = tmp_path_factory.mktemp("door") / "federation"
    with federate(folder, {"hospital-01": data["hospital-01"]}) as made:
        made.start("centre")
        made.wait_serving()
        yield made


@pytest.fixture
def stranger(federation: Federation) -> Iterator[httpx.Client]:
    """A client that trusts the centre's authority, reaches its public port and presents no certificate."""
    trust = ssl.create_default_context(cafile=str(federation.centre.authority.certificate))
    with reaching(federation, trust) as client:
        yield client


@pytest.fixture
def outside(federation: Federation) -> Iterator[httpx.Client]:
    """A client that presents the registered hospital's certificate."""
    with reaching(federation, centre_context(known(federation))) as client:
        yield client


def known(federation: Federation) -> Known:
    """What the hospital knows of the centre."""
    return read_known_centre(read_site(federation.sites["hospital-01"]))


def reaching(federation: Federation, trust: ssl.SSLContext) -> httpx.Client:
    address = f"https://localhost:{federation.centre.port}"
    return httpx.Client(base_url=address, verify=trust, timeout=20, trust_env=False)


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_a_hospitals_call_is_not_there(
    method: str, path: str, outside: httpx.Client, stranger: httpx.Client
) -> None:
    url = httpx.URL(f"https://localhost:{outside.base_url.port}").copy_with(raw_path=path.encode())
    for client, statuses in ((outside, (400, 404)), (stranger, (400, 403))):
        answer = client.send(httpx.Request(method, url))
        assert answer.status_code in statuses
        assert "server" not in answer.headers or "uvicorn" not in answer.headers["server"]


@pytest.mark.parametrize("call", FLEET_CALLS)
def test_a_hospitals_call_without_its_certificate_is_refused_with_the_cause(
    call: str, federation: Federation, stranger: httpx.Client
) -> None:
    """Even with the key's signature: the door looks at the certificate before it reads a call."""
    headers = signed(read_node_key(known(federation)))
    answer = stranger.post(f"/v1/fleet/{call}", content=b"", headers=headers)
    assert (answer.status_code, answer.text) == (403, ABSENT + "\n")


def test_a_certificate_that_nobody_registered_is_refused_with_the_cause(federation: Federation, tmp_path: Path) -> None:
    """One of the right name and another key, and one that the centre's own server certificate's key made."""
    key = make_node_key()
    for pem, private in (
        (make_certificate("hospital-01", key), key),
        (federation.centre.public.certificate.read_text(), federation.centre.public.load()[0]),
    ):
        (tmp_path / "their.crt").write_text(pem)
        (tmp_path / "their.key").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        trust = ssl.create_default_context(cafile=str(federation.centre.authority.certificate))
        trust.load_cert_chain(tmp_path / "their.crt", tmp_path / "their.key")
        with reaching(federation, trust) as client:
            answer = client.post("/v1/fleet/pull-messages", content=b"")
            assert (answer.status_code, answer.text) == (403, UNKNOWN + "\n")


def test_no_hospitals_name_is_told_to_strangers(federation: Federation) -> None:
    """A server names the authorities whose certificates it takes, in the handshake; the hospitals' are not among them."""
    said = subprocess.run(
        ["openssl", "s_client", "-connect", f"localhost:{federation.centre.port}"],
        input=b"",
        capture_output=True,
        check=False,
    ).stdout
    assert b"hemafed authority of localhost" in said
    assert b"hospital-01" not in said


def test_inside_the_door_only_what_the_centre_needs_is_answered(federation: Federation) -> None:
    """/health tells that the SuperLink itself is there; Flower's other pages are nobody's."""
    trust = ssl.create_default_context(cafile=str(federation.centre.authority.certificate))
    for path, status in (("/health", 200), ("/docs", 404)):
        answer = httpx.get(f"https://127.0.0.1:{federation.centre.loopback_port}{path}", verify=trust, trust_env=False)
        assert answer.status_code == status, path


def test_flower_listens_on_loopback_alone(federation: Federation) -> None:
    listening = [
        (connection.laddr.ip, connection.laddr.port)
        for process in federation.started_by("centre")
        if process.name() != "nginx"
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert ("127.0.0.1", federation.centre.loopback_port) in listening
    assert {address for address, _ in listening} == {"127.0.0.1"}


def test_plain_text_is_refused_where_tls_is_due(federation: Federation) -> None:
    answer = httpx.post(
        f"http://localhost:{federation.centre.port}/v1/fleet/{FLEET_CALLS[0]}", content=b"", trust_env=False
    )
    assert answer.status_code == 400
    assert "plain HTTP request was sent to HTTPS port" in answer.text


def test_old_tls_is_refused(federation: Federation) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", federation.centre.port)) as line,
        pytest.raises((ssl.SSLError, OSError)),
    ):
        old.wrap_socket(line)


def test_a_run_with_other_code_is_refused_by_name_and_none_of_it_runs(federation: Federation, tmp_path: Path) -> None:
    """Who reaches Flower's Control, as the centre's operator does, can start any app; a hospital does not run it."""
    copy, ran = tmp_path / "hemafed", tmp_path / "ran"
    for folder in ("server", "client", "shared"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "importers"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    theirs = copy / "client/training/round.py"
    theirs.write_text(theirs.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    # Flower's installer made a folder name of this, outside of its apps folder, and ran the code that it found there.
    project = (copy / "pyproject.toml").read_text()
    (copy / "pyproject.toml").write_text(re.sub('version = "', 'version = "0/../../../../../loot/', project, count=1))
    runs = federation.centre.runs  # there the run finds the centre's key for instructions
    keys = {"run": {"folder": str(runs), "id": "other"}, "federation": {"wait_s": 5.0, "quorum": 1}}
    (tmp_path / "keys.toml").write_text(tomli_w.dumps(keys))
    federation.start("hospital-01")
    federation.wait_online(["hospital-01"])
    flwr(federation.centre, "run", str(copy), CONNECTION, "--run-config", str(tmp_path / "keys.toml"))
    run = runs / "other"
    federation.wait_for(lambda: read_status(run).state == "failed", 240, "the end of the other run")
    assert "the run brings other client code than the site installed" in read_status(run).error
    federation.stop("hospital-01")
    assert not ran.exists()
    assert not any("loot" in str(path) or path.suffix == ".fab" for path in federation.state("hospital-01").rglob("*"))
    assert not (federation.state("hospital-01") / "centre" / "flower" / "apps").exists()
    entries = [entry for _, _, entry in read_entries(federation.state("hospital-01"))]
    assert [entry["event"] for entry in entries] == ["refused"] * len(entries)
    assert "policy.app" in entries[-1]["reason"]


def signed(key: ec.EllipticCurvePrivateKey, age_s: float = 0.0) -> dict[str, str]:
    """The headers by which a node shows who it is."""
    moment = (now() - timedelta(seconds=age_s)).isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        TIMESTAMP_HEADER: moment,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, moment.encode())).decode(),
        "content-type": PROTOBUF_MEDIA_TYPE,
    }


def heartbeat(outside: httpx.Client, node: int, headers: dict[str, str]) -> int:
    body = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0)
    return outside.post("/v1/fleet/send-node-heartbeat", content=body.SerializeToString(), headers=headers).status_code


def test_a_call_needs_a_registered_key_a_fresh_signature_and_its_own_node(
    federation: Federation, outside: httpx.Client
) -> None:
    key = read_node_key(known(federation))
    node = int(read_nodes(federation.centre)["hospital-01"])
    assert heartbeat(outside, node, signed(key)) == 200
    assert heartbeat(outside, node, signed(make_node_key())) == 401, "an unknown node"
    assert heartbeat(outside, node, signed(key, age_s=600)) == 401, "a request recorded ten minutes ago"
    assert heartbeat(outside, node, signed(key, age_s=-600)) == 401, "a request of the future"
    assert heartbeat(outside, node + 1, signed(key)) == 401, "for another node"
    forged = signed(key) | {FLEET_HTTP_SIGNATURE_HEADER: signed(make_node_key())[FLEET_HTTP_SIGNATURE_HEADER]}
    assert heartbeat(outside, node, forged) == 401, "another's signature"
    assert heartbeat(outside, node, {"content-type": PROTOBUF_MEDIA_TYPE}) == 401, "none at all"
    log = federation.centre.state / "access.log"
    wait_for(lambda: log.read_text().count('" 401 ') >= 6)  # nginx writes a line after its answer has left


def test_a_server_of_another_authority_is_not_the_centre(federation: Federation, tmp_path: Path) -> None:
    authority, server = (Pair(tmp_path / f"{n}.key", tmp_path / f"{n}.crt") for n in ("authority", "server"))
    make_authority(authority, "somebody")
    issue_server(authority, server, ["localhost"])
    trust = ssl.create_default_context(cafile=str(server.certificate))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://localhost:{federation.centre.port}/", verify=trust, trust_env=False)


def test_a_second_daemon_a_run_too_many_and_a_centre_that_is_not_there_are_refused(federation: Federation) -> None:
    folder = str(federation.centre.folder)
    with pytest.raises(FederationError, match="is running already"):
        federation.command("hemafed-server", "start", folder)
    federation.begin_run("one", {"federation.wait_s": 300.0, "model.variant": "demo"})
    with pytest.raises(FederationError, match="carries out one run at a time"):
        federation.begin_run("two", {"model.variant": "demo"})
    federation.command("hemafed-server", "stop", folder)
    assert federation.wait_end("one", 60) == "stopped"
    with pytest.raises(FederationError, match=r"has no centre\.toml"):
        federation.command("hemafed-server", "status", str(federation.folder / "nowhere"))


def test_an_expired_certificate_is_refused_and_a_renewed_one_taken(federation: Federation) -> None:
    """Last: the centre is restarted."""
    centre = federation.centre
    issue_server(centre.authority, centre.public, ["localhost"], days=-1)
    federation.stop("centre")
    federation.start("centre")
    federation.wait_serving()
    log = federation.log("centre")
    federation.wait_for(lambda: "public.crt expired 1 days ago" in log.read_text(), 30, "the warning")
    with pytest.raises(FederationError, match="has expired; the centre must run 'hemafed-server renew'"):
        federation.command("hemafed-client", "join", "--check", str(federation.sites["hospital-01"]))
    federation.command("hemafed-server", "renew", str(centre.folder))
    federation.stop("centre")
    federation.start("centre")
    federation.wait_serving()
    assert "ok   connection" in federation.command(
        "hemafed-client", "join", "--check", str(federation.sites["hospital-01"])
    )
