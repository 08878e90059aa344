from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import sign_message, verify_signature

from client.node.enrol import Centre, init_site, read_known_centre, read_node_key
from server.centre.config import Centre as Coordinator
from server.centre.registry import read_sites, register, revoke
from shared.rules import Policy
from shared.site import SiteError, read_site
from shared.wire.enrolment import (
    EnrolError,
    Invitation,
    Request,
    check_request,
    make_node_key,
    private_text,
    public_text,
    read_letter,
    write_letter,
)
from tests.support.centres import invitation_file, make_centre
from tests.support.small_sites import contents, make_site

SITE = "hospital-01"


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return make_centre(tmp_path / "centre", port=8443)


@pytest.fixture
def invitation(coordinator: Coordinator) -> Path:
    return invitation_file(coordinator, SITE)


@pytest.fixture
def site_yaml(tmp_path: Path) -> Path:
    return make_site(tmp_path / "hospital", {}, site=SITE)


@pytest.fixture
def known(invitation: Path, site_yaml: Path, tmp_path: Path) -> Centre:
    """The centre, once the hospital has answered."""
    return init_site(invitation, site_yaml, tmp_path / "request.json")[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def change(letter: Path, **parts: object) -> None:
    letter.write_text(json.dumps(json.loads(letter.read_text()) | parts))


def test_a_hospital_answers_and_knows_its_centre(
    coordinator: Coordinator, invitation: Path, site_yaml: Path, tmp_path: Path
) -> None:
    before = site_yaml.read_bytes()
    centre, written = init_site(invitation, site_yaml, tmp_path / "out" / "request.json")
    assert (written, site_yaml.read_bytes()) == (False, before)
    assert read_known_centre(read_site(site_yaml)) == centre
    assert (centre.host, centre.port, centre.folder) == ("localhost", 8443, site_yaml.parent / "state" / "centre")
    assert centre.authority.read_text() == coordinator.authority.certificate.read_text()
    request = read_letter(tmp_path / "out" / "request.json", Request)
    check_request(request)
    assert request.public_key == public_text(read_node_key(centre).public_key())
    assert request.token == read_letter(invitation, Invitation).token


def test_a_request_holds_five_public_things_and_an_invitation_four(invitation: Path, known: Centre) -> None:
    """What crosses the hospital's boundary, each way; one more would have to be put here, with a thought."""
    public = {"site", "token", "public_key", "certificate", "signature", "format"}
    assert {field.name for field in fields(Request)} == public
    assert {field.name for field in fields(Invitation)} == {
        "site",
        "address",
        "authority",
        "token",
        "expires",
        "format",
    }
    private = known.key.read_text().splitlines()[1:-1]
    assert len(private) > 3
    assert not any(line in invitation.read_text() for line in private)


def test_the_private_key_stays_where_it_was_made(known: Centre, tmp_path: Path) -> None:
    private = known.key.read_bytes().splitlines()[1:-1]
    found = [path for path, content in contents(tmp_path).items() if any(line in content for line in private)]
    assert found == ["hospital/state/centre/node.key"]


def test_all_of_it_is_readable_by_its_owner_alone(invitation: Path, site_yaml: Path, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text("an older one")
    request.chmod(0o644)
    before = os.umask(0)
    try:
        known, _ = init_site(invitation, site_yaml, request)
    finally:
        os.umask(before)
    assert {mode(path) for path in (known.key, request, invitation)} == {0o600}
    assert mode(known.folder) == 0o700
    assert not list(known.folder.glob("*.partial"))


@pytest.mark.parametrize("name", [SITE, "007", "2026-01-01", "1e5", "yes", "null", "1.5", "a" * 64])
def test_a_site_yaml_is_written_where_there_is_none_whatever_yaml_makes_of_the_name(
    coordinator: Coordinator, tmp_path: Path, name: str
) -> None:
    site_yaml = tmp_path / "new" / "site.yaml"
    known, written = init_site(invitation_file(coordinator, name), site_yaml, tmp_path / "request.json")
    site = read_site(site_yaml)
    assert (written, site.name, site.role, site.images) == (True, name, "train", tmp_path / "new" / "dicom")
    assert known.folder == site.state / "centre"
    assert site.policy == Policy(), "what stands there is what counts without it"
    assert register(coordinator, read_letter(tmp_path / "request.json", Request)).site == name


def test_an_invitation_of_another_site_is_refused(invitation: Path, tmp_path: Path) -> None:
    other = make_site(tmp_path / "other", {}, site="hospital-02")
    with pytest.raises(
        EnrolError, match=f"invites site '{SITE}', and .*site.yaml is of site 'hospital-02'; use the name"
    ):
        init_site(invitation, other, tmp_path / "request.json")
    assert not (tmp_path / "other" / "state").exists()
    assert not (tmp_path / "request.json").exists()


def test_an_expired_invitation_is_refused_and_nothing_is_written(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(EnrolError, match=r"the invitation expired on .*; ask the centre for a new one"):
        init_site(
            invitation_file(coordinator, SITE, days=-1), tmp_path / "new" / "site.yaml", tmp_path / "request.json"
        )
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "request.json").exists()


@pytest.mark.parametrize("expires", ["", "soon", "2030-01-01T00:00:00", "2030-13-01T00:00:00+00:00"])
def test_an_invitation_without_a_proper_end_is_refused(invitation: Path, tmp_path: Path, expires: str) -> None:
    change(invitation, expires=expires)
    with pytest.raises(EnrolError, match=r"expected a date and time with time zone; give the whole file"):
        init_site(invitation, tmp_path / "new" / "site.yaml", tmp_path / "request.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", "../x", 'x"\nweight: 100\nrole: "train', "x\npolicy: {metrics: true}", "x # y"])
def test_a_name_writes_nothing_into_a_site_yaml_but_itself(invitation: Path, tmp_path: Path, name: str) -> None:
    change(invitation, site=name)
    with pytest.raises(EnrolError, match="expected up to 64 letters, digits"):
        init_site(invitation, tmp_path / "new" / "site.yaml", tmp_path / "request.json")
    assert not (tmp_path / "new").exists()


def test_a_site_yaml_that_cannot_be_used_is_refused(invitation: Path, site_yaml: Path, tmp_path: Path) -> None:
    site_yaml.write_text("site: hospital-01\n")
    with pytest.raises(SiteError, match="'data' is missing"):
        init_site(invitation, site_yaml, tmp_path / "request.json")
    assert not (tmp_path / "request.json").exists()


def test_a_key_is_never_replaced(coordinator: Coordinator, known: Centre, site_yaml: Path, tmp_path: Path) -> None:
    register(coordinator, read_letter(tmp_path / "request.json", Request))
    before = contents(known.folder)
    invitation = coordinator.folder / "invitations" / f"{SITE}.json"
    with pytest.raises(EnrolError, match=rf"node\.key exists: .* move the folder {known.folder} away"):
        init_site(invitation, site_yaml, tmp_path / "second.json")
    assert contents(known.folder) == before
    assert not (tmp_path / "second.json").exists()


def test_a_command_that_failed_can_be_run_again(invitation: Path, site_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    with pytest.raises(OSError, match="blocked"):
        init_site(invitation, site_yaml, tmp_path / "blocked")
    with pytest.raises(EnrolError, match="no private key"):
        read_node_key(read_known_centre(read_site(site_yaml)))
    known, _ = init_site(invitation, site_yaml, tmp_path / "request.json")
    request = read_letter(tmp_path / "request.json", Request)
    assert request.public_key == public_text(read_node_key(known).public_key())


def test_a_request_does_not_take_the_place_of_another_sites(
    coordinator: Coordinator, known: Centre, tmp_path: Path
) -> None:
    before = (tmp_path / "request.json").read_bytes()
    other = tmp_path / "other" / "site.yaml"
    with pytest.raises(EnrolError, match=rf"request\.json is the request of site '{SITE}'; .* --request FILE"):
        init_site(invitation_file(coordinator, "hospital-02"), other, tmp_path / "request.json")
    assert (tmp_path / "request.json").read_bytes() == before
    assert not (other.parent / "state" / "centre").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda letter: letter | {"authority": letter["authority"].replace("M", "!", 1)},
        lambda letter: letter | {"address": "a"},
    ],
    ids=["authority", "address"],
)
def test_an_invitation_that_was_damaged_on_its_way_is_refused_before_a_key_is_made(
    invitation: Path, site_yaml: Path, tmp_path: Path, damage: Callable[[dict], dict]
) -> None:
    invitation.write_text(json.dumps(damage(json.loads(invitation.read_text()))))
    with pytest.raises(EnrolError, match="was damaged on its way: its address or authority cannot be read"):
        init_site(invitation, site_yaml, tmp_path / "request.json")
    assert not (site_yaml.parent / "state" / "centre").exists()


