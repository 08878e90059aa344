"""Whether a hospital can take part: its data, key, the centre's authority, the connection and the clock, in seconds.

Nothing but the request of a page that does not exist goes to the centre.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cryptography import x509

from client.enrol import Centre, read_known_centre, read_node_key
from shared.enrol import EnrolError
from shared.site import Site
from shared.slices import CacheError, read_cache

CLOCK_S = 120.0  # Flower takes a node's signature for five minutes


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
      what: data, key, certificate authority, connection, clock.
      good: whether it is as it should be.
      text: what was found; of a fault also the next step.
    """

    what: str
    good: bool
    text: str


def check_ready(site: Site, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[Finding]:
    """Look at everything that a hospital needs to take part, in seconds; all of it, whatever fails."""
    findings = [_data(site)]
    try:
        centre = read_known_centre(site)
    except EnrolError as error:
        return [*findings, Finding("centre", False, str(error))]
    authority = _authority(centre)
    # Without the authority nobody could be told from the centre.
    connection = _connection(centre, now) if authority.good else []
    return [*findings, _key(centre), authority, *connection]


def _data(site: Site) -> Finding:
    """A fast form of `hemafed-client check`: what ingest left."""
    try:
        cache = read_cache(site.cache)
    except CacheError as error:
        return Finding("data", False, f"{error}")
    split = "train" if site.role == "train" else "test"
    rows = len(cache.rows(split)) if site.role == "train" else len(cache.label)
    if rows < 2:
        return Finding(
            "data",
            False,
            f"{rows} slices to {split} on; run 'hemafed-client check' and see what was left out",
        )
    return Finding("data", True, f"{rows} slices to {split} on")


def _key(centre: Centre) -> Finding:
    try:
        read_node_key(centre)
    except EnrolError as error:
        return Finding("key", False, str(error))
    return Finding("key", True, centre.fingerprint())


def _authority(centre: Centre) -> Finding:
    try:
        certificate = x509.load_pem_x509_certificate(centre.authority.read_bytes())
    except (OSError, ValueError) as error:
        text = (
            f"{centre.authority}: no certificate ({type(error).__name__}); restore it from the invitation or a backup"
        )
        return Finding("authority", False, text)
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    if left < 0:
        text = f"the centre's authority expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the centre for a new invitation"
        return Finding("authority", False, text)
    return Finding("authority", True, f"of the centre, good for {left} days")


def _connection(centre: Centre, now: Callable[[], datetime]) -> list[Finding]:
    """Whether the centre answers, and what its clock says."""
    try:
        context = ssl.create_default_context(cafile=str(centre.authority))
        connection = http.client.HTTPSConnection(centre.host, centre.port, timeout=10, context=context)
        connection.request("GET", "/")
        days = _days_left(connection)  # before the answer, after which the centre may close
        answer = connection.getresponse()
        theirs = answer.headers["Date"]
        connection.close()
    except ssl.SSLCertVerificationError as error:
        return [Finding("connection", False, _certificate_text(centre, error))]
    except (OSError, http.client.HTTPException, ssl.SSLError) as error:
        return [Finding("connection", False, _unreachable_text(centre, error))]
    soon = f"; its certificate expires in {days:.0f} days, tell the centre" if days < 30 else ""
    findings = [Finding("connection", True, f"{centre.address} answers{soon}")]
    if theirs:
        ahead = (now() - parsedate_to_datetime(theirs)).total_seconds()
        good = abs(ahead) <= CLOCK_S
        told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the centre's"
        remedy = (
            "" if good else "; set it (timedatectl set-ntp true): the centre refuses signatures that are not of now"
        )
        findings.append(Finding("clock", good, told + remedy))
    return findings


def _days_left(connection: http.client.HTTPSConnection) -> float:
    """Days until the centre's certificate expires."""
    certificate = connection.sock.getpeercert()
    return (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400


def _certificate_text(centre: Centre, error: ssl.SSLCertVerificationError) -> str:
    """Why the centre's certificate is not taken."""
    if "expired" in error.verify_message:
        return f"the certificate of {centre.address} has expired; the centre must run 'hemafed-server renew'"
    if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
        return f"the certificate of {centre.address} is for another name ({error.verify_message}); check the address with the centre"
    return (
        f"the certificate of {centre.address} is not signed by the centre's authority ({error.verify_message}): it is another server, "
        "something in between reads the traffic, or the centre has a new authority; ask the centre, and do not go on without an answer"
    )


def _unreachable_text(centre: Centre, error: Exception) -> str:
    """Why there was no answer."""
    if isinstance(error, socket.gaierror):
        return f"there is no host {centre.host!r} ({error.strerror}); check the name and the DNS"
    if isinstance(error, ConnectionRefusedError):
        return f"{centre.address} refuses connections: the centre is down, or the port is another; ask the centre"
    if isinstance(error, TimeoutError):
        return f"{centre.address} does not answer within 10 s: ask your IT whether the firewall lets outgoing TCP to that port through"
    if isinstance(error, ssl.SSLError):
        return f"{centre.address} does not speak TLS ({error.reason}): another service is there; check the port with the centre"
    return f"{centre.address} cannot be reached ({type(error).__name__}: {error}); check network and firewall"
