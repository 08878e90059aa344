"""The coordinating centre's folder: what it is called, whom it invited, whom it knows.

    centre.toml           name, host and port that hospitals use, the loopback port of Flower's SuperLink
    keys/                 authority, the public server's and the loopback server's certificates, SuperExec's secret
    sites/NAME.json       one file per hospital: invited, registered or revoked, and since when
    flower/               Flower's home: connection and app bundles
    state/                what the running centre writes: its processes, their logs, the run that is wanted
    runs/                 results

All of the centre is in this folder; a backup of it is a backup of the centre.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tomli_w

from server.authority import LOOPBACK, Pair, expiry_warning, issue_server, make_authority, write_private
from server.files import replace_text
from shared.enrol import Invitation, Request, check_request, key_fingerprint
from shared.site import is_site_name

INVITATION_DAYS = 14
_NOT_IN_FOLDER = '"$\\\n'
CONNECTION = "centre"  # the name of the centre's SuperLink in Flower's own config


class CentreError(ValueError):
    """The centre cannot do what was asked; names the thing and the next step."""


@dataclass(frozen=True)
class Centre:
    """A coordinating centre.

    Attributes:
      folder: everything of it, absolute.
      host, port: by which hospitals reach it; the only port that is open to them.
      listen: address that the public port is bound to.
      loopback_port: of Flower's SuperLink, on 127.0.0.1 only.
    """

    folder: Path
    host: str
    port: int = 443
    listen: str = "0.0.0.0"
    loopback_port: int = 8443

    @property
    def authority(self) -> Pair:
        """Who signs."""
        return self._pair("authority")

    @property
    def public(self) -> Pair:
        """What hospitals see."""
        return self._pair("public")

    @property
    def loopback(self) -> Pair:
        """What the proxy and the centre's own commands see; Flower's node keys ask for TLS here too."""
        return self._pair("loopback")

    @property
    def secret(self) -> Path:
        """What a SuperExec must know to run the server's part of a run."""
        return self.folder / "keys" / "superexec.secret"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of the centre's processes."""
        return self.folder / "flower"

    @property
    def state(self) -> Path:
        """What the running centre writes."""
        return self.folder / "state"

    @property
    def runs(self) -> Path:
        """Where runs are kept."""
        return self.folder / "runs"

    def _pair(self, name: str) -> Pair:
        return Pair(self.folder / "keys" / f"{name}.key", self.folder / "keys" / f"{name}.crt")


@dataclass(frozen=True)
class KnownSite:
    """A hospital as the centre knows it.

    Attributes:
      site: its public name.
      status: invited, registered or revoked.
      since: of that, ISO 8601, UTC.
      token_hash: of the invitation's token, until it is used.
      expires: of the invitation.
      public_key: OpenSSH; empty until it is registered.
      revoked_keys: those that it had before; never taken again.
    """

    site: str
    status: str
    since: str
    token_hash: str = ""
    expires: str = ""
    public_key: str = ""
    revoked_keys: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of its key."""
        return key_fingerprint(self.public_key) if self.public_key else ""


def init_centre(centre: Centre) -> None:
    """Make a centre's folder: authority, certificates, secret and config.

    Raises:
      CentreError: there is one already, or no centre can be so.
    """
    path = centre.folder / "centre.toml"
    if path.exists():
        raise CentreError(
            f"{path} exists; 'hemafed-server renew' makes new server certificates, another centre needs another folder"
        )
    _check(centre)
    for folder in (centre.folder / "keys", centre.folder / "sites", centre.flower, centre.state, centre.runs):
        folder.mkdir(parents=True, exist_ok=True)
    (centre.folder / "keys").chmod(0o700)
    make_authority(centre.authority, centre.host)
    renew_certificates(centre)
    write_private(centre.secret, secrets.token_bytes(32))
    (centre.flower / "config.toml").write_text(tomli_w.dumps(_connection(centre)))
    path.write_text(tomli_w.dumps({key: value for key, value in asdict(centre).items() if key != "folder"}))


def renew_certificates(centre: Centre) -> None:
    """New server keys and certificates; hospitals trust the authority and need nothing new."""
    issue_server(centre.authority, centre.public, [centre.host])
    issue_server(centre.authority, centre.loopback, LOOPBACK)


def _connection(centre: Centre) -> dict:
    """Flower's config.toml: where `flwr run` finds the SuperLink."""
    link = {
        "address": f"127.0.0.1:{centre.loopback_port}",
        "root-certificates": str(centre.authority.certificate.absolute()),
    }
    return {"superlink": {"default": CONNECTION, CONNECTION: link}}


def read_centre(folder: Path) -> Centre:
    """A centre's config.

    Raises:
      CentreError: the folder is no centre, or its config is damaged.
    """
    path = folder / "centre.toml"
    if not path.is_file():
        raise CentreError(
            f"{folder} is no centre: it has no centre.toml; 'hemafed-server init {folder} --host NAME' makes one"
        )
    try:
        centre = Centre(folder=folder.absolute(), **tomllib.loads(path.read_text()))
        _check(centre)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, CentreError) as error:
        raise CentreError(f"{path}: {error}; expected host, port, listen, loopback_port") from error
    return centre


