"""A centre that cannot serve says why, tries again, and ends when it is told to. What it serves is in tests/federation."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.centre.config import Centre, CentreError, init_centre
from server.centre.daemon import Daemon
from server.centre.proxy import is_listening
from server.centre.registry import read_sites, revoke
from server.centre.run_request import read_trouble
from server.centre.status import status_lines
from shared.host.processes import owned
from simulations.rehearsal.federation import free_ports
from tests.support.centres import enrol, need_nginx, wait_for


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


def test_the_door_turns_a_revoked_site_away_though_flower_does_not_answer(centre: Centre, tmp_path: Path) -> None:
    """Before: the list of certificates waited for Flower's call, and one site's failure kept another's revocation open."""
    names = ("hospital-01", "hospital-02", "hospital-03")
    for name in names:
        enrol(centre, tmp_path / name, name)
    daemon = Daemon(centre, lambda line: None)  # no SuperLink runs: what is asked of Flower fails
    sites = read_sites(centre)
    daemon._registered = {name: (sites[name].public_key, str(number)) for number, name in enumerate(names)}
    daemon._sync_sites()
    admitted = (centre.state / "hospitals.pem").read_text()
    assert all(sites[name].certificate in admitted for name in names)
    for name in names[:2]:
        revoke(centre, name)
    with pytest.raises(CentreError, match=r"site hospital-01: [\s\S]*site hospital-02: "):
        daemon._sync_sites()
    admitted = (centre.state / "hospitals.pem").read_text()
    assert [sites[name].certificate in admitted for name in names] == [False, False, True]
    assert len((centre.state / "revoked.map").read_text().splitlines()) == 2


def test_a_site_is_at_the_door_once_flower_knows_its_key(centre: Centre, tmp_path: Path) -> None:
    enrol(centre, tmp_path / "hospital-01", "hospital-01")
    with pytest.raises(CentreError, match="site hospital-01: "):
        Daemon(centre, lambda line: None)._sync_sites()
    assert read_sites(centre)["hospital-01"].certificate not in (centre.state / "hospitals.pem").read_text()
