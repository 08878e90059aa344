from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from client.node.enrol import read_known_centre, read_node_key
from client.node.ready import Finding, check_ready
from server.centre.authority import Pair, issue_server, make_authority, read_certificate
from server.centre.config import Centre
from shared.site import Site, read_site
from shared.wire.enrolment import REVOKED, UNKNOWN, make_certificate, make_node_key
from tests.support.centres import closed_port, enrol, make_centre, over_tls, page, serving
from tests.support.small_sites import ingested, make_site, patients

SITE = "hospital-01"
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def with_data(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Twelve patients of two slices, ingested."""
    site_yaml = make_site(tmp_path_factory.mktemp("data"), patients(*range(1, 13)), site=SITE)
    ingested(site_yaml)
    return read_site(site_yaml)


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    return make_centre(tmp_path / "centre")


@pytest.fixture
def site(centre: Centre, tmp_path: Path, with_data: Site) -> Site:
    """A registered hospital with data."""
    return replace(read_site(enrol(centre, tmp_path / "hospital", SITE)), cache=with_data.cache)


def towards(site: Site, port: int, host: str = "localhost") -> Site:
    """The same site, whose centre is at another address."""
    (site.state / "centre" / "centre.json").write_text(json.dumps({"address": f"{host}:{port}", "site": site.name}))
    return site


def found(findings: list[Finding], what: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.what == what]
    return finding


def asked(site: Site, pair: Pair, content: bytes | None = None, now: datetime = NOON) -> list[Finding]:
    """What is found where a server with this certificate answers."""
    with serving(over_tls(pair, page(NOON) if content is None else content)) as port:
        return check_ready(towards(site, port), lambda: now)


def other_pair(folder: Path, signer: Pair, *hosts: str, days: int = 397) -> Pair:
    pair = Pair(folder / "other.key", folder / "other.crt")
    issue_server(signer, pair, hosts or ["localhost"], days)
    return pair


def test_a_hospital_that_is_ready(site: Site, centre: Centre, with_data: Site) -> None:
    findings = asked(site, centre.public)
    assert [finding.what for finding in findings] == ["data", "key", "authority", "connection", "clock"]
    assert all(finding.good for finding in findings)
    address = read_known_centre(site).address
    assert found(findings, "connection").text == f"{address} answers"
    assert found(findings, "clock").text == "0 s behind the centre's"
    assert found(findings, "key").text == read_known_centre(site).fingerprint()
    assert found(findings, "authority").text == "of the centre, good for 3649 days"


def test_the_centre_learns_nothing_but_that_somebody_asked(site: Site, centre: Centre) -> None:
    heard: list[bytes] = []
    with serving(over_tls(centre.public, page(NOON), heard)) as port:
        check_ready(towards(site, port))
    assert heard == [f"GET / HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()]


def test_a_centre_that_closes_after_its_answer_is_one_that_answers(site: Site, centre: Centre) -> None:
    findings = asked(site, centre.public, page(NOON, "Connection: close"))
    assert all(finding.good for finding in findings)
    assert len(findings) == 5


@pytest.mark.parametrize(
    ("ahead_s", "good", "told"),
    [
        (600, False, "600 s ahead of the centre's; set it"),
        (-180, False, "180 s behind the centre's; set it"),
        (121, False, "121 s ahead of the centre's; set it"),
        (120, True, "120 s ahead of the centre's"),
        (-120, True, "120 s behind the centre's"),
    ],
)
def test_a_clock_that_is_wrong_is_told_by_how_much(
    site: Site, centre: Centre, ahead_s: int, good: bool, told: str
) -> None:
    clock = found(asked(site, centre.public, now=NOON + timedelta(seconds=ahead_s)), "clock")
    assert clock.good == good
    assert clock.text.startswith(told)
    assert good == (clock.text == told)


def test_without_a_time_from_the_centre_nothing_is_said_of_the_clock(site: Site, centre: Centre) -> None:
    findings = asked(site, centre.public, page())
    assert [finding.what for finding in findings] == ["data", "key", "authority", "connection"]
    assert findings[-1].good


def refused(text: str, status: str = "403 Forbidden") -> bytes:
    """The answer of a door that does not let somebody in."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (refused(UNKNOWN), "does not know this site's key: the centre has not registered the request yet"),
        (refused(REVOKED), "has revoked this site's key; ask the centre, and answer a new invitation"),
        (refused("x" * 100_000), "a proxy may be in between"),
        (refused("", "502 Bad Gateway"), "answers with status 502, expected 404: another service or a proxy is there"),
        (refused("", "200 OK"), "answers with status 200, expected 404"),
    ],
)
def test_a_door_that_does_not_let_the_site_in_is_told(site: Site, centre: Centre, answer: bytes, told: str) -> None:
    findings = asked(site, centre.public, answer)
    assert [finding.what for finding in findings if not finding.good] == ["connection"]
    assert told in found(findings, "connection").text


