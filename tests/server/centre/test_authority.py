from __future__ import annotations

import hashlib
import os
import socket
import ssl
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from server.centre.authority import (
    AuthorityError,
    Pair,
    days_left,
    expiry_warning,
    fingerprint,
    issue_server,
    make_authority,
    read_certificate,
    read_key,
    write_private,
)
from tests.support.centres import over_tls, serving

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def pair(folder: Path, name: str) -> Pair:
    return Pair(folder / f"{name}.key", folder / f"{name}.crt")


def authority(folder: Path, name: str = "authority") -> Pair:
    made = pair(folder, name)
    make_authority(made, "centre.example.org")
    return made


def server(folder: Path, signer: Pair, *hosts: str, days: int = 397) -> Pair:
    made = pair(folder, "server")
    issue_server(signer, made, hosts or ["localhost"], days)
    return made


def handshake(shown: Pair, trusted: Pair, name: str) -> dict:
    """Connect as a client that trusts one authority and asks for one name; the certificate that it took."""
    context = ssl.create_default_context(cafile=trusted.certificate)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 has it from the start
    with (
        serving(over_tls(shown)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=5) as line,
        context.wrap_socket(line, server_hostname=name) as secure,
    ):
        return secure.getpeercert()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["centre.example.org", "localhost", "127.0.0.1", "::1"])
def test_a_server_is_trusted_by_its_authority_under_each_of_its_names(tmp_path: Path, name: str) -> None:
    signer = authority(tmp_path)
    shown = server(tmp_path, signer, "centre.example.org", "localhost", "127.0.0.1", "::1")
    kinds = {(kind, value) for kind, value in handshake(shown, signer, name)["subjectAltName"]}
    assert kinds == {
        ("DNS", "centre.example.org"),
        ("DNS", "localhost"),
        ("IP Address", "127.0.0.1"),
        ("IP Address", "0:0:0:0:0:0:0:1"),
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("other.example.org", "Hostname mismatch"),
        ("sub.centre.example.org", "Hostname mismatch"),
        ("127.0.0.1", "IP address mismatch"),
    ],
)
def test_another_name_is_refused(tmp_path: Path, name: str, told: str) -> None:
    signer = authority(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match=told):
        handshake(server(tmp_path, signer, "centre.example.org"), signer, name)


def test_a_name_longer_than_a_subject_may_be_is_whole_where_it_counts(tmp_path: Path) -> None:
    signer, name = authority(tmp_path), "a" * 60 + ".example.org"
    assert dict(field for (field,) in handshake(server(tmp_path, signer, name), signer, name)["subject"]) == {
        "commonName": name[:64]
    }


def test_a_server_of_another_authority_is_refused_even_of_one_of_the_same_name(tmp_path: Path) -> None:
    ours, theirs = authority(tmp_path), authority(tmp_path, "theirs")
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(server(tmp_path, theirs), ours, "localhost")


def test_a_server_cannot_sign_others(tmp_path: Path) -> None:
    signer = authority(tmp_path)
    greedy, forged = server(tmp_path, signer), pair(tmp_path, "forged")
    issue_server(greedy, forged, ["bank.example.org"])
    forged.certificate.write_bytes(forged.certificate.read_bytes() + greedy.certificate.read_bytes())
    assert not read_certificate(greedy.certificate).extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        handshake(forged, signer, "bank.example.org")


def test_an_expired_certificate_is_refused_and_a_new_one_of_the_same_authority_taken(tmp_path: Path) -> None:
    signer = authority(tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        handshake(server(tmp_path, signer, days=-1), signer, "localhost")
    handshake(server(tmp_path, signer), signer, "localhost")


def test_the_key_of_a_server_is_new_with_each_certificate(tmp_path: Path) -> None:
    signer = authority(tmp_path)
    first = server(tmp_path, signer).key.read_bytes()
    assert server(tmp_path, signer).key.read_bytes() != first


def test_lifetimes_are_ten_years_and_thirteen_months(tmp_path: Path) -> None:
    signer = authority(tmp_path)
    assert days_left(signer.certificate) == pytest.approx(3650, abs=0.01)
    assert days_left(server(tmp_path, signer).certificate) == pytest.approx(397, abs=0.01)
    assert days_left(server(tmp_path, signer, days=-2).certificate) == pytest.approx(-2, abs=0.01)


def test_days_left_counts_from_the_moment_given(tmp_path: Path) -> None:
    path = authority(tmp_path).certificate
    end = read_certificate(path).not_valid_after_utc
    assert days_left(path, end - timedelta(days=10)) == 10
    assert days_left(path, end + timedelta(hours=12)) == -0.5


@pytest.mark.parametrize(
    ("days_before", "told"),
    [(31, ""), (30, "expires in 30 days"), (1, "expires in 1 days"), (-3, "expired 3 days ago")],
)
def test_a_month_before_its_end_a_certificate_is_warned_of(tmp_path: Path, days_before: int, told: str) -> None:
    path = authority(tmp_path).certificate
    end = read_certificate(path).not_valid_after_utc
    said = expiry_warning(path, "make new ones", end - timedelta(days=days_before))
    assert said == (told and f"the certificate authority.crt {told} ({end:%Y-%m-%d}): make new ones")


def test_a_fingerprint_is_that_of_the_certificate_as_it_travels(tmp_path: Path) -> None:
    path = authority(tmp_path).certificate
    assert fingerprint(path) == hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text())).hexdigest()