def test_a_site_that_was_given_another_name_since_is_told_so(known: Centre, site_yaml: Path) -> None:
    site_yaml.write_text(site_yaml.read_text().replace(SITE, "hospital-02"))
    with pytest.raises(EnrolError, match=f"was invited as '{SITE}', and site.yaml names it 'hospital-02'"):
        read_known_centre(read_site(site_yaml))


def test_a_hospital_that_moves_its_old_key_away_can_come_back(
    coordinator: Coordinator, known: Centre, site_yaml: Path, tmp_path: Path
) -> None:
    register(coordinator, read_letter(tmp_path / "request.json", Request))
    known.folder.rename(tmp_path / "old")
    revoke(coordinator, SITE)
    again, _ = init_site(invitation_file(coordinator, SITE), site_yaml, tmp_path / "request.json")
    register(coordinator, read_letter(tmp_path / "request.json", Request))
    assert read_sites(coordinator)[SITE].fingerprint == again.fingerprint()


@pytest.mark.parametrize(("kind", "maker"), [(Invitation, "hemafed-server invite"), (Request, "hemafed-client init")])
@pytest.mark.parametrize(
    "damage",
    [
        lambda good: "",
        lambda good: json.dumps(good)[:-10],
        lambda good: "[]",
        lambda good: "7",
        lambda good: '"format"',
        lambda good: json.dumps({key: good[key] for key in good if key != "token"}),
        lambda good: json.dumps({key: good[key] for key in good if key != "format"}),
        lambda good: json.dumps(good | {"site": 7}),
        lambda good: json.dumps(good | {"token": None}),
        lambda good: json.dumps(good | {"extra": "x"}),
        lambda good: b"\xff\xfe",
    ],
    ids=["empty", "cut", "list", "number", "text", "no token", "no format", "number", "null", "more", "no text"],
)
def test_a_damaged_letter_is_named_with_its_maker(
    known: Centre, invitation: Path, tmp_path: Path, kind: type, maker: str, damage: object
) -> None:
    path = invitation if kind is Invitation else tmp_path / "request.json"
    damaged = damage(asdict(read_letter(path, kind)))
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(
        EnrolError, match=rf"is no {kind.__name__.lower()}; give the whole file that '{maker}' wrote, unchanged"
    ):
        read_letter(path, kind)


