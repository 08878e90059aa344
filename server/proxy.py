"""The only door to the centre: nginx with TLS in front of Flower's SuperLink.

In Flower 1.41 one port serves the hospitals' calls (Fleet), the operator's (Control, without any authentication) and the
app processes' (Runtime). The SuperLink therefore listens on loopback, and nginx lets through exactly the calls that a
registered hospital's SuperNode makes; everything else is answered with 404 here and never reaches Flower. Hospitals are
known by their keys: Flower checks a signature on each call. Nodes that would register themselves are turned away.
"""

from __future__ import annotations

import errno
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from server.centre import Centre, CentreError
from shared.processes import end_all

# flwr/supernode/fleet_http_client.py, without register-node and unregister-node: `hemafed-server register` does that.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
LARGEST_CALL = "64m"  # tensors travel in pieces of 5 MB

_TEMPLATE = """\
# Written by hemafed-server at each start; changes here are lost.
worker_processes auto;
daemon off;
pid "{state}/nginx.pid";
error_log "{state}/nginx.log" warn;
events {{ worker_connections 1024; }}
http {{
  access_log "{state}/access.log";
  server_tokens off;
  client_body_temp_path "{state}/nginx/body";
  proxy_temp_path "{state}/nginx/proxy";
  fastcgi_temp_path "{state}/nginx/fastcgi";
  uwsgi_temp_path "{state}/nginx/uwsgi";
  scgi_temp_path "{state}/nginx/scgi";
  upstream superlink {{ server 127.0.0.1:{loopback_port}; keepalive 64; }}
  server {{
    listen {listen}:{port} ssl;
    server_name {host};
    ssl_certificate "{certificate}";
    ssl_certificate_key "{key}";
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size {largest};
    client_body_timeout 120s;
    proxy_request_buffering off;
    location ~ ^/v1/fleet/({calls})$ {{
      limit_except POST {{ deny all; }}
      proxy_pass https://superlink;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host localhost;
      proxy_read_timeout 300s;
      proxy_send_timeout 300s;
      proxy_ssl_trusted_certificate "{authority}";
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_server_name on;
    }}
    location / {{ return 404; }}
  }}
}}
"""


def write_proxy_config(centre: Centre) -> Path:
    """Write nginx's config to the centre's state folder."""
    (centre.state / "nginx").mkdir(parents=True, exist_ok=True)
    path = centre.state / "nginx.conf"
    path.write_text(
        _TEMPLATE.format(
            state=centre.state,
            listen=centre.listen,
            port=centre.port,
            host=centre.host,
            loopback_port=centre.loopback_port,
            certificate=centre.public.certificate,
            key=centre.public.key,
            authority=centre.authority.certificate,
            largest=LARGEST_CALL,
            calls="|".join(FLEET_CALLS),
        )
    )
    return path


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
    """End the centre's nginx, whoever started it.

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
    """Refuse a port that cannot be listened on; nginx would try for ever, and hospitals would meet whoever has it.

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
