from __future__ import annotations

import shutil
import subprocess
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID as Use
from cryptography.x509.oid import NameOID, ObjectIdentifier

from client.node.enrol import init_site, read_known_centre, read_node_key
from server.centre.config import Centre, CentreError
from server.centre.registry import invite, read_nodes, read_sites, register, revoke, write_nodes
from shared.site import read_site
from shared.wire.enrolment import (
    EnrolError,
    Request,
    _signed,
    key_fingerprint,
    make_certificate,
    make_node_key,
    make_request,
    public_text,
    read_letter,
)
from tests.support.centres import invitation_file, make_centre
from tests.support.small_sites import contents, make_site

SITE = "hospital-01"


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    return make_centre(tmp_path / "centre")


def answer(centre: Centre, name: str = SITE, key: ec.EllipticCurvePrivateKey | None = None, days: int = 14) -> Request:
    """What a hospital sends back that was invited just now."""
    return make_request(invite(centre, name, days), key or make_node_key())


def again(request: Request, key: ec.EllipticCurvePrivateKey, **changes: str) -> Request:
    """A request with the right signature of its sender, whatever it says."""
    said = replace(request, public_key=public_text(key.public_key()), **changes)
    return make_request(said, key)  # of an invitation it takes site and token alone


def age_s(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def test_the_whole_way_from_invitation_to_registration(centre: Centre, tmp_path: Path) -> None:
    site_yaml, sent = make_site(tmp_path / "hospital", {}, site=SITE), tmp_path / "request.json"
    invitation = invitation_file(centre, SITE)
    assert read_sites(centre)[SITE].status == "invited"
    assert read_sites(centre)[SITE].fingerprint == ""
    known, _ = init_site(invitation, site_yaml, sent)
    taken = register(centre, read_letter(sent, Request))
    assert read_sites(centre) == {SITE: taken}
    assert (taken.site, taken.status, taken.token_hash, taken.expires) == (SITE, "registered", "", "")
    assert 0 <= age_s(taken.since) < 60
    assert taken.fingerprint == known.fingerprint()
    assert known.address == "localhost:443"
    assert known.authority.read_bytes() == centre.authority.certificate.read_bytes()

    # Nothing secret of one side is anywhere on the other's.
    private = known.key.read_bytes().splitlines()[1:-1]
    travelled = [sent.read_bytes(), invitation.read_bytes(), *contents(centre.folder).values()]
    assert not any(line in content for line in private for content in travelled)
    token = read_letter(sent, Request).token.encode()
    assert [path for path, content in contents(centre.folder).items() if token in content] == [
        f"invitations/{SITE}.json"
    ]
    ours = contents(centre.folder / "keys") | {"token": token}
    secret = [content for path, content in ours.items() if not path.endswith(".crt")]
    kept = contents(tmp_path / "hospital").values()
    assert not any(content in file for content in secret for file in kept)


def test_both_sides_see_the_fingerprint_that_ssh_shows(tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    public = public_text(make_node_key().public_key())
    (tmp_path / "key.pub").write_text(public)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "key.pub")], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[1] == key_fingerprint(public)


@pytest.mark.parametrize("part", ["site", "token", "public_key", "signature"])
def test_a_request_that_was_changed_on_its_way_is_refused(centre: Centre, part: str) -> None:
    request, other = answer(centre), answer(centre, "hospital-02")
    with pytest.raises(EnrolError, match="was changed on its way, or its sender does not have the key; ask the site"):
        register(centre, replace(request, **{part: getattr(other, part)}))
    assert {site.status for site in read_sites(centre).values()} == {"invited"}


def test_nobody_registers_a_key_that_he_only_saw(centre: Centre) -> None:
    """A request holds a public key; with the invitation to another site it is still not its reader's."""
    seen, thief = answer(centre), make_node_key()
    invitation = invite(centre, "hospital-02")
    forged = replace(make_request(invitation, thief), public_key=seen.public_key)
    with pytest.raises(EnrolError, match="does not have the key"):
        register(centre, forged)


@pytest.mark.parametrize("signature", ["", "nothing", "AAAA", "é"])
def test_a_signature_that_is_none_is_refused(centre: Centre, signature: str) -> None:
    with pytest.raises(EnrolError, match="was changed on its way"):
        register(centre, replace(answer(centre), signature=signature))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("", "was changed on its way"),
        ("ecdsa-sha2-nistp384 AAAA", "was changed on its way"),
        ("ssh-nothing AAAAC3NzaC1lZDI1NTE5AAAAIJ", "was changed on its way"),
        (
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ9sNNRAzQEmiN2Cpm2EOZfMyeaV0lSTmVnsWNkvYKtT",
            "Ed25519PublicKey, expected an elliptic curve key",
        ),
    ],
)
def test_a_key_that_is_none_of_ours_is_refused(centre: Centre, key: str, told: str) -> None:
    with pytest.raises(EnrolError, match=told):
        register(centre, replace(answer(centre), public_key=key))


