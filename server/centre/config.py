"""The coordinating centre's folder: what it is called, where it serves, its certificates.

    centre.toml           name, host and port that hospitals use, the loopback port of Flower's SuperLink
    keys/                 authority; certificates of the public and the loopback server and for instructions; SuperExec's secret
    sites/NAME.json       one file per hospital: invited, registered or revoked, and since when
    flower/               Flower's home: connection and app bundles
    state/                what the running centre writes: its processes, their logs, the requested run
    runs/                 results

All of the centre is in this folder; a backup of it is a backup of the centre.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from server.centre.authority import (
    LOOPBACK,
    Pair,
    expiry_warning,
    issue_server,
    issue_signer,
    make_authority,
    write_private,
)
from shared.errors import HemafedError

_NOT_IN_FOLDER = '"$\\\n'
_KEYS = {"host", "port", "listen", "loopback_port", "largest_reply_mb"}
CONNECTION = "centre"  # the name of the centre's SuperLink in Flower's own config


class CentreError(HemafedError, ValueError):
    """The centre cannot do what was asked; names the thing and the next step."""


@dataclass(frozen=True)
class Centre:
    """A coordinating centre.

    Attributes:
      folder: everything of it, absolute.
      host, port: by which hospitals reach it; the only port that is open to them.
      listen: address that the public port is bound to.
      loopback_port: of Flower's SuperLink, on 127.0.0.1 only.
      largest_reply_mb: a hospital's reply to one instruction may have so many megabytes; tensors of the largest model have
        113.
    """

    folder: Path
    host: str
    port: int = 443
    listen: str = "0.0.0.0"
    loopback_port: int = 8443
    largest_reply_mb: int = 250

    @property
    def authority(self) -> Pair:
        """Path of the authority's files."""
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
    def instructions(self) -> Pair:
        """With what the server's part of a run signs what it asks of hospitals."""
        return self._pair("instructions")

    @property
    def secret(self) -> Path:
        """Environment of a SuperExec that runs the server's part of a run."""
        return self.folder / "keys" / "superexec.secret"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of the centre's processes."""
        return self.folder / "flower"

    @property
    def state(self) -> Path:
        """Folder for the running centre's own files."""
        return self.folder / "state"

    @property
    def runs(self) -> Path:
        """Folder of runs."""
        return self.folder / "runs"

    def _pair(self, name: str) -> Pair:
        return Pair(self.folder / "keys" / f"{name}.key", self.folder / "keys" / f"{name}.crt")


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
    issue_signer(centre.authority, centre.instructions, centre.host)


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
        values = tomllib.loads(path.read_text())
        if unknown := values.keys() - _KEYS:
            raise CentreError(f"unknown key {sorted(unknown)[0]!r}")
        centre = Centre(folder=folder.absolute(), **values)
        _check(centre)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, CentreError) as error:
        raise CentreError(f"{path}: {error}; expected {', '.join(sorted(_KEYS))}") from error
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
    if not isinstance(centre.host, str) or not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", centre.host):
        raise CentreError(
            f"host is {centre.host!r}, expected a DNS name or an IPv4 address alone; the port has an option of its own (--port)"
        )
    try:
        ipaddress.IPv4Address(centre.listen)
    except ValueError as error:
        raise CentreError(
            f"listen is {centre.listen!r}, expected an IPv4 address of this machine, or 0.0.0.0 for all"
        ) from error
    for name in ("port", "loopback_port"):
        port = getattr(centre, name)
        if type(port) is not int or not 1 <= port <= 65535:
            raise CentreError(f"{name} is {port!r}, expected a whole number from 1 to 65535")
    if type(centre.largest_reply_mb) is not int or not 1 <= centre.largest_reply_mb <= 100_000:
        raise CentreError(f"largest_reply_mb is {centre.largest_reply_mb!r}, expected a whole number from 1 to 100000")
    if centre.port == centre.loopback_port:
        raise CentreError(
            f"port and loopback_port are both {centre.port}; hospitals and Flower's own processes need one each"
        )


def expiry_warnings(centre: Centre) -> list[str]:
    """Sentences about certificates that expire within a month."""
    renew = f"'hemafed-server renew {centre.folder}' makes new ones; hospitals need nothing new"
    invite = "the authority itself ends: every hospital must be invited again (see RUNBOOK.md, Rotation)"
    ours = (centre.public, centre.loopback, centre.instructions)
    checks = (*((pair, renew) for pair in ours), (centre.authority, invite))
    return [text for pair, remedy in checks if (text := expiry_warning(pair.certificate, remedy))]
