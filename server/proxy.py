"""The only door to the centre: nginx with TLS in front of Flower's SuperLink.

In Flower 1.41 one port serves the hospitals' calls (Fleet), the operator's (Control, without any authentication) and the
app processes' (Runtime). The SuperLink therefore listens on loopback, and nginx lets through exactly the calls that a
registered hospital's SuperNode makes; everything else is answered with 404 here and never reaches Flower. Hospitals are
known by their keys: Flower checks a signature on each call. Nodes that would register themselves are turned away.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import psutil

from server.centre import Centre, CentreError

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
    """End the centre's nginx, whoever started it; it hides the environment that other processes are known by."""
    pid_file = centre.state / "nginx.pid"
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(pid_file.read_text()))
        if process.name() == "nginx":
            process.terminate()
            process.wait(10)
