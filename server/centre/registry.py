"""The hospitals that a centre knows: invited, registered with their keys, or revoked; a file each in sites/."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from server.centre.config import Centre, CentreError, read_centre
from shared.config import NAME_WORDS, is_name
from shared.host.files import replace_text
from shared.wire.enrolment import Invitation, Request, check_request, key_fingerprint, write_letter

INVITATION_DAYS = 14


@dataclass(frozen=True)
class RegisteredSite:
    """A hospital as the centre knows it.

    Attributes:
      site: its public name.
      status: invited, registered or revoked.
      since: of that, ISO 8601, UTC.
      token_hash: of the invitation's token, until it is used.
      expires: of the invitation.
      public_key: OpenSSH; empty until it is registered.
      certificate: of that key, PEM; the door lets its owner in while the site is registered.
      revoked_keys: those that it had before; never taken again.
    """

    site: str
    status: str
    since: str
    token_hash: str = ""
    expires: str = ""
    public_key: str = ""
    certificate: str = ""
    revoked_keys: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of its key."""
        return key_fingerprint(self.public_key) if self.public_key else ""


def invite(centre: Centre, site: str, days: int = INVITATION_DAYS) -> Invitation:
    """Invite a hospital, by a file at `invitation_path`; a second invitation replaces the first.

    Raises:
      CentreError: the name cannot be one, or is registered.
    """
    if not is_name(site):
        raise CentreError(f"site name {site!r}, expected {NAME_WORDS}")
    known = read_sites(centre).get(site)
    if known is not None and known.status == "registered":
        raise CentreError(
            f"site {site!r} is registered since {known.since}; to give it a new key, 'hemafed-server revoke' it first"
        )
    token, expires = secrets.token_urlsafe(24), datetime.now(UTC) + timedelta(days=days)
    until = expires.isoformat(timespec="seconds")
    revoked = () if known is None else tuple(key for key in (*known.revoked_keys, known.public_key) if key)
    invitation = Invitation(
        site=site,
        address=f"{centre.host}:{centre.port}",
        authority=centre.authority.certificate.read_text(),
        token=token,
        expires=until,
    )
    write_letter(
        invitation_path(centre, site), invitation
    )  # first: where it cannot be written, the one before stays good
    _write_site(centre, RegisteredSite(site, "invited", _now(), _token_hash(token), until, revoked_keys=revoked))
    return invitation


def invitation_path(centre: Centre, site: str) -> Path:
    """Path of a hospital's last invitation."""
    return centre.folder / "invitations" / f"{site}.json"


def register(centre: Centre, request: Request) -> RegisteredSite:
    """Take a hospital's key.

    Raises:
      EnrolError: the request was changed, or its sender does not have the key.
      CentreError: nobody was invited under that name, the invitation is used, over or another's, or the key is known.
    """
    check_request(request)
    sites = read_sites(centre)
    known = sites.get(request.site)
    if known is None:
        raise CentreError(f"site {request.site!r} was not invited; 'hemafed-server invite' does that")
    for other in sites.values():
        if request.public_key in (other.public_key, *other.revoked_keys):
            how = f"{other.status} since {other.since}" if request.public_key == other.public_key else "revoked"
            raise CentreError(
                f"the key of this request is that of site {other.site!r} ({how}); each site has a key "
                "of its own, and a revoked one is not used again: the site runs 'hemafed-client init' again"
            )
    if known.status != "invited":
        raise CentreError(f"site {request.site!r} is {known.status} since {known.since}; invite it again")
    if not hmac.compare_digest(known.token_hash, _token_hash(request.token)):
        raise CentreError(
            f"the request of site {request.site!r} answers another invitation than the last; invite it again"
        )
    if datetime.fromisoformat(known.expires) < datetime.now(UTC):
        raise CentreError(f"the invitation of site {request.site!r} expired on {known.expires}; invite it again")
    taken = RegisteredSite(
        request.site,
        "registered",
        _now(),
        public_key=request.public_key,
        certificate=request.certificate,
        revoked_keys=known.revoked_keys,
    )
    _write_site(centre, taken)
    return taken


def revoke(centre: Centre, site: str) -> RegisteredSite:
    """Forget a hospital's key, for good.

    Raises:
      CentreError: it is not known.
    """
    known = read_sites(centre).get(site)
    if known is None:
        raise CentreError(f"site {site!r} is not known; 'hemafed-server sites' lists who is")
    if known.status == "revoked":
        raise CentreError(f"site {site!r} is revoked since {known.since} already")
    gone = replace(known, status="revoked", since=_now(), token_hash="", expires="")
    _write_site(centre, gone)
    return gone


def read_sites(centre: Centre) -> dict[str, RegisteredSite]:
    """Name -> site, of all that were ever invited.

    Raises:
      CentreError: a file is damaged.
    """
    sites = {}
    for path in sorted((centre.folder / "sites").glob("*.json")):
        try:
            content = json.loads(path.read_text())
            content["revoked_keys"] = tuple(content.get("revoked_keys", ()))
            sites[path.stem] = RegisteredSite(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise CentreError(
                f"{path} is damaged ({error}); restore it from a backup, or delete it and invite again"
            ) from error
    return sites


def read_nodes(centre: Centre) -> dict[str, str]:
    """Site -> number of its node in the running SuperLink; empty before it runs."""
    path = centre.state / "nodes.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def registered_nodes(folder: Path) -> dict[int, str]:
    """Number of a node -> the site that it was registered as, for a run; empty where `folder` is no centre, as in a simulation."""
    if not (folder / "centre.toml").is_file():
        return {}
    return {int(number): site for site, number in read_nodes(read_centre(folder)).items()}


def write_nodes(centre: Centre, nodes: dict[str, str]) -> None:
    """The inverse of read_nodes."""
    replace_text(centre.state / "nodes.json", json.dumps(nodes, indent=2) + "\n")


def _write_site(centre: Centre, site: RegisteredSite) -> None:
    """Replace a site's file."""
    replace_text(centre.folder / "sites" / f"{site.site}.json", json.dumps(asdict(site), indent=2) + "\n")


def _token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