def test_a_letter_that_is_not_there_of_the_other_kind_or_of_another_version_is_refused(
    invitation: Path, known: Centre, tmp_path: Path
) -> None:
    with pytest.raises(EnrolError, match=r"none\.json is not there; give the file that 'hemafed-server invite' wrote"):
        read_letter(tmp_path / "none.json", Invitation)
    with pytest.raises(EnrolError, match="is no request"):
        read_letter(invitation, Request)
    with pytest.raises(EnrolError, match="is no invitation"):
        read_letter(tmp_path / "request.json", Invitation)
    change(invitation, format=1)
    with pytest.raises(EnrolError, match="invitation of format 1, expected 2; use the same version"):
        read_letter(invitation, Invitation)


def test_a_letter_is_read_as_it_was_written(invitation: Path, tmp_path: Path) -> None:
    letter = replace(read_letter(invitation, Invitation), address="Ünïted")
    write_letter(tmp_path / "folder" / "copy.json", letter)
    assert read_letter(tmp_path / "folder" / "copy.json", Invitation) == letter


def test_a_site_that_answered_no_invitation_knows_no_centre(site_yaml: Path) -> None:
    with pytest.raises(EnrolError, match=f"site '{SITE}' answered no invitation: .* 'hemafed-client init INVITATION"):
        read_known_centre(read_site(site_yaml))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"site": "hospital-01", "address": "localhost"}',
        '{"site": "hospital-01", "address": "localhost:"}',
        '{"site": "hospital-01", "address": ":443"}',
        '{"site": "hospital-01", "address": "localhost:https"}',
        '{"site": "hospital-01", "address": "localhost:0"}',
        '{"site": "hospital-01", "address": "localhost:65536"}',
        '{"address": "localhost:443"}',
    ],
)
def test_a_damaged_address_of_the_centre_is_named(known: Centre, site_yaml: Path, content: str) -> None:
    (known.folder / "centre.json").write_text(content)
    with pytest.raises(
        EnrolError,
        match=r"centre\.json is damaged .*; expected the centre's address as host:port, and site; restore it from a backup",
    ):
        read_known_centre(read_site(site_yaml))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (None, "FileNotFoundError"),
        (b"", "ValueError"),
        (private_text(make_node_key())[:-80], "ValueError"),
        (
            make_node_key().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"password"),
            ),
            "ValueError",
        ),
    ],
    ids=["missing", "empty", "cut", "of another format"],
)
def test_a_key_that_cannot_be_used_is_named(known: Centre, content: bytes | None, kind: str) -> None:
    known.key.unlink()
    if content is not None:
        known.key.write_bytes(content)
        known.key.chmod(0o600)
    with pytest.raises(EnrolError, match=rf"node\.key: no private key \({kind}\); restore it from a backup, or answer"):
        read_node_key(known)


def test_a_key_with_a_password_is_none_that_a_daemon_can_use(known: Centre) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    known.key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "password", "-f", str(known.key)], check=True)
    with pytest.raises(EnrolError, match=r"node\.key: no private key \(TypeError\)"):
        read_node_key(known)


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_key_that_others_can_reach_is_refused(known: Centre, open_to: int) -> None:
    known.key.chmod(open_to)
    with pytest.raises(EnrolError, match=rf"can be read by others \(mode {open_to:o}\); chmod 600 it, and tell"):
        read_node_key(known)
    known.key.chmod(0o400)
    assert isinstance(read_node_key(known), ec.EllipticCurvePrivateKey)


def test_the_key_is_of_the_kind_that_flower_takes(known: Centre) -> None:
    key = read_node_key(known)
    assert key.curve.name == "secp384r1"
    assert verify_signature(key.public_key(), b"moment", sign_message(key, b"moment"))
