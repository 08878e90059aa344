"""A centre that cannot serve says why, tries again, and ends when it is told to. What it serves is in tests/federation."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.centre.config import Centre, init_centre
from server.centre.daemon import Daemon
from server.centre.proxy import is_listening
from server.centre.run_request import read_trouble
from server.centre.status import status_lines
from shared.host.processes import owned
from simulations.rehearsal.federation import free_ports
from tests.support.centres import need_nginx, wait_for


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    need_nginx()
    port, loopback_port = free_ports(2)
    made = Centre(tmp_path / "centre", "localhost", port, "127.0.0.1", loopback_port)
    init_centre(made)
    return made


@contextmanager
def running(centre: Centre) -> Iterator[list[str]]:
    """A daemon that is told to stop at the end of the block, and then ends; what it says."""
    said: list[str] = []
    daemon = Daemon(centre, said.append)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield said
    finally:
        daemon.stop()
        thread.join(60)
    assert not thread.is_alive()
    assert owned(centre.folder) == []


@pytest.mark.parametrize("key", ["loopback_port", "port"])
def test_a_port_that_is_taken_is_said_and_the_centre_serves_once_it_is_free(centre: Centre, key: str) -> None:
    holder = socket.create_server(("127.0.0.1", getattr(centre, key)))
    with running(centre) as said:
        wait_for(lambda: read_trouble(centre))
        told = f"port {getattr(centre, key)} ({key} in centre.toml) is taken by another program"
        assert told in read_trouble(centre)
        assert any("  it serves nobody: " + told in line for line in status_lines(centre))
        assert not any("serving" in line for line in said)
        holder.close()
        wait_for(lambda: is_listening(centre))
        wait_for(lambda: not read_trouble(centre))
    assert not is_listening(centre)


def test_a_damaged_file_of_a_site_is_said_and_the_daemon_still_ends(centre: Centre) -> None:
    """It is read when Flower's processes have just begun; they are ended all the same."""
    (centre.folder / "sites" / "hospital-01.json").write_text("{")
    with running(centre):
        wait_for(lambda: "hospital-01.json is damaged" in read_trouble(centre))
    assert read_trouble(centre) == ""