def test_an_invitation_is_good_once(centre: Centre) -> None:
    request = answer(centre)
    since = register(centre, request).since
    with pytest.raises(CentreError, match=f"is that of site '{SITE}' \\(registered since {since}".replace("+", r"\+")):
        register(centre, request)
    with pytest.raises(CentreError, match=f"site '{SITE}' is registered since .*; invite it again"):
        register(centre, again(request, make_node_key()))


def test_a_second_invitation_replaces_the_first(centre: Centre) -> None:
    first, second = answer(centre), answer(centre)
    with pytest.raises(CentreError, match=f"'{SITE}' answers another invitation than the last; invite it again"):
        register(centre, first)
    assert register(centre, second).public_key == second.public_key


def test_an_invitation_is_for_one_site(centre: Centre) -> None:
    key = make_node_key()
    request = answer(centre)
    answer(centre, "hospital-02")
    with pytest.raises(CentreError, match="'hospital-02' answers another invitation"):
        register(centre, again(request, key, site="hospital-02"))


def test_an_invitation_ends(centre: Centre) -> None:
    assert age_s(invite(centre, SITE, days=3).expires) == pytest.approx(-3 * 86400, abs=60)
    with pytest.raises(CentreError, match=f"the invitation of site '{SITE}' expired on .*; invite it again"):
        register(centre, answer(centre, days=-1))
    assert read_sites(centre)[SITE].status == "invited"


@pytest.mark.parametrize("name", ["hospital-02", "../centre", "Hospital-01"])
def test_who_was_not_invited_is_refused(centre: Centre, name: str) -> None:
    key = make_node_key()
    request = answer(centre, key=key)
    with pytest.raises(CentreError, match=f"site '{name}' was not invited; 'hemafed-server invite' does that"):
        register(centre, again(request, key, site=name))


@pytest.mark.parametrize("name", ["", "..", "../escape", "a/b", "hospital 1", "-x", "a" * 65, "Härtel", "a\n"])
def test_a_name_that_cannot_be_one_is_not_invited(centre: Centre, name: str) -> None:
    before = contents(centre.folder)
    with pytest.raises(CentreError, match=r"expected up to 64 letters, digits, '-', '_' or '\.'"):
        invite(centre, name)
    assert contents(centre.folder) == before


def test_two_sites_cannot_have_one_key(centre: Centre) -> None:
    key = make_node_key()
    register(centre, answer(centre, key=key))
    with pytest.raises(CentreError, match=f"is that of site '{SITE}' .* each site has a key of its own"):
        register(centre, answer(centre, "hospital-02", key))


def test_one_key_does_not_look_like_two(centre: Centre) -> None:
    """OpenSSH's format allows a comment after the key."""
    key = make_node_key()
    register(centre, answer(centre, key=key))
    invitation = invite(centre, "hospital-02")
    plain = public_text(key.public_key())
    for written in (f"{plain} hospital-02", f"{plain} ", f"{plain}\n"):
        with pytest.raises(EnrolError, match="was changed on its way"):
            register(centre, signed_as(invitation.token, written, key))


def signed_as(token: str, public_key: str, key: ec.EllipticCurvePrivateKey) -> Request:
    """A request of hospital-02, signed by who has the key, with the key written in another way."""
    return signed(Request("hospital-02", token, public_key, make_certificate("hospital-02", key), ""), key)


def signed(request: Request, key: ec.EllipticCurvePrivateKey) -> Request:
    """The request with a signature that is right, whatever stands in it."""
    return replace(request, signature=b64encode(key.sign(_signed(request), ec.ECDSA(hashes.SHA384()))).decode())


def self_signed(key: ec.EllipticCurvePrivateKey, ca: bool = False, use: ObjectIdentifier = Use.CLIENT_AUTH) -> str:
    """A certificate of a key with one thing that make_certificate would not write."""
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SITE)]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 7, now - timedelta(days=1), now + timedelta(days=9))
    made = made.add_extension(x509.BasicConstraints(ca, None), True).add_extension(x509.ExtendedKeyUsage([use]), False)
    return made.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM).decode()


