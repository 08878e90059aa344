"""The centre's own certificate authority: who may speak as the coordinating centre.

One authority, made by `hemafed-server init`, signs the centre's server certificates; hospitals get the authority's
certificate with their invitation and trust nothing else. Hospitals' certificates are self-signed and not its work
(shared/wire/enrolment.py).
Source of the fields: RFC 5280; of the limits on names: RFC 6125.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import HemafedError
from shared.host.rights import not_permitted

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
WARN_DAYS = 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class AuthorityError(HemafedError, ValueError):
    """A key or certificate cannot be used; names the file and the next step."""


@dataclass(frozen=True)
class Pair:
    """A private key and its certificate, as PEM files.

    Attributes:
      key: readable by its owner alone.
      certificate: public.
    """

    key: Path
    certificate: Path

    def load(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """Both.

        Raises:
          AuthorityError: a file is missing or damaged, or they are not of one pair.
        """
        key, certificate = read_key(self.key), read_certificate(self.certificate)
        if key.public_key() != certificate.public_key():
            raise AuthorityError(f"{self.key} is not the key of {self.certificate}; restore both from the same backup")
        return key, certificate


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """An EC private key from a PEM file."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except PermissionError as error:
        raise AuthorityError(f"{path} {not_permitted(path)}") from error
    except (OSError, ValueError, TypeError) as error:
        raise AuthorityError(f"{path}: no private key ({type(error).__name__}); restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityError(
            f"{path}: a {type(key).__name__}, expected an elliptic curve key; restore it from a backup"
        )
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate from a PEM file."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except PermissionError as error:
        raise AuthorityError(f"{path} {not_permitted(path)}") from error
    except (OSError, ValueError) as error:
        raise AuthorityError(f"{path}: no certificate ({type(error).__name__}); restore it from a backup") from error


def make_authority(pair: Pair, name: str) -> None:
    """Make the authority's key and its own certificate.

    Args:
      pair: where they are written.
      name: of the centre, for people.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject(f"hemafed authority of {name}")
    usage = x509.KeyUsage(**_usages("key_cert_sign", "crl_sign"))
    builder = (
        _builder(subject, subject, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    _write(pair, key, builder.sign(key, hashes.SHA384()))


def issue_server(authority: Pair, pair: Pair, hosts: Sequence[str], days: int = SERVER_DAYS) -> None:
    """Make a server's key and a certificate for its names, signed by the authority.

    Args:
      authority: who signs.
      pair: where they are written; replaced.
      hosts: DNS names and IP addresses that clients use, at least one.
      days: until it expires; negative makes an expired one.
    """
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    alternatives = x509.SubjectAlternativeName(names)
    _issue(authority, pair, hosts[0], days, ExtendedKeyUsageOID.SERVER_AUTH, alternatives)


def issue_signer(authority: Pair, pair: Pair, name: str, days: int = SERVER_DAYS) -> None:
    """Make the key with which a centre signs instructions, and its certificate, good for nothing else.

    Args:
      authority: who signs.
      pair: where they are written; replaced.
      name: of the centre, for people.
      days: until it expires.
    """
    _issue(authority, pair, f"hemafed instructions of {name}", days, ExtendedKeyUsageOID.CODE_SIGNING)


def _issue(
    authority: Pair,
    pair: Pair,
    name: str,
    days: int,
    use: x509.ObjectIdentifier,
    *extensions: x509.ExtensionType,
) -> None:
    """A key and a certificate for one use, signed by the authority."""
    authority_key, authority_certificate = authority.load()
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(**_usages("digital_signature"))
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = (
        _builder(_subject(name), authority_certificate.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(identifier, critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    _write(pair, key, builder.sign(authority_key, hashes.SHA384()))


def days_left(path: Path, now: datetime | None = None) -> float:
    """Days until a certificate expires; negative once it has."""
    return (read_certificate(path).not_valid_after_utc - (now or datetime.now(UTC))) / timedelta(days=1)


def expiry_warning(path: Path, remedy: str, now: datetime | None = None) -> str:
    """A sentence from a month before a certificate expires; empty before that."""
    left = days_left(path, now)
    if left > WARN_DAYS:
        return ""
    when = f"expired {-left:.0f} days ago" if left < 0 else f"expires in {left:.0f} days"
    return f"the certificate {path.name} {when} ({read_certificate(path).not_valid_after_utc:%Y-%m-%d}): {remedy}"


def fingerprint(path: Path) -> str:
    """SHA-256 of a certificate in hexadecimal, for two people to compare."""
    return read_certificate(path).fingerprint(hashes.SHA256()).hex()


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    """A host as certificates name it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    """Build the part that both kinds of certificate share."""
    now = datetime.now(UTC)
    begin = now - timedelta(hours=1) + min(timedelta(days=days), timedelta(0))  # clocks differ a little
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usages(*granted: str) -> dict[str, bool]:
    """x509.KeyUsage wants every use named."""
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return {use: use in granted for use in every}


def _write(pair: Pair, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Replace both files; the key is never readable by others, not for a moment."""
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(pair.key, encoded)
    pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read; written by root, it belongs to the owner of its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    if os.geteuid() == 0:
        folder = path.parent.stat()
        os.chown(partial, folder.st_uid, folder.st_gid)
    os.replace(partial, path)
