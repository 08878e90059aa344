"""Whether a hospital can take part: its data, key, the centre's authority, the connection and the clock, in seconds.

The connection takes the way that the node takes: the same HTTP library with the same settings, proxy variables included,
and the node's certificate. Nothing but the request of a page that does not exist goes to the centre.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.request import getproxies, proxy_bypass

import httpx
from cryptography import x509

from client.node.enrol import Centre, centre_context, read_known_centre
from shared.host.processes import LOOPBACK
from shared.site import Site
from shared.slices import CacheError, read_cache
from shared.wire.enrolment import REVOKED, UNKNOWN, EnrolError

CLOCK_S = 120.0  # Flower takes a node's signature for five minutes
TIMEOUT_S = 10.0
_LARGEST_ANSWER = 4096  # bytes


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
    if not authority.good:  # without it nobody could be told from the centre
        return [*findings, _key(centre), authority]
    try:
        trust, known = centre_context(centre), True
    except EnrolError:  # the key's own finding says why
        trust, known = ssl.create_default_context(cafile=str(centre.authority)), False
    return [*findings, _key(centre), authority, *_connection(centre, now, trust, known)]


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
        centre_context(centre)
        certificate = x509.load_pem_x509_certificate(centre.certificate.read_bytes())
        fingerprint = centre.fingerprint()
    except (EnrolError, OSError, ValueError) as error:
        return Finding("key", False, str(error))
    if certificate.not_valid_after_utc < datetime.now(UTC):
        text = f"the node's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; ask the centre for a new invitation"
        return Finding("key", False, text)
    return Finding("key", True, fingerprint)


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


def _connection(centre: Centre, now: Callable[[], datetime], trust: ssl.SSLContext, known: bool) -> list[Finding]:
    """Check whether the centre answers and lets this site in, and what its clock says.

    Args:
      centre: what the hospital knows of it.
      now: this machine's clock.
      trust: trusts the centre's authority alone.
      known: whether `trust` presents the node's certificate.
    """
    try:
        answer, days = _ask(centre, trust)
    except httpx.HTTPError as error:
        return [Finding("connection", False, _failure_text(centre, error))]
    if wrong := _refusal(centre, answer, known):
        return [Finding("connection", False, wrong)]
    soon = f"; its certificate expires in {days:.0f} days, tell the centre" if days < 30 else ""
    findings = [Finding("connection", True, f"{centre.address} answers{soon}")]
    if theirs := answer.headers.get("Date"):
        ahead = (now() - parsedate_to_datetime(theirs)).total_seconds()
        good = abs(ahead) <= CLOCK_S
        told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the centre's"
        remedy = (
            "" if good else "; set it (timedatectl set-ntp true): the centre refuses signatures that are not of now"
        )
        findings.append(Finding("clock", good, told + remedy))
    return findings


def _ask(centre: Centre, trust: ssl.SSLContext) -> tuple[httpx.Response, float]:
    """Request a page that does not exist, on the node's way.

    Returns:
      The answer, with the first bytes of its text, and the days until the centre's certificate expires.
    """
    # As flwr/supercore/protobuf/client.py makes its client; the daemon tells the node to reach this machine past any proxy.
    with httpx.Client(verify=trust, timeout=TIMEOUT_S, trust_env=centre.host not in LOOPBACK) as client:
        client.headers.clear()
        with client.stream("GET", f"https://{centre.address}/") as answer:
            certificate = answer.extensions["network_stream"].get_extra_info("ssl_object").getpeercert()
            text = b"".join(_first_bytes(answer))
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    return httpx.Response(answer.status_code, headers=dict(answer.headers), extensions={"text": text}), days


def _first_bytes(answer: httpx.Response) -> Iterator[bytes]:
    """Yield the beginning of an answer's text, whatever its length."""
    left = _LARGEST_ANSWER
    for part in answer.iter_raw(_LARGEST_ANSWER):
        yield part[:left]
        left -= len(part)
        if left <= 0:
            return