def test_the_nodes_certificate_is_presented(site: Site, centre: Centre) -> None:
    known = read_known_centre(site)
    shown: list[bytes] = []
    with serving(over_tls(centre.public, page(NOON), clients=(known.certificate, shown))) as port:
        check_ready(towards(site, port))
    (certificate,) = shown
    assert x509.load_der_x509_certificate(certificate).public_key() == read_node_key(known).public_key()


@pytest.mark.parametrize("content", [None, "", "nothing", "another"])
def test_a_certificate_that_cannot_be_used_is_told(site: Site, centre: Centre, content: str | None) -> None:
    path = read_known_centre(site).certificate
    path.unlink()
    if content is not None:
        path.write_text(make_certificate(SITE, make_node_key()) if content == "another" else content)
    findings = asked(site, centre.public)
    assert [finding.what for finding in findings if not finding.good] == ["key"]
    assert "node.crt" in found(findings, "key").text
    assert found(findings, "key").text.endswith("answer a new invitation")


def test_the_way_is_the_nodes_way_with_its_proxy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that takes the node's calls takes those of the check, and is named with what it refuses."""
    heard: list[bytes] = []

    def proxy(line: object) -> None:
        heard.append(line.recv(65536))
        line.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    with serving(proxy) as port:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        text = found(check_ready(towards(site, 443, "centre.example.org")), "connection").text
        assert heard[0].startswith(b"CONNECT centre.example.org:443 HTTP/1.1")
        assert "centre.example.org:443 cannot be reached: the proxy refuses (407 Proxy Authentication Required)" in text
        assert "HTTPS_PROXY is set, and the node goes through 127.0.0.1" in text
        monkeypatch.setenv("NO_PROXY", "centre.example.org")
        monkeypatch.setenv("no_proxy", "centre.example.org")
        assert "PROXY" not in found(check_ready(towards(site, 443, "centre.example.org")), "connection").text
        assert len(heard) == 1


def test_a_server_of_another_authority_is_not_the_centre(site: Site, tmp_path: Path) -> None:
    theirs = Pair(tmp_path / "theirs.key", tmp_path / "theirs.crt")
    make_authority(theirs, "localhost")
    findings = asked(site, other_pair(tmp_path, theirs))
    assert [finding.what for finding in findings if not finding.good] == ["connection"]
    text = found(findings, "connection").text
    assert "is not signed by the centre's authority" in text
    assert text.endswith("ask the centre, and do not go on without an answer")


def test_an_expired_certificate_is_for_the_centre_to_renew(site: Site, centre: Centre, tmp_path: Path) -> None:
    findings = asked(site, other_pair(tmp_path, centre.authority, days=-1))
    connection = found(findings, "connection")
    assert not connection.good
    assert connection.text.endswith("has expired; the centre must run 'hemafed-server renew'")


def test_a_certificate_that_ends_soon_is_good_and_told(site: Site, centre: Centre, tmp_path: Path) -> None:
    connection = found(asked(site, other_pair(tmp_path, centre.authority, days=10)), "connection")
    assert connection.good
    assert connection.text.endswith("answers; its certificate expires in 10 days, tell the centre")


def test_a_certificate_of_another_name_is_told_from_one_of_another_authority(
    site: Site, centre: Centre, tmp_path: Path
) -> None:
    connection = found(asked(site, other_pair(tmp_path, centre.authority, "elsewhere.example.org")), "connection")
    assert not connection.good
    assert "is for another name" in connection.text
    assert connection.text.endswith("check the address with the centre")


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_service_that_speaks_no_tls_is_told(site: Site, said: bytes) -> None:
    def plain(line: object) -> None:
        line.sendall(said)
        line.recv(65536)

    with serving(plain) as port:
        findings = check_ready(towards(site, port))
    connection = found(findings, "connection")
    assert not connection.good
    assert f"localhost:{port} does not speak TLS" in connection.text
    assert connection.text.endswith("another service is there; check the port with the centre")


def test_a_service_that_hangs_up_is_told(site: Site) -> None:
    with serving(lambda line: None) as port:
        connection = found(check_ready(towards(site, port)), "connection")
    assert not connection.good
    assert f"localhost:{port}" in connection.text


