"""Signed instructions: a hospital answers only what its own centre asked it, once.

Flower checks which node calls, not who wrote a message: another hospital, or whatever stands in front of the centre, could
put an instruction there. The server's part of a run therefore signs every instruction with a key whose certificate the
centre's authority issued for nothing else; the hospital knows the authority from its invitation. The signature covers the
site, the run, the run config, the kind of message, every record by its hash, a time and a random number, so that an
instruction cannot be altered, sent to another site, moved to another run, carried out under another config or sent twice.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.app import ConfigRecord, Message, RecordDict

from shared.errors import HemafedError

RECORD = "signature"  # the record of an instruction that holds its signature
LONGEST_S = 13 * 3600.0  # Flower keeps a message for twelve hours
AHEAD_S = 600.0  # how far the centre's clock may be ahead of the hospital's
_KEYS = {"signature", "certificate", "issued", "nonce", "config"}
_MOST_BYTES = 8192  # of a certificate or a signature


class InstructionError(HemafedError, ValueError):
    """An instruction is not one of the centre's to this site; the text is for the hospital's own log."""


class RepeatedError(InstructionError):
    """An instruction was answered before."""


@dataclass(frozen=True)
class Signer:
    """The centre's key for instructions.

    Attributes:
      key: private, P-384.
      certificate: of that key, issued by the centre's authority for code signing.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def sign(self, message: Message, site: str, config: str) -> None:
        """Add the signature record to a message that is about to be sent to a site.

        Args:
          message: the instruction.
          site: whom it is for.
          config: digest of the run config (shared/config.py).
        """
        issued, nonce = time.time(), secrets.token_hex(16)
        signed = _signed_bytes(message, site, config, issued, nonce)
        record = ConfigRecord(
            {
                "signature": self.key.sign(signed, ec.ECDSA(hashes.SHA384())),
                "certificate": self.certificate.public_bytes(Encoding.DER),
                "issued": issued,
                "nonce": nonce,
                "config": config,
            }
        )
        message.content = RecordDict({**message.content, RECORD: record})


def _signed_bytes(message: Message, site: str, config: str, issued: float, nonce: str) -> bytes:
    """Return the bytes to sign. Records are named by Flower's object ids, SHA-256 over their content."""
    records = sorted((name, record.object_id) for name, record in message.content.items() if name != RECORD)
    metadata = message.metadata
    return json.dumps(
        ["hemafed instruction 2", site, metadata.run_id, config, metadata.message_type, issued, nonce, records]
    ).encode()


def open_instruction(
    message: Message,
    authority: x509.Certificate,
    site: str,
    first_time: Callable[[str, float], bool],
    now: float | None = None,
) -> tuple[Message, str]:
    """Check an instruction and take the signature record out of it.

    Args:
      message: as it arrived.
      authority: the certificate that the invitation brought.
      site: this site's name.
      first_time: takes the instruction's random number and the time until which it must be remembered; returns whether it is new.
      now: the hospital's time, seconds since 1970; by default the clock's.
    Returns:
      The message without the signature record, and the digest of the run config under which it was signed: the caller
      compares it with the run config that came with the message.
    Raises:
      InstructionError: no signature, not the centre's, for another site or run, altered, too old, from the future.
      RepeatedError: it was answered before.
    """
    record = message.content.get(RECORD) if message.has_content() else None
    if not isinstance(record, ConfigRecord) or record.keys() != _KEYS:
        raise InstructionError("an instruction without a signature")
    signature, encoded, issued, nonce, config = (
        record[key] for key in ("signature", "certificate", "issued", "nonce", "config")
    )
    if not (isinstance(signature, bytes) and isinstance(encoded, bytes) and isinstance(issued, float)):
        raise InstructionError("an instruction whose signature record has values of other types")
    if not (isinstance(nonce, str) and isinstance(config, str) and (len(nonce), len(config)) == (32, 64)):
        raise InstructionError("an instruction whose signature record has texts of other lengths")
    if max(len(signature), len(encoded)) > _MOST_BYTES:
        raise InstructionError("an instruction whose signature record has values of other sizes")
    _check_signature(_certificate(encoded, authority), signature, _signed_bytes(message, site, config, issued, nonce))
    age_s = (time.time() if now is None else now) - issued
    if not -AHEAD_S <= age_s <= LONGEST_S:
        raise InstructionError(f"an instruction of {age_s:.0f} s ago, expected {-AHEAD_S:.0f} to {LONGEST_S:.0f}")
    if not first_time(nonce, issued + LONGEST_S):
        raise RepeatedError("an instruction that was answered before")
    message.content = RecordDict({name: value for name, value in message.content.items() if name != RECORD})
    return message, config


def _check_signature(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes) -> None:
    try:
        key.verify(signature, signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as error:
        raise InstructionError("an instruction that was altered, or is for another site or run") from error


def _certificate(encoded: bytes, authority: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The key of a certificate that the authority issued for instructions."""
    try:
        certificate = x509.load_der_x509_certificate(encoded)
        certificate.verify_directly_issued_by(authority)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise InstructionError("an instruction signed by a key that the centre's authority did not issue") from error
    if list(usage) != [ExtendedKeyUsageOID.CODE_SIGNING] or not isinstance(key, ec.EllipticCurvePublicKey):
        raise InstructionError("an instruction signed by a key of the centre that is not for instructions")
    moment = time.time()
    if not certificate.not_valid_before_utc.timestamp() <= moment <= certificate.not_valid_after_utc.timestamp():
        raise InstructionError(
            "an instruction signed under a certificate that has expired; the centre must run 'hemafed-server renew'"
        )
    return key