def test_keys_are_readable_by_their_owner_alone_and_certificates_by_all(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        signer = authority(tmp_path / "keys")
        shown = server(tmp_path / "keys", signer)
    finally:
        os.umask(before)
    assert {mode(signer.key), mode(shown.key)} == {0o600}
    assert {mode(signer.certificate), mode(shown.certificate)} == {0o666}
    assert sorted(path.suffix for path in (tmp_path / "keys").iterdir()) == [".crt", ".crt", ".key", ".key"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_key_that_root_makes_is_of_the_owner_of_its_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 1234, 5678)
    write_private(tmp_path / "public.key", b"secret")
    found = (tmp_path / "public.key").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o600)


def test_a_secret_replaces_a_file_and_what_a_crash_left_that_others_could_read(tmp_path: Path) -> None:
    for name in ("secret", "secret.partial"):
        (tmp_path / name).write_bytes(b"old")
        (tmp_path / name).chmod(0o644)
    write_private(tmp_path / "secret", b"new")
    assert ((tmp_path / "secret").read_bytes(), mode(tmp_path / "secret")) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [tmp_path / "secret"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"no private key \(FileNotFoundError\)"),
        (b"", r"no private key \(ValueError\)"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", r"no private key \(ValueError\)"),
        (
            ec.generate_private_key(ec.SECP384R1()).private_bytes(
                PEM, PKCS8, serialization.BestAvailableEncryption(b"password")
            ),
            r"no private key \(TypeError\)",
        ),
        (
            ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, serialization.NoEncryption()),
            "Ed25519PrivateKey, expected an elliptic curve key",
        ),
    ],
    ids=["missing", "empty", "damaged", "with a password", "of another kind"],
)
def test_a_key_that_cannot_be_used_is_named_with_the_next_step(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    path = tmp_path / "authority.key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AuthorityError, match=rf"authority\.key: .*{told}; restore it from a backup"):
        read_key(path)


@pytest.mark.parametrize(("content", "kind"), [(None, "FileNotFoundError"), (b"", "ValueError"), (b"x", "ValueError")])
def test_a_certificate_that_cannot_be_used_is_named_with_the_next_step(
    tmp_path: Path, content: bytes | None, kind: str
) -> None:
    path = tmp_path / "public.crt"
    if content is not None:
        path.write_bytes(content)
    for read in (read_certificate, days_left, fingerprint, lambda damaged: expiry_warning(damaged, "")):
        with pytest.raises(AuthorityError, match=rf"public\.crt: no certificate \({kind}\); restore it from a backup"):
            read(path)


@pytest.mark.parametrize("lost", ["key", "certificate"])
def test_without_a_whole_authority_nothing_is_signed_or_replaced(tmp_path: Path, lost: str) -> None:
    signer = authority(tmp_path)
    shown = server(tmp_path, signer)
    before = shown.key.read_bytes(), shown.certificate.read_bytes()
    getattr(signer, lost).unlink()
    with pytest.raises(AuthorityError, match="restore it from a backup"):
        server(tmp_path, signer)
    assert (shown.key.read_bytes(), shown.certificate.read_bytes()) == before


def test_a_key_and_a_certificate_of_two_authorities_sign_nothing(tmp_path: Path) -> None:
    one, other = authority(tmp_path, "one"), authority(tmp_path, "other")
    with pytest.raises(AuthorityError, match=r"one\.key is not the key of .*other\.crt; restore both from the same"):
        server(tmp_path, Pair(one.key, other.certificate))
    assert not (tmp_path / "server.crt").exists()
