from __future__ import annotations

import re
import stat
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from server.centre.authority import issue_server
from server.centre.config import Centre, CentreError, expiry_warnings, init_centre, read_centre, renew_certificates
from server.centre.registry import read_sites
from tests.support.centres import make_centre
from tests.support.small_sites import contents


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    return make_centre(tmp_path / "centre")


def test_a_centre_is_made_and_read_back(tmp_path: Path) -> None:
    made = Centre(tmp_path / "centre", "centre.example.org", 8000, "127.0.0.1", 9000)
    init_centre(made)
    assert read_centre(tmp_path / "centre") == made
    assert read_sites(made) == {}
    assert stat.S_IMODE((made.folder / "keys").stat().st_mode) == 0o700
    secrets = [made.authority.key, made.public.key, made.loopback.key, made.secret]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert len(made.secret.read_bytes()) == 32
    link = tomllib.loads((made.flower / "config.toml").read_text())["superlink"]
    assert link[link["default"]] == {
        "address": "127.0.0.1:9000",
        "root-certificates": str(made.authority.certificate),
    }


def test_a_second_centre_in_the_same_folder_is_refused_and_the_first_is_untouched(centre: Centre) -> None:
    before = contents(centre.folder)
    with pytest.raises(CentreError, match=r"centre\.toml exists; 'hemafed-server renew' makes new server certificates"):
        init_centre(replace(centre, host="other.example.org"))
    assert contents(centre.folder) == before


def test_a_folder_that_is_no_centre_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(CentreError, match=r"has no centre\.toml; 'hemafed-server init .* --host NAME' makes one"):
        read_centre(tmp_path)


@pytest.mark.parametrize("content", [b'host = "a', b"port = 443\n", b'host = "a"\nhosts = 2\n', b'host = "\xff"\n'])
def test_a_damaged_config_is_named(centre: Centre, content: bytes) -> None:
    (centre.folder / "centre.toml").write_bytes(content)
    with pytest.raises(
        CentreError, match=r"centre\.toml: .*; expected host, largest_reply_mb, listen, loopback_port, port"
    ):
        read_centre(centre.folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loopback_port": 443}, "port and loopback_port are both 443"),
        ({"largest_reply_mb": 0}, "largest_reply_mb is 0, expected a whole number from 1"),
        ({"port": 0}, "port is 0, expected a whole number from 1 to 65535"),
        ({"loopback_port": 65536}, "loopback_port is 65536"),
        ({"port": "443"}, "port is '443'"),
        ({"port": True}, "port is True"),
        ({"host": ""}, "host is '', expected a DNS name or an IPv4 address alone"),
        ({"host": "fed.example.org:443"}, "host is 'fed.example.org:443', expected"),
        ({"host": "https://fed.example.org"}, "host is 'https://fed.example.org', expected"),
        ({"host": "::1"}, "host is '::1', expected"),
        ({"listen": "0.0.0.0; deny all"}, "listen is '0.0.0.0; deny all', expected an IPv4 address"),
        ({"listen": "300.1.1.1"}, "listen is '300.1.1.1', expected"),
    ],
)
def test_what_could_not_be_served_is_refused_when_made_and_when_read(
    centre: Centre, tmp_path: Path, change: dict, told: str
) -> None:
    with pytest.raises(CentreError, match=re.escape(told)):
        init_centre(replace(centre, folder=tmp_path / "another", **change))
    assert not (tmp_path / "another").exists()
    path = centre.folder / "centre.toml"
    path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | change))
    with pytest.raises(CentreError, match=re.escape(told)) as refusal:
        read_centre(centre.folder)
    assert str(path) in str(refusal.value)


def test_a_folder_whose_name_nginx_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CentreError, match=r"\['\$'\], which nginx reads otherwise"):
        make_centre(tmp_path / "costs $5")


def test_renewed_certificates_need_nothing_new_of_hospitals(centre: Centre) -> None:
    before = contents(centre.folder)
    renew_certificates(centre)
    after = contents(centre.folder)
    changed = {path for path in before if before[path] != after[path]}
    pairs = ("public", "loopback", "instructions")
    assert changed == {f"keys/{pair}.{kind}" for pair in pairs for kind in ("key", "crt")}


def test_certificates_that_end_soon_are_warned_of_with_what_to_do(
    centre: Centre, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert expiry_warnings(centre) == []
    issue_server(centre.authority, centre.public, ["localhost"], days=10)
    (told,) = expiry_warnings(centre)
    assert told.startswith("the certificate public.crt expires in 10 days")
    assert told.endswith(f"'hemafed-server renew {centre.folder}' makes new ones; hospitals need nothing new")
    renew_certificates(centre)
    assert expiry_warnings(centre) == []

    monkeypatch.setattr("server.centre.authority.AUTHORITY_DAYS", 5)
    old = make_centre(centre.folder / "old")
    (told,) = expiry_warnings(old)
    assert told.startswith("the certificate authority.crt expires in 5 days")
    assert "every hospital must be invited again" in told
