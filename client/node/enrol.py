"""The hospital's side of becoming known: its own key, and what it knows of the centre.

Everything lies in `centre/` of the site's state folder: the node's private key, which never leaves it, the certificate of
that key, the centre's address and its certificate authority. Only the request of `hemafed-client init` is sent, by hand or
mail; the certificate is part of it, and the node presents it to the centre in each TLS handshake.
"""

from __future__ import annotations

import json
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.config import NAME_WORDS, is_name
from shared.host.rights import not_permitted
from shared.site import Site, read_site
from shared.wire.enrolment import (
    EnrolError,
    Invitation,
    Request,
    key_fingerprint,
    make_certificate,
    make_node_key,
    make_request,
    private_text,
    public_text,
    read_letter,
    write_letter,
)

_TEMPLATE = """\
# What {site} says about itself; it belongs to the hospital, and nothing that the centre sends changes it.
site: "{site}"
data:
  images: dicom/            # searched recursively; file names mean nothing
  # masks: masks/           # DICOM SEG or RTSTRUCT, SERIES_UID.nii.gz, SOP_UID.png
  # labels: labels.csv      # series_uid, sop_uid or slice_index, hypodensity: 1, 0 or blank for unknown
cache: cache/               # written by ingest, safe to delete
state: state/               # keys and local heads; back it up
role: train                 # train | held-out | development
policy:
  release: [encoder]        # tensor groups that may leave: encoder, cls, seg, rec
  metrics: true             # whether losses and counts may leave
  min_patients: 10          # no number leaves that stands for fewer
  # accept: {{train.epochs: {{max: 5}}}}
  # hours: "19:00-06:30"
  # evaluations_per_month: 24    # how many models of runs may be tested here in 30 days; null for no limit
  # round_counts_per_month: 400  # with how many rounds of 30 days counts and losses leave; the others train without
"""


@dataclass(frozen=True)
class Centre:
    """The hospital's record of its coordinating centre.

    Attributes:
      folder: `centre/` of the site's state folder.
      address: "host:port".
      site: the name that was invited and registered.
    """

    folder: Path
    address: str
    site: str

    @property
    def authority(self) -> Path:
        """The only certificate authority that the hospital trusts for the centre."""
        return self.folder / "authority.crt"

    @property
    def key(self) -> Path:
        """The node's private key."""
        return self.folder / "node.key"

    @property
    def certificate(self) -> Path:
        """The certificate of that key, which the node presents to the centre's door."""
        return self.folder / "node.crt"

    @property
    def host(self) -> str:
        """Host name of the centre."""
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        """Port of the centre."""
        return int(self.address.rpartition(":")[2])

    def fingerprint(self) -> str:
        """Of the node's key."""
        return key_fingerprint(public_text(read_node_key(self).public_key()))


def init_site(invitation_path: Path, site_yaml: Path, request_path: Path) -> tuple[Centre, bool]:
    """Answer an invitation: make the node's key and write the request.

    Args:
      invitation_path: from the centre.
      site_yaml: the hospital's file; written with its defaults where there is none.
      request_path: where the request is written.
    Returns:
      What is now known of the centre, and whether site.yaml was written.
    Raises:
      EnrolError: the invitation is over, or of another site; a key is there already.
      SiteError: site.yaml cannot be used.
    """
    invitation = read_letter(invitation_path, Invitation)
    _check_invitation(invitation_path, invitation)
    written = not site_yaml.exists()
    if written:
        (site_yaml.parent / "dicom").mkdir(parents=True, exist_ok=True)
        site_yaml.write_text(_TEMPLATE.format(site=invitation.site))
    site = read_site(site_yaml)
    if site.name != invitation.site:
        raise EnrolError(
            f"{invitation_path} invites site {invitation.site!r}, and {site_yaml} is of site {site.name!r}; use the name that the "
            "centre chose, or ask for another invitation"
        )
    centre = Centre(site.state / "centre", invitation.address, invitation.site)
    if centre.key.exists():
        raise EnrolError(
            f"{centre.key} exists: this site answered an invitation before; to answer a new one, move the folder {centre.folder} away"
        )
    _check_place(request_path, invitation.site)
    key = make_node_key()
    centre.folder.mkdir(parents=True, exist_ok=True)
    centre.folder.chmod(0o700)
    centre.authority.write_text(invitation.authority)
    (centre.folder / "centre.json").write_text(json.dumps({"address": centre.address, "site": centre.site}) + "\n")
    partial = centre.key.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_bytes(private_text(key))
    certificate = make_certificate(invitation.site, key)
    centre.certificate.write_text(certificate)
    write_letter(request_path, make_request(invitation, key, certificate))
    os.replace(partial, centre.key)  # last: until then the command can be run again
    return centre, written


def _check_place(path: Path, site: str) -> None:
    """That a request does not overwrite one of another site, which may not have been sent."""
    try:
        other = read_letter(path, Request).site
    except EnrolError:  # nothing is there, or something else
        return
    if other != site:
        raise EnrolError(f"{path.absolute()} is the request of site {other!r}; give another place with --request FILE")


