"""How a hospital and the centre come to know each other: two small files, carried by hand or mail.

    hemafed-server invite      -> invitation: the centre's address and authority, a token      (to the hospital)
    hemafed-client init        -> request: the hospital's public key, signed with its private one  (to the centre)
    hemafed-server register    -> the centre knows the key; both read its fingerprint to each other

The private key never leaves the hospital. The token shows that who answers is who was invited, the signature that the
sender has the key. Both files are JSON; neither holds anything of a patient.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

FORMAT = 1


class EnrolError(ValueError):
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
      signature: of the three, with the node's private key; base64.
    """

    site: str
    token: str
    public_key: str
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


def make_request(invitation: Invitation, key: ec.EllipticCurvePrivateKey) -> Request:
    """A hospital's answer to its invitation."""
    public = public_text(key.public_key())
    signature = key.sign(_signed(invitation.site, invitation.token, public), ec.ECDSA(hashes.SHA384()))
    return Request(invitation.site, invitation.token, public, base64.b64encode(signature).decode())


def check_request(request: Request) -> None:
    """That who sent a request has the private key of its public one.

    Raises:
      EnrolError: the key is none of ours, or the signature is not its.
    """
    try:
        key = serialization.load_ssh_public_key(request.public_key.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise EnrolError(f"the request's key is a {type(key).__name__}, expected an elliptic curve key")
        if public_text(key) != request.public_key:  # a comment, say: one key must not look like two
            raise ValueError("not as make_request writes it")
        signed = _signed(request.site, request.token, request.public_key)
        key.verify(base64.b64decode(request.signature), signed, ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        if isinstance(error, EnrolError):
            raise
        raise EnrolError(
            f"the request of site {request.site!r} was changed on its way, or its sender does not have the key; ask the site for "
            "the file again"
        ) from error


def _signed(site: str, token: str, public_key: str) -> bytes:
    return json.dumps([FORMAT, site, token, public_key]).encode()