def test_a_server_that_takes_the_request_and_hangs_up_is_told(site: Site, centre: Centre) -> None:
    connection = found(asked(site, centre.public, b""), "connection")
    assert not connection.good
    assert "cannot be reached (RemoteProtocolError" in connection.text


def test_a_centre_that_is_down_is_told(site: Site) -> None:
    port = closed_port()
    findings = check_ready(towards(site, port))
    assert found(findings, "connection").text == (
        f"localhost:{port} refuses connections: the centre is down, or the port is another; ask the centre"
    )
    assert [finding.what for finding in findings if not finding.good] == ["connection"]


def test_a_name_that_is_none_is_told(site: Site) -> None:
    connection = found(check_ready(towards(site, 443, "nowhere.invalid")), "connection")
    assert not connection.good
    assert connection.text.startswith("there is no host 'nowhere.invalid' (")
    assert connection.text.endswith("check the name and the DNS")


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_without_the_authority_nobody_is_taken_for_the_centre(
    site: Site, centre: Centre, content: bytes | None
) -> None:
    path = read_known_centre(site).authority
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    findings = asked(site, centre.public)
    assert [finding.what for finding in findings] == ["data", "key", "authority"]
    assert not findings[-1].good
    assert "authority.crt: no certificate" in findings[-1].text
    assert findings[-1].text.endswith("restore it from the invitation or a backup")


def test_an_authority_that_has_ended_is_told_and_not_blamed_on_the_server(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.centre.authority.AUTHORITY_DAYS", -2)
    ended = Pair(tmp_path / "ended.key", tmp_path / "ended.crt")
    make_authority(ended, "localhost")
    read_known_centre(site).authority.write_bytes(ended.certificate.read_bytes())
    findings = asked(site, other_pair(tmp_path, ended))
    assert [finding.what for finding in findings] == ["data", "key", "authority"]
    day = f"{read_certificate(ended.certificate).not_valid_after_utc:%Y-%m-%d}"
    assert findings[-1] == Finding(
        "authority", False, f"the centre's authority expired on {day}; ask the centre for a new invitation"
    )


@pytest.mark.parametrize(
    ("change", "told"), [(lambda key: key.unlink(), "no private key"), (lambda key: key.chmod(0o644), "chmod 600 it")]
)
def test_a_key_that_cannot_be_used_is_told_and_the_rest_is_looked_at(
    site: Site, centre: Centre, change: object, told: str
) -> None:
    change(read_known_centre(site).key)
    findings = asked(site, centre.public)
    assert [finding.what for finding in findings if not finding.good] == ["key"]
    assert told in found(findings, "key").text
    assert len(findings) == 5


def test_missing_data_is_told_and_the_rest_is_looked_at(site: Site, centre: Centre, tmp_path: Path) -> None:
    findings = asked(replace(site, cache=tmp_path / "nothing"), centre.public)
    assert [finding.what for finding in findings if not finding.good] == ["data"]
    assert found(findings, "data").text.endswith("run 'hemafed-client ingest SITE_YAML' to write it")
    assert len(findings) == 5


def test_data_is_counted_by_what_the_site_does_with_it(site: Site, centre: Centre) -> None:
    """A training hospital keeps patients for validation; of a held-out one everything is tested on."""
    trains = found(asked(site, centre.public), "data")
    tests = found(asked(replace(site, role="held-out"), centre.public), "data")
    assert tests == Finding("data", True, "24 slices to test on")
    assert trains.good
    assert 2 <= int(trains.text.removesuffix(" slices to train on")) < 24


@pytest.mark.parametrize(("role", "told"), [("train", "slices to train on"), ("held-out", "1 slices to test on")])
def test_too_little_data_is_told(site: Site, centre: Centre, tmp_path: Path, role: str, told: str) -> None:
    cache, _ = ingested(make_site(tmp_path / "little", patients(1, slices=1)))
    assert len(cache.label) == 1
    findings = asked(replace(site, cache=tmp_path / "little" / "cache", role=role), centre.public)
    data = found(findings, "data")
    assert not data.good
    assert f"{told}; run 'hemafed-client check' and see what was left out" in data.text


def test_a_site_that_answered_no_invitation_is_told_how(with_data: Site) -> None:
    findings = check_ready(with_data)
    assert [finding.what for finding in findings] == ["data", "centre"]
    assert [finding.good for finding in findings] == [True, False]
    assert "'hemafed-client init INVITATION SITE_YAML' does that" in findings[-1].text
