"""The centre's nginx: its port, and its end whatever became of its master. What it lets through is in tests/federation."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from server.centre.config import Centre, CentreError, init_centre
from server.centre.proxy import check_port_is_free, find_nginx, is_listening, stop_proxy, write_proxy_config
from shared.host.processes import END_TIMEOUT_S
from simulations.rehearsal.federation import free_ports
from tests.support.centres import need_nginx, wait_for


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    port, loopback_port = free_ports(2)
    centre = Centre(tmp_path / "the centre's folder", "localhost", port, "127.0.0.1", loopback_port)
    init_centre(centre)
    return centre


@pytest.fixture
def nginx(centre: Centre) -> Iterator[subprocess.Popen]:
    """The centre's nginx, serving; it works in the folder that the centre starts it in."""
    need_nginx()
    process = subprocess.Popen([find_nginx(), "-c", str(write_proxy_config(centre))], cwd=centre.flower)
    try:
        wait_for(lambda: is_listening(centre))
        yield process
    finally:
        stop_proxy(centre)
        process.wait(5)


def test_it_serves_from_a_folder_of_any_name_and_is_ended(centre: Centre, nginx: subprocess.Popen) -> None:
    begin = time.monotonic()
    stop_proxy(centre)
    assert time.monotonic() - begin < END_TIMEOUT_S, "else it had to be killed"
    nginx.wait(5)
    assert not is_listening(centre)
    check_port_is_free(centre.listen, centre.port, "port")


def test_workers_whose_master_was_killed_do_not_keep_the_port(centre: Centre, nginx: subprocess.Popen) -> None:
    wait_for(psutil.Process(nginx.pid).children)
    nginx.kill()
    nginx.wait()
    assert is_listening(centre), "else there was nothing to end"
    stop_proxy(centre)
    wait_for(lambda: not is_listening(centre))
    check_port_is_free(centre.listen, centre.port, "port")


def test_another_centres_nginx_is_let_alone(centre: Centre, nginx: subprocess.Popen, tmp_path: Path) -> None:
    other = Centre(tmp_path / "other", "localhost", *free_ports(1))
    init_centre(other)
    stop_proxy(other)
    assert nginx.poll() is None
    assert is_listening(centre)


def test_a_port_that_is_taken_is_refused_with_the_next_step(centre: Centre) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        told = rf"port {port} \(port in centre.toml\) is taken by another program; .ss -ltnp 'sport = :{port}'. shows which"
        with pytest.raises(CentreError, match=told):
            check_port_is_free("0.0.0.0", port, "port")
    check_port_is_free("0.0.0.0", port, "port")


def test_an_address_that_is_not_of_this_machine_is_refused(centre: Centre) -> None:
    with pytest.raises(CentreError, match=re.escape(f"203.0.113.7:{centre.port} (port in centre.toml) cannot be used")):
        check_port_is_free("203.0.113.7", centre.port, "port")
