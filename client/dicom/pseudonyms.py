"""Hashes in place of what names a patient, a study, a series, an image or a file."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pseudonyms:
    """Makes pseudonyms with a hospital's key, which is opened once and stays in this object.

    Attributes:
      key: the hospital's secret of 32 bytes. Never written, never sent.
    """

    key: bytes = field(repr=False)

    def of(self, kind: str, identifier: str) -> str:
        """Keyed hash of an identifier, 16 hexadecimal digits; not to be undone without the hospital's key."""
        return hmac.digest(self.key, f"{kind}/{identifier}".encode(), "sha256").hex()[:16]

    def of_key(self) -> str:
        """Return a hash of the key itself, which identifies whose pseudonyms these are."""
        return self.of("key", "")
