"""A centre's folder, hospitals that answer its invitations, and servers on loopback that speak in its place."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import pytest

from client.node.enrol import init_site
from server.centre.authority import Pair
from server.centre.config import Centre, CentreError, init_centre
from server.centre.proxy import find_nginx
from server.centre.registry import invitation_path, invite, register
from shared.wire.enrolment import Request, read_letter
from tests.support.small_sites import make_site

Answer = Callable[[socket.socket], None]  # what a server does with one connection
_HELD: list[socket.socket] = []


def need_nginx() -> None:
    """Skip the test where nginx is not installed; CI has it."""
    try:
        find_nginx()
    except CentreError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def wait_for(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Return when something holds."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def make_centre(folder: Path, port: int = 443, loopback_port: int = 9443) -> Centre:
    centre = Centre(folder.absolute(), "localhost", port, loopback_port=loopback_port)
    init_centre(centre)
    return centre


def invitation_file(centre: Centre, name: str, days: int = 14) -> Path:
    invite(centre, name, days)
    return invitation_path(centre, name)


def enrol(centre: Centre, root: Path, name: str = "hospital-01") -> Path:
    """A hospital without images that is registered; its site.yaml."""
    site_yaml = make_site(root, {}, site=name)
    init_site(invitation_file(centre, name), site_yaml, root / "request.json")
    register(centre, read_letter(root / "request.json", Request))
    return site_yaml


@contextmanager
def serving(answer: Answer) -> Iterator[int]:
    """A server on a port of 127.0.0.1, one connection at a time, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            with line, suppress(OSError):  # a client that does not trust us hangs up
                line.settimeout(5)
                answer(line)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        listener.close()
        thread.join()


def closed_port() -> int:
    """A port on which nobody listens, nor can: it is kept until the tests end."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    _HELD.append(holder)
    return holder.getsockname()[1]


def page(date: datetime | None = None, *more: str) -> bytes:
    """The answer to the request of a page that does not exist."""
    told = () if date is None else (f"Date: {format_datetime(date.astimezone(UTC), usegmt=True)}",)
    return "\r\n".join(("HTTP/1.1 404 Not Found", *told, "Content-Length: 0", *more, "", "")).encode()


def over_tls(
    pair: Pair,
    content: bytes = b"",
    heard: list[bytes] | None = None,
    clients: tuple[Path, list[bytes]] | None = None,
) -> Answer:
    """Show a certificate and answer one request.

    Args:
      pair: the server's.
      content: the answer.
      heard: collects the requests.
      clients: the certificate that a client must present, and a list that collects it, DER.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients[0])

    def answer(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True) as secure:
            request = secure.recv(65536)
            if heard is not None:
                heard.append(request)
            if clients is not None:
                clients[1].append(secure.getpeercert(binary_form=True))
            secure.sendall(content)

    return answer
