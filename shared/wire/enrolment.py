"""Enrolment of a hospital at a centre: two small files, carried by hand or mail.

    hemafed-server invite      -> invitation: the centre's address and authority, a token      (to the hospital)
    hemafed-client init        -> request: the hospital's public key and certificate, signed with its private key
                                                                                                (to the centre)
    hemafed-server register    -> the centre knows the key; both read its fingerprint to each other

The private key never leaves the hospital. The token shows that the sender was invited, the signature that the sender has
the key. The certificate is self-signed with the same key: the centre's door asks for it in the TLS handshake, before it
reads a request. Both files are JSON; neither holds anything of a patient.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import HemafedError

FORMAT = 2
NODE_DAYS = 3650  # validity of a node's certificate, as long as the authority's; revocation ends it earlier
# What the centre's door answers to a certificate that it does not let in.
UNKNOWN = "this certificate is not one of a registered hospital"
REVOKED = "this certificate was revoked"
ABSENT = "no certificate was presented"
_LARGEST_CERTIFICATE = 4096  # characters of PEM; ours has about 800


class EnrolError(HemafedError, ValueError):
    """An invitation or a request cannot be used; names the file, what is wrong and the next step."""


@dataclass(frozen=True)
class Invitation:
    """From the centre to one hospital.

    Attributes:
      site: the public name that the hospital will have.
      address: "host:port" of the centre.
      authority: its certificate authority, PEM.
      token: a secret for this site, good for one registration.
      expires: date and time, ISO 8601, UTC.
    """

    site: str
    address: str
    authority: str
    token: str
    expires: str
    format: int = FORMAT


@dataclass(frozen=True)
class Request:
    """From the hospital to the centre.

    Attributes:
      site: as invited.
      token: as invited.
      public_key: of the hospital's node, OpenSSH.
      certificate: of that key, self-signed, PEM; the node presents it to the centre's door.
      signature: of the four, with the node's private key; base64.
    """

    site: str
    token: str
    public_key: str
    certificate: str
    signature: str
    format: int = FORMAT


Letter = TypeVar("Letter", Invitation, Request)


def write_letter(path: Path, letter: Invitation | Request) -> None:
    """Write an invitation or a request, readable by its owner alone: it holds the token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)  # one that was there before keeps its mode
    path.write_text(json.dumps(asdict(letter), indent=2) + "\n")


def read_letter(path: Path, kind: type[Letter]) -> Letter:
    """Read an invitation or a request.

    Raises:
      EnrolError: no such file, or it is not that.
    """
    what = kind.__name__.lower()
    if not path.is_file():
        raise EnrolError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}; give the file that {_maker(kind)} wrote"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise EnrolError(f"{path}: {what} of format {content['format']!r}, expected {FORMAT}; use the same version")
        if content.keys() != {field.name for field in fields(kind)} or not all(
            isinstance(value, str) for key, value in content.items() if key != "format"
        ):
            raise KeyError(what)
        return kind(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, EnrolError):
            raise
        raise EnrolError(f"{path} is no {what}; give the whole file that {_maker(kind)} wrote, unchanged") from error


def _maker(kind: type) -> str:
    return "'hemafed-server invite'" if kind is Invitation else "'hemafed-client init'"


def make_node_key() -> ec.EllipticCurvePrivateKey:
    """A key for a node: P-384, as Flower's SuperNode takes."""
    return ec.generate_private_key(ec.SECP384R1())


def private_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A node's private key in OpenSSH's format; it stays in the hospital."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_text(key: ec.EllipticCurvePublicKey) -> str:
    """A node's public key in OpenSSH's format."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def key_fingerprint(public_key: str) -> str:
    """As `ssh-keygen -l` shows it, for two people to compare."""
    digest = hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def make_certificate(site: str, key: ec.EllipticCurvePrivateKey, days: int = NODE_DAYS) -> str:
    """Make a self-signed client certificate of a node's key.

    Args:
      site: the hospital's name, which becomes the certificate's common name.
      key: the node's private key.
      days: until it expires; negative makes an expired one.
    Returns:
      The certificate, PEM. It can sign no other certificate (RFC 5280, section 4.2.1.9).
    """
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site[:64])]), datetime.now(UTC)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digital signature
    begin = now - timedelta(hours=1) + min(timedelta(days=days), timedelta(0))  # clocks differ a little
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM).decode()


def make_request(invitation: Invitation, key: ec.EllipticCurvePrivateKey, certificate: str = "") -> Request:
    """Answer an invitation, with the node's certificate or a new one."""
    certificate = certificate or make_certificate(invitation.site, key)
    unsigned = Request(invitation.site, invitation.token, public_text(key.public_key()), certificate, "")
    signature = key.sign(_signed(unsigned), ec.ECDSA(hashes.SHA384()))
    return replace(unsigned, signature=base64.b64encode(signature).decode())


def check_request(request: Request) -> None:
    """Check that the sender of a request has its key, and that the certificate is one of that key alone.

    Raises:
      EnrolError: the key is not a node's, the signature is not the key's, or the certificate is not as make_certificate
        writes it.
    """
    try:
        key = serialization.load_ssh_public_key(request.public_key.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise EnrolError(f"the request's key is a {type(key).__name__}, expected an elliptic curve key")
        if public_text(key) != request.public_key:  # a comment, say: one key must not look like two
            raise ValueError("not as make_request writes it")
        key.verify(base64.b64decode(request.signature), _signed(request), ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        if isinstance(error, EnrolError):
            raise
        raise EnrolError(
            f"the request of site {request.site!r} was changed on its way, or its sender does not have the key; ask the site for "
            "the file again"
        ) from error
    if wrong := _certificate_fault(request, key):
        raise EnrolError(
            f"the certificate in the request of site {request.site!r} {wrong}; the site must run 'hemafed-client init' again, with "
            "the same version as the centre"
        )


def _certificate_fault(request: Request, key: ec.EllipticCurvePublicKey) -> str:
    """Return what is wrong with a request's certificate; empty if nothing is.

    The door trusts every certificate in its list as it is, so one that could sign others, or a second one in the same text,
    would let strangers in.
    """
    if len(request.certificate) > _LARGEST_CERTIFICATE:
        return f"has {len(request.certificate)} characters, expected at most {_LARGEST_CERTIFICATE}"
    try:
        certificate = x509.load_pem_x509_certificate(request.certificate.encode())
        certificate.verify_directly_issued_by(certificate)
        limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        name = certificate.subject.rfc4514_string()
        text = certificate.public_bytes(serialization.Encoding.PEM).decode()
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        return f"cannot be used ({type(error).__name__})"
    if text != request.certificate:
        return "has something beside it"
    if certificate.public_key() != key:
        return "is of another key than the request's"
    if limits.ca or list(uses) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        return "is for more than a client"
    if name != f"CN={request.site}":
        return "names another site"
    if not begin <= datetime.now(UTC) < end:
        return f"is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, which is not now"
    return ""


def _signed(request: Request) -> bytes:
    """Return the bytes that a request's signature covers."""
    return json.dumps([FORMAT, request.site, request.token, request.public_key, request.certificate]).encode()