def _check(centre: Centre) -> None:
    """Refuse what could not be served.

    Raises:
      CentreError: names the value.
    """
    if strange := set(str(centre.folder)) & set(_NOT_IN_FOLDER):
        raise CentreError(
            f"the centre's folder {str(centre.folder)!r} has {sorted(strange)}, which nginx reads otherwise"
        )
    for name in ("host", "listen"):
        text = getattr(centre, name)
        if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9.:*_\[\]-]+", text):
            raise CentreError(f"{name} is {text!r}, expected a name or an address")
    for name in ("port", "loopback_port"):
        port = getattr(centre, name)
        if type(port) is not int or not 1 <= port <= 65535:
            raise CentreError(f"{name} is {port!r}, expected a whole number from 1 to 65535")
    if centre.port == centre.loopback_port:
        raise CentreError(
            f"port and loopback_port are both {centre.port}; hospitals and Flower's own processes need one each"
        )


def invite(centre: Centre, site: str, days: int = INVITATION_DAYS) -> Invitation:
    """Invite a hospital; a second invitation replaces the first.

    Raises:
      CentreError: the name cannot be one, or is registered.
    """
    if not is_site_name(site):
        raise CentreError(f"site name {site!r}, expected up to 64 letters, digits, '-', '_' or '.'")
    known = read_sites(centre).get(site)
    if known is not None and known.status == "registered":
        raise CentreError(
            f"site {site!r} is registered since {known.since}; to give it a new key, 'hemafed-server revoke' it first"
        )
    token, expires = secrets.token_urlsafe(24), datetime.now(UTC) + timedelta(days=days)
    until = expires.isoformat(timespec="seconds")
    revoked = () if known is None else tuple(key for key in (*known.revoked_keys, known.public_key) if key)
    _write_site(centre, KnownSite(site, "invited", _now(), _token_hash(token), until, revoked_keys=revoked))
    return Invitation(
        site=site,
        address=f"{centre.host}:{centre.port}",
        authority=centre.authority.certificate.read_text(),
        token=token,
        expires=until,
    )


def register(centre: Centre, request: Request) -> KnownSite:
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
                "of its own, and a revoked one is not used again: the site runs 'hemafed-client init' anew"
            )
    if known.status != "invited":
        raise CentreError(f"site {request.site!r} is {known.status} since {known.since}; invite it again")
    if not hmac.compare_digest(known.token_hash, _token_hash(request.token)):
        raise CentreError(
            f"the request of site {request.site!r} answers another invitation than the last; invite it again"
        )
    if datetime.fromisoformat(known.expires) < datetime.now(UTC):
        raise CentreError(f"the invitation of site {request.site!r} expired on {known.expires}; invite it again")
    taken = KnownSite(
        request.site, "registered", _now(), public_key=request.public_key, revoked_keys=known.revoked_keys
    )
    _write_site(centre, taken)
    return taken


def revoke(centre: Centre, site: str) -> KnownSite:
    """Forget a hospital's key, for good.

    Raises:
      CentreError: it is not known.
    """
    known = read_sites(centre).get(site)
    if known is None:
        raise CentreError(f"site {site!r} is not known; 'hemafed-server sites' lists who is")
    gone = replace(known, status="revoked", since=_now(), token_hash="", expires="")
    _write_site(centre, gone)
    return gone


def read_sites(centre: Centre) -> dict[str, KnownSite]:
    """Name -> site, of all that were ever invited.

    Raises:
      CentreError: a file is damaged.
    """
    sites = {}
    for path in sorted((centre.folder / "sites").glob("*.json")):
        try:
            content = json.loads(path.read_text())
            content["revoked_keys"] = tuple(content.get("revoked_keys", ()))
            sites[path.stem] = KnownSite(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise CentreError(
                f"{path} is damaged ({error}); restore it from a backup, or delete it and invite anew"
            ) from error
    return sites


def read_nodes(centre: Centre) -> dict[str, str]:
    """Site -> number of its node in the running SuperLink; empty before it runs."""
    path = centre.state / "nodes.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_nodes(centre: Centre, nodes: dict[str, str]) -> None:
    """The inverse of read_nodes."""
    replace_text(centre.state / "nodes.json", json.dumps(nodes, indent=2) + "\n")


def _write_site(centre: Centre, site: KnownSite) -> None:
    """Replace a site's file."""
    replace_text(centre.folder / "sites" / f"{site.site}.json", json.dumps(asdict(site), indent=2) + "\n")


def _token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def expiry_warnings(centre: Centre) -> list[str]:
    """Sentences about certificates that expire within a month."""
    renew = f"'hemafed-server renew {centre.folder}' makes new ones; hospitals need nothing new"
    anew = "the authority itself ends: every hospital must be invited anew (see RUNBOOK.md, Rotation)"
    checks = ((centre.public, renew), (centre.loopback, renew), (centre.authority, anew))
    return [text for pair, remedy in checks if (text := expiry_warning(pair.certificate, remedy))]
