"""The only door to the centre: nginx with TLS in front of Flower's SuperLink.

In Flower 1.41 one port serves the hospitals' calls (Fleet), the operator's (Control) and the app processes' (Runtime). The
SuperLink therefore listens on loopback, and nginx lets through exactly the calls that a registered hospital's node makes;
everything else is answered with 404 here and never reaches Flower.

A hospital presents the certificate that it sent with its request. It is self-signed: the list of all registered ones is the
list of permitted clients, and a client that presents none of them is rejected before a request's body is read. A body is kept
on disk until it is whole, so that a slow one holds no worker of the SuperLink. Behind the door Flower checks a signature on
each call, and server/superlink/filter.py what the call is about.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from server.centre.config import Centre, CentreError
from server.centre.registry import RegisteredSite
from shared.host.files import replace_text
from shared.host.processes import end_all
from shared.host.rights import group_name, user_name
from shared.wire.enrolment import ABSENT, REVOKED, UNKNOWN

# flwr/supernode/fleet_http_client.py, without register-node and unregister-node: `hemafed-server register` does that.
# Largest body of each call, in KB: tensors travel in pieces of 5 MB, a reply's list of objects has 70 bytes for each.
LARGEST_KB = {
    "activate-node": 16,
    "deactivate-node": 16,
    "send-node-heartbeat": 16,
    "pull-messages": 16,
    "get-run": 16,
    "get-fab": 16,
    "pull-object": 16,
    "confirm-message-received": 16,
    "push-messages": 2048,
    "push-object": 8192,
}
FLEET_CALLS = tuple(LARGEST_KB)
# Sixteen hospitals may share an address, and a hospital sends up to ten pieces at once.
CONNECTIONS_PER_SITE, CONNECTIONS_PER_ADDRESS = 24, 24 * 16
CALLS_PER_S = 100  # of one hospital; more are slowed down, up to this many waiting
MOST_CONNECTIONS, LEAST_CONNECTIONS = (
    16384,
    512,
)  # of one worker of nginx; 2,079 idle ones locked everybody out of 2 x 1024

_TEMPLATE = """\
# Written by hemafed-server at each start; changes here are lost.
{user}worker_processes auto;
worker_rlimit_nofile {files};
worker_shutdown_timeout 60s;
daemon off;
pid "{state}/nginx.pid";
error_log "{state}/nginx.log" warn;
events {{ worker_connections {connections}; }}
http {{
  map $ssl_client_verify $site {{ default "-"; SUCCESS $ssl_client_s_dn; }}
  map $ssl_client_verify $caller {{ default ""; SUCCESS $ssl_client_fingerprint; }}
  map $ssl_client_fingerprint $refusal {{ default "{unknown}"; "" "{absent}"; include "{state}/revoked.map"; }}
  log_format door '$remote_addr $site [$time_local] "$request" $status $body_bytes_sent $request_length $request_time';
  access_log "{state}/access.log" door;
  server_tokens off;
  client_body_temp_path "{state}/nginx/body";
  proxy_temp_path "{state}/nginx/proxy";
  fastcgi_temp_path "{state}/nginx/fastcgi";
  uwsgi_temp_path "{state}/nginx/uwsgi";
  scgi_temp_path "{state}/nginx/scgi";
  limit_conn_zone $caller zone=sites:1m;
  limit_conn_zone $binary_remote_addr zone=addresses:4m;
  limit_req_zone $caller zone=calls:1m rate={calls_per_s}r/s;
  limit_conn_status 503;
  limit_req_status 503;
  limit_conn_log_level info;
  limit_req_log_level info;
  upstream superlink {{ server 127.0.0.1:{loopback_port}; keepalive 64; }}
  server {{
    listen {listen}:{port} ssl backlog=4096;
    server_name {host};
    ssl_certificate "{certificate}";
    ssl_certificate_key "{key}";
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_verify_client on;
    ssl_verify_depth 1;
    ssl_client_certificate "{authority}";  # the names that strangers see; hospitals' names are not among them
    ssl_trusted_certificate "{state}/hospitals.pem";
    ssl_session_tickets off;
    ssl_session_cache off;
    client_header_timeout 15s;  # of the handshake, too
    client_header_buffer_size 2k;
    large_client_header_buffers 4 4k;
    client_body_timeout 30s;
    client_body_buffer_size 64k;
    client_max_body_size 16k;
    send_timeout 60s;
    keepalive_timeout 75s;
    keepalive_requests 10000;
    lingering_time 10s;
    lingering_timeout 2s;
    reset_timedout_connection on;
    limit_conn sites {per_site};
    limit_conn addresses {per_address};
    limit_req zone=calls burst={calls_per_s};
    error_page 495 496 = @refused;
    location @refused {{ keepalive_timeout 0; default_type text/plain; return 403 "$refusal\n"; }}
{locations}
    location / {{ return 404; }}
  }}
}}
"""
_LOCATION = """\
    location = /v1/fleet/{call} {{
      limit_except POST {{ deny all; }}
      client_max_body_size {largest}k;
      proxy_pass https://superlink;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host localhost;
      proxy_request_buffering on;
      proxy_max_temp_file_size 64m;
      proxy_next_upstream off;
      proxy_connect_timeout 10s;
      proxy_read_timeout 300s;
      proxy_send_timeout 60s;
      proxy_ssl_trusted_certificate "{authority}";
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_server_name on;
    }}"""


def write_proxy_config(centre: Centre, sites: dict[str, RegisteredSite] | None = None) -> Path:
    """Write nginx's config and the lists of certificates to the centre's state folder.

    Args:
      centre: the centre.
      sites: as read_sites returns them; without any, nobody is let in.
    Returns:
      The config's path.
    """
    (centre.state / "nginx").mkdir(parents=True, exist_ok=True)
    write_certificates(centre, sites or {})
    authority = centre.authority.certificate
    connections = _connections()
    path = centre.state / "nginx.conf"
    path.write_text(
        _TEMPLATE.format(
            user=_user(centre),
            state=centre.state,
            listen=centre.listen,
            port=centre.port,
            host=centre.host,
            loopback_port=centre.loopback_port,
            certificate=centre.public.certificate,
            key=centre.public.key,
            authority=authority,
            unknown=UNKNOWN,
            absent=ABSENT,
            connections=connections,
            files=3 * connections,
            per_site=CONNECTIONS_PER_SITE,
            per_address=CONNECTIONS_PER_ADDRESS,
            calls_per_s=CALLS_PER_S,
            locations="\n".join(
                _LOCATION.format(call=call, largest=largest, authority=authority)
                for call, largest in LARGEST_KB.items()
            ),
        )
    )
    return path


def _user(centre: Centre) -> str:
    """Return whom nginx's workers run as where root starts it: the folder's owner, who can write bodies into it."""
    if os.geteuid() != 0:
        return ""
    owner = centre.folder.stat()
    return f"user {user_name(owner.st_uid)} {group_name(owner.st_gid)};\n"


def _connections() -> int:
    """Return how many connections a worker may have: two open files each and one for a body, of those the system allows."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(LEAST_CONNECTIONS, min(MOST_CONNECTIONS, (most_files - 64) // 3))