def test_a_certificate_that_could_let_in_others_is_refused(centre: Centre) -> None:
    """The door trusts every certificate in its list as it is."""
    key, other = make_node_key(), make_node_key()
    good = answer(centre, key=key)
    for certificate, told in (
        (self_signed(key, ca=True), "is for more than a client"),
        (self_signed(key, use=Use.SERVER_AUTH), "is for more than a client"),
        (make_certificate(SITE, other), "is of another key than the request's"),
        (make_certificate("hospital-02", key), "names another site"),
        (make_certificate(SITE, key, days=-1), "which is not now"),
        (good.certificate + make_certificate(SITE, other), "has something beside it"),
        ("# mine\n" + good.certificate, "has something beside it"),
        (good.certificate * 9, "expected at most 4096"),
        (good.certificate.replace("A", "B", 40), "cannot be used"),
        ("", "cannot be used"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be used"),
    ):
        with pytest.raises(EnrolError, match=told):
            register(centre, signed(replace(good, certificate=certificate), key))
    assert register(centre, good).certificate == good.certificate
    assert "BEGIN CERTIFICATE" in revoke(centre, SITE).certificate, "the door tells its owner that it was revoked"


def test_a_registered_site_is_not_invited_until_it_is_revoked(centre: Centre) -> None:
    register(centre, answer(centre))
    before = contents(centre.folder)
    with pytest.raises(CentreError, match=r"is registered since .* 'hemafed-server revoke' it first"):
        invite(centre, SITE)
    assert contents(centre.folder) == before
    revoke(centre, SITE)
    assert register(centre, answer(centre)).status == "registered"


def test_a_revoked_site_is_listed_with_its_key_and_its_open_invitation_is_void(centre: Centre) -> None:
    first = register(centre, answer(centre))
    gone = revoke(centre, SITE)
    assert read_sites(centre) == {SITE: gone}
    assert (gone.status, gone.fingerprint) == ("revoked", first.fingerprint)
    request = answer(centre, "hospital-02")
    revoke(centre, "hospital-02")
    with pytest.raises(CentreError, match=r"site 'hospital-02' is revoked since .*; invite it again"):
        register(centre, request)


@pytest.mark.parametrize("name", [SITE, "hospital-02"])
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_revoked_key_is_never_taken_again(centre: Centre, name: str, rounds: int) -> None:
    """Neither at its own site, invited again, nor at another; nor after the site has had other keys since."""
    stolen = make_node_key()
    register(centre, answer(centre, key=stolen))
    revoke(centre, SITE)
    for _ in range(rounds):
        register(centre, answer(centre))
        revoke(centre, SITE)
    with pytest.raises(CentreError, match=f"is that of site '{SITE}' \\(revoked.* a revoked one is not used again"):
        register(centre, answer(centre, name, stolen))
    answer(centre, name)  # a second invitation forgets it no more than a first
    with pytest.raises(CentreError, match="a revoked one is not used again"):
        register(centre, answer(centre, name, stolen))
    assert register(centre, answer(centre, name)).status == "registered"


def test_who_is_not_known_cannot_be_revoked(centre: Centre) -> None:
    with pytest.raises(CentreError, match="site 'hospital-09' is not known; 'hemafed-server sites' lists who is"):
        revoke(centre, "hospital-09")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b'{"site": "x"}', b'{"site": "x", "status": "y", "since": "z", "k": 1}', b"\xff"],
)
def test_a_damaged_file_of_a_site_is_named_with_the_next_step(centre: Centre, content: bytes) -> None:
    request = answer(centre)
    (centre.folder / "sites" / f"{SITE}.json").write_bytes(content)
    with pytest.raises(CentreError, match=rf"{SITE}\.json is damaged .*; restore it from a backup, or delete it and"):
        read_sites(centre)
    with pytest.raises(CentreError, match="is damaged"):
        register(centre, request)


def test_a_file_that_was_cut_while_it_was_written_counts_for_nothing(centre: Centre) -> None:
    register(centre, answer(centre))
    (centre.folder / "sites" / "hospital-02.json.partial").write_text("{")
    assert list(read_sites(centre)) == [SITE]


def test_numbers_of_nodes_are_kept(centre: Centre) -> None:
    assert read_nodes(centre) == {}
    write_nodes(centre, {SITE: "12345678901234567890"})
    assert read_nodes(centre) == {SITE: "12345678901234567890"}


def test_the_key_on_the_disk_is_the_one_that_was_registered(centre: Centre, tmp_path: Path) -> None:
    site_yaml = make_site(tmp_path / "hospital", {}, site=SITE)
    init_site(invitation_file(centre, SITE), site_yaml, tmp_path / "request.json")
    taken = register(centre, read_letter(tmp_path / "request.json", Request))
    key = read_node_key(read_known_centre(read_site(site_yaml)))
    assert public_text(key.public_key()) == taken.public_key
