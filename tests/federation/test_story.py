"""Nothing that is killed on the way changes what a federation ends with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.boundary.audit import verify
from server.storage.checkpoint import load_checkpoint
from server.storage.run_folder import read_rounds, read_summary
from simulations.rehearsal.federation import federate, own_site
from tests.conftest import small_config
from tests.federation.conftest import NAMES
from tests.support.loopback import LoopbackGrid, run_server

ROUNDS = 4
CONFIG = small_config(federation__rounds=ROUNDS, federation__quorum=3, federation__wait_s=600.0)


def test_a_federation_whose_members_are_killed_ends_with_the_undisturbed_encoder(
    data: dict[str, Path], tmp_path: Path
) -> None:
    with federate(tmp_path / "federation", data) as federation:
        federation.start("centre")
        federation.wait_serving()
        for name in NAMES:
            federation.start(name)
        federation.wait_online(NAMES)
        federation.begin_run("story", CONFIG)

        # A hospital loses power while it trains. The round waits for it, for the quorum is three.
        federation.wait_line("hospital-02", "received train")
        federation.cut_power("hospital-02")
        federation.start("hospital-02")
        federation.wait_rounds("story", 1, 900)
        assert "hospital-02" in federation.command("hemafed-server", "sites", str(federation.centre.folder))

        # The centre's daemon is killed between rounds, what it started is not; the next daemon ends that and goes on.
        left = {process.pid for process in federation.started_by("centre")}
        federation.kill_daemon("centre")
        federation.start("centre")
        federation.wait_serving()
        assert left.isdisjoint(process.pid for process in federation.started_by("centre"))
        federation.wait_rounds("story", 2, 900)

        # The centre loses power while the third round goes on, or on a busy machine the fourth.
        federation.cut_power("centre")
        federation.start("centre")
        assert federation.wait_end("story", 600) == "finished"
        told = federation.status()
        for name in NAMES:
            federation.stop(name)
        federation.stop("centre")
        assert federation.started_by("centre") == [], "nothing stays"
        assert not any(federation.started_by(name) for name in NAMES)

    run = federation.run_folder("story")
    assert f"run story: finished, {ROUNDS} rounds done" in told
    assert [line.round for line in read_rounds(run)] == list(range(1, ROUNDS + 1))
    assert all(set(line.sites) == set(NAMES) for line in read_rounds(run))
    assert read_summary(run).evaluation["seen"]["auc"]["value"] is not None

    alone = CONFIG | {"run.folder": str(tmp_path / "runs"), "run.id": "alone"}
    sites = [own_site(tmp_path / "alone" / name, file) for name, file in data.items()]
    run_server(LoopbackGrid(sites, alone), alone)
    expected, found = load_checkpoint(tmp_path / "runs" / "alone" / "checkpoint"), load_checkpoint(run / "checkpoint")
    assert (found.round_number, found.sites) == (ROUNDS, tuple(NAMES))
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], value, err_msg=name)

    # What the centre received of the hospitals' audit logs is in them.
    for name in NAMES:
        received = tuple(line.sites[name].audit for line in read_rounds(run))
        verdict = verify(federation.state(name), received)
        assert verdict.faults == ()
        assert verdict.entries > 3