def write_certificates(centre: Centre, sites: dict[str, RegisteredSite]) -> bool:
    """Write which certificates the door lets in, and which were revoked.

    The centre's authority comes first: nginx takes no empty list, and it signs certificates of servers only.

    Returns:
      Whether nginx must read them again: one of the lists changed.
    """
    admitted = [site.certificate for site in sites.values() if site.status == "registered" and site.certificate]
    revoked = [site.certificate for site in sites.values() if site.status == "revoked" and site.certificate]
    hospitals = "".join([centre.authority.certificate.read_text(), *admitted])
    texts = {
        "hospitals.pem": hospitals,
        "revoked.map": "".join(f'{_fingerprint(one)} "{REVOKED}";\n' for one in sorted(set(revoked))),
    }
    changed = False
    for name, text in texts.items():
        path = centre.state / name
        if not path.is_file() or path.read_text() != text:
            replace_text(path, text)
            changed = True
    return changed


def _fingerprint(certificate: str) -> str:
    """Return a certificate's fingerprint as nginx names it: SHA-1, hexadecimal. It only chooses a text here."""
    return x509.load_pem_x509_certificate(certificate.encode()).fingerprint(hashes.SHA1()).hex()


def find_nginx() -> str:
    """nginx's program.

    Raises:
      CentreError: it is not installed.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise CentreError("nginx is not installed; on Debian or Ubuntu: apt install nginx-light")
    return program


def stop_proxy(centre: Centre) -> None:
    """Stop the centre's nginx, no matter which process started it.

    It hides the environment that other processes are known by, but not the folder that it works in; a worker whose master
    was killed would keep the port for ever.
    """
    place, found = centre.flower.resolve(), []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "nginx" and Path(process.cwd()) == place:
                found.append(process)
    end_all(found)


def check_port_is_free(listen: str, port: int, key: str) -> None:
    """Refuse a port that is taken; nginx would retry for ever, and hospitals would reach the other program.

    Raises:
      CentreError: names the port, its key in centre.toml and the next step.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except PermissionError as error:
            raise CentreError(
                f"port {port} ({key} in centre.toml) is below 1024 and needs a right: start the centre by its systemd unit, which "
                "grants it, or choose another port"
            ) from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CentreError(f"{listen}:{port} ({key} in centre.toml) cannot be used: {error.strerror}") from error
            raise CentreError(
                f"port {port} ({key} in centre.toml) is taken by another program; \"ss -ltnp 'sport = :{port}'\" shows which: end "
                f"it, or change {key}"
            ) from error


def is_listening(centre: Centre) -> bool:
    """Whether somebody accepts connections at the public port."""
    host = "127.0.0.1" if centre.listen == "0.0.0.0" else centre.listen
    try:
        with socket.create_connection((host, centre.port), timeout=1):
            return True
    except OSError:
        return False