def _check_invitation(path: Path, invitation: Invitation) -> None:
    """Check that an invitation has not expired and that its parts are valid; its name goes into a site.yaml."""
    try:
        over = datetime.fromisoformat(invitation.expires) < datetime.now(UTC)
    except (ValueError, TypeError) as error:
        raise EnrolError(
            f"{path}: the invitation expires {invitation.expires!r}, expected a date and time with time zone; give the whole file "
            "that 'hemafed-server invite' wrote, unchanged"
        ) from error
    if over:
        raise EnrolError(f"{path}: the invitation expired on {invitation.expires}; ask the centre for a new one")
    try:
        _check_address(Centre(path.parent, invitation.address, invitation.site))
        x509.load_pem_x509_certificate(invitation.authority.encode())
    except ValueError as error:
        raise EnrolError(
            f"{path} was damaged on its way: its address or authority cannot be read; ask the centre for the file again"
        ) from error
    if not is_name(invitation.site):
        raise EnrolError(
            f"{path} invites site {invitation.site!r}, expected {NAME_WORDS}; ask the centre for another invitation"
        )


def read_known_centre(site: Site, folder: Path | None = None) -> Centre:
    """Read the hospital's record of its centre.

    Args:
      site: the hospital.
      folder: another path of `centre/` of its state folder (client/node/private.py).
    Raises:
      EnrolError: nothing, or it is damaged.
    """
    folder = folder or site.state / "centre"
    path = folder / "centre.json"
    if not path.is_file():
        raise EnrolError(
            f"site {site.name!r} answered no invitation: there is no {path}; 'hemafed-client init INVITATION SITE_YAML' does that"
        )
    try:
        known = json.loads(path.read_text())
        centre = Centre(folder, str(known["address"]), str(known["site"]))
        _check_address(centre)
    except (ValueError, KeyError, TypeError) as error:
        raise EnrolError(
            f"{path} is damaged ({error}); expected the centre's address as host:port, and site; restore it from a backup, or "
            "answer a new invitation"
        ) from error
    if centre.site != site.name:
        raise EnrolError(
            f"this site was invited as {centre.site!r}, and site.yaml names it {site.name!r}; the centre knows its key under the first: "
            "put that name back, or ask for an invitation under the new one"
        )
    return centre


def _check_address(centre: Centre) -> None:
    """That an address has a host and a port; raises ValueError."""
    if not centre.host or not 0 < centre.port < 65536:
        raise ValueError(centre.address)


def read_authority(centre: Centre) -> str:
    """Return the certificate of the centre's authority, PEM: parsed and written again, so that it is that and nothing else.

    Raises:
      EnrolError: it is missing or damaged.
    """
    try:
        certificate = x509.load_pem_x509_certificate(centre.authority.read_bytes())
    except (OSError, ValueError) as error:
        raise EnrolError(f"{centre.authority}: no certificate; restore it from the invitation or a backup") from error
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def read_node_key(centre: Centre) -> ec.EllipticCurvePrivateKey:
    """The node's private key.

    Raises:
      EnrolError: it is missing, damaged, or readable by others.
    """
    path = centre.key
    try:
        mode = path.stat().st_mode & 0o777
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except PermissionError as error:
        raise EnrolError(f"{path} {not_permitted(path)}") from error
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise EnrolError(
            f"{path}: no private key ({type(error).__name__}); restore it from a backup, or answer a new invitation"
        ) from error
    if mode & 0o077:
        raise EnrolError(
            f"{path} can be read by others (mode {mode:o}); chmod 600 it, and tell the centre if others had access"
        )
    return key


def centre_context(centre: Centre) -> ssl.SSLContext:
    """Return the TLS context of the way to the centre: trusts its authority alone and presents the node's certificate.

    Raises:
      EnrolError: the key, the certificate or the authority is missing or damaged, or they are not of one pair.
    """
    key = read_node_key(centre)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        context = ssl.create_default_context(cafile=str(centre.authority))
    except (OSError, ssl.SSLError) as error:
        raise EnrolError(f"{centre.authority}: no certificate; restore it from the invitation or a backup") from error
    # OpenSSL reads no key in OpenSSH's format, and ssl reads keys from files alone: this one is in memory.
    file = os.memfd_create("node.key")
    try:
        os.write(file, pem)
        context.load_cert_chain(centre.certificate, f"/proc/self/fd/{file}")
    except FileNotFoundError as error:
        raise EnrolError(
            f"{centre.certificate} is not there, and without it the centre's door lets nobody in; restore it from a backup, or "
            "answer a new invitation"
        ) from error
    except (OSError, ssl.SSLError) as error:
        raise EnrolError(
            f"{centre.certificate}: no certificate of the key {centre.key.name}; restore both from the same backup, or answer a "
            "new invitation"
        ) from error
    finally:
        os.close(file)
    return context