def _refusal(centre: Centre, answer: httpx.Response, known: bool) -> str:
    """Return why the door does not let this site in, from its answer; empty if it does."""
    text = answer.extensions["text"].decode(errors="replace")
    if answer.status_code == httpx.codes.NOT_FOUND:  # the page does not exist: the door let the request in
        return ""
    if answer.status_code != httpx.codes.FORBIDDEN:
        return (
            f"{centre.address} answers with status {answer.status_code}, expected 404: another service or a proxy is there"
            f"{_proxy_text(centre)}; check the address with the centre"
        )
    if not known:  # the key's own finding says why
        return ""
    if REVOKED in text:
        return f"{centre.address} has revoked this site's key; ask the centre, and answer a new invitation"
    if UNKNOWN in text:
        return (
            f"{centre.address} does not know this site's key: the centre has not registered the request yet, or it registered "
            "another one; ask the centre to compare the fingerprint above with 'hemafed-server sites'"
        )
    return (
        f"{centre.address} refuses the request and does not say that it is about the key: a proxy may be in between"
        f"{_proxy_text(centre)}; ask your IT"
    )


def _proxy_text(centre: Centre) -> str:
    """Return which proxy the way leads through, by the variables that the node follows too; empty if through none."""
    if centre.host in LOOPBACK or proxy_bypass(centre.host):
        return ""
    proxies = getproxies()
    name = next((kind for kind in ("https", "all") if proxies.get(kind)), "")
    if not name:
        return ""
    where = httpx.URL(proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}")
    return (
        f" ({name.upper()}_PROXY is set, and the node goes through {where.host}: it must let CONNECT to {centre.address} through "
        f"and not open TLS; or put {centre.host} into NO_PROXY)"
    )


def _failure_text(centre: Centre, error: httpx.HTTPError) -> str:
    """Return why there was no answer."""
    cause = _first_cause(error)
    if isinstance(error, httpx.ProxyError):
        return f"{centre.address} cannot be reached: the proxy refuses ({str(error)[:200]}){_proxy_text(centre)}"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _certificate_text(centre, cause) + _proxy_text(centre)
    return _unreachable_text(centre, cause) + _proxy_text(centre)


def _first_cause(error: BaseException) -> BaseException:
    """Return the operating system's or TLS's error behind one of httpx's; the error itself where there is none."""
    cause, seen = error, error
    while seen is not None:
        if isinstance(seen, OSError):
            cause = seen
        seen = seen.__cause__ or seen.__context__
    return cause


def _certificate_text(centre: Centre, error: ssl.SSLCertVerificationError) -> str:
    """Return why the centre's certificate is not accepted."""
    if "expired" in error.verify_message:
        return f"the certificate of {centre.address} has expired; the centre must run 'hemafed-server renew'"
    if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
        return f"the certificate of {centre.address} is for another name ({error.verify_message}); check the address with the centre"
    return (
        f"the certificate of {centre.address} is not signed by the centre's authority ({error.verify_message}): it is another server, "
        "something in between reads the traffic, or the centre has a new authority; ask the centre, and do not go on without an answer"
    )


def _unreachable_text(centre: Centre, error: BaseException) -> str:
    """Return why no connection was made."""
    if isinstance(error, socket.gaierror):
        return f"there is no host {centre.host!r} ({error.strerror}); check the name and the DNS"
    if isinstance(error, ConnectionRefusedError):
        return f"{centre.address} refuses connections: the centre is down, or the port is another; ask the centre"
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"{centre.address} does not answer within 10 s: ask your IT whether the firewall lets outgoing TCP to that port through"
    if isinstance(error, ssl.SSLError):
        return f"{centre.address} does not speak TLS ({error.reason}): another service is there; check the port with the centre"
    return f"{centre.address} cannot be reached ({type(error).__name__}: {error}); check network and firewall"
