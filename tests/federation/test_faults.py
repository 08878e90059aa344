"""One hospital's trouble is its own: the round ends without it, the centre says why, and it takes part again."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from server.centre.run_request import read_request
from server.storage.lines import RoundLine
from server.storage.run_folder import read_rounds
from shared.refusals import TEXTS, Refusal
from simulations.rehearsal.federation import Federation, enrol, federate
from tests.conftest import small_config
from tests.federation.conftest import NAMES
from tests.support.relay import Relay

pytestmark = pytest.mark.long
DEADLINE_S = 45.0
CONFIG = small_config(
    train__epochs=10,
    federation__rounds=200,
    federation__quorum=1,
    federation__wait_s=600.0,
    federation__round_deadline_s=DEADLINE_S,
)


@pytest.fixture(scope="module")
def running(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, Relay]]:
    """A run that goes on for ever; the third hospital is not there yet, the second's line can be cut."""
    folder = tmp_path_factory.mktemp("faults") / "federation"
    with federate(folder, data, invited=NAMES[:2]) as made:
        made.start("centre")
        made.wait_serving()
        with Relay(made.centre.port) as line:
            known = made.state("hospital-02") / "centre" / "centre.json"
            known.write_text(json.dumps({"address": f"localhost:{line.port}", "site": "hospital-02"}))
            for name in NAMES[:2]:
                made.start(name)
            made.wait_online(NAMES[:2])
            made.begin_run("faults", CONFIG)
            made.wait_rounds("faults", 1, 300)
            yield made, line


@pytest.fixture
def federation(running: tuple[Federation, Relay]) -> Federation:
    return running[0]


@pytest.fixture
def line(running: tuple[Federation, Relay]) -> Relay:
    """Of the second hospital to the centre."""
    return running[1]


def rounds(federation: Federation) -> list[RoundLine]:
    return read_rounds(federation.run_folder("faults"))


def wait_refused(federation: Federation, name: str, after: int) -> str:
    """Why a hospital's reply was not used, in the next round in which that is so."""
    found = []

    def refused() -> bool:
        found[:] = [line.refused[name] for line in rounds(federation)[after:] if name in line.refused]
        return bool(found)

    federation.wait_for(refused, 240, f"{name} refused")
    return found[0]


def wait_back(federation: Federation, name: str) -> None:
    """Return when a hospital takes part in a round that has not begun yet."""
    after = len(rounds(federation)) + 1
    federation.wait_for(
        lambda: any(name in line.sites for line in rounds(federation)[after:]), 400, f"{name} taking part again"
    )


def training_app(federation: Federation, name: str) -> psutil.Process:
    """The process of a hospital that trains now: its first epoch is done, others are not."""
    federation.wait_line(name, ": step ", after=len(federation.log(name).read_text()))
    started = federation.started_by(name)
    known = {process.pid for process in started}
    (app,) = (process for process in started if process.ppid() in known)  # forked by the warm one for this message
    return app


def test_a_hospital_that_comes_late_takes_part(federation: Federation) -> None:
    assert all("hospital-03" not in line.sites for line in rounds(federation))
    enrol(federation, "hospital-03")
    federation.start("hospital-03")
    wait_back(federation, "hospital-03")


def test_a_slow_hospital_is_waited_for_until_the_deadline_and_asked_again_once_it_answered(
    federation: Federation,
) -> None:
    slow = training_app(federation, "hospital-03")
    after = len(rounds(federation))
    slow.send_signal(signal.SIGSTOP)
    assert f"no reply within {DEADLINE_S:g} s (federation.round_deadline_s)" in wait_refused(
        federation, "hospital-03", after
    )
    assert "last error of hospital-03" in federation.status()
    slow.send_signal(signal.SIGCONT)
    wait_back(federation, "hospital-03")
    # The rounds meanwhile went on with the others, and did not wait for it again.
    missed = [line for line in rounds(federation)[after:] if "hospital-03" not in line.sites]
    assert all({"hospital-01"} <= set(line.sites) for line in missed)
    assert sum("hospital-03" in line.refused for line in missed) == 1


def test_a_client_app_that_is_killed_while_it_trains_costs_its_round_alone(federation: Federation) -> None:
    app = training_app(federation, "hospital-03")
    after = len(rounds(federation))
    app.kill()
    assert wait_refused(federation, "hospital-03", after) == TEXTS[Refusal.FAILED]  # at once, not at the deadline
    wait_back(federation, "hospital-03")


def test_a_daemon_that_is_killed_while_it_sends_comes_back(federation: Federation) -> None:
    place = len(federation.log("hospital-03").read_text())
    federation.wait_line("hospital-03", "sending the reply to train", place)
    federation.cut_power("hospital-03")
    federation.start("hospital-03")
    wait_back(federation, "hospital-03")


def test_a_network_that_is_cut_for_longer_than_a_round(federation: Federation, line: Relay) -> None:
    after, place = len(rounds(federation)), len(federation.log("hospital-02").read_text())
    federation.wait_line("hospital-02", "received train", place)
    line.cut()
    reason = wait_refused(federation, "hospital-02", after)
    assert "no reply within" in reason or "Node Unavailable" in reason or "offline" in reason
    federation.wait_rounds("faults", len(rounds(federation)) + 2, 240)  # without it
    line.mend()
    wait_back(federation, "hospital-02")


def test_all_hospitals_gone_is_said_and_waited_for(federation: Federation) -> None:
    for name in NAMES:
        federation.stop(name)
    federation.wait_waiting("faults", "0 are there", 200)
    before = len(rounds(federation))
    assert "waiting for 1 hospitals (federation.quorum), 0 are there: none" in federation.status()
    assert len(rounds(federation)) == before, "nothing is averaged"
    federation.start("hospital-01")
    federation.wait_rounds("faults", before + 1, 240)
    assert set(rounds(federation)[before].sites) == {"hospital-01"}


def test_a_revoked_hospital_is_turned_away_and_the_others_go_on(federation: Federation) -> None:
    federation.start("hospital-03")
    wait_back(federation, "hospital-03")
    federation.command("hemafed-server", "revoke", str(federation.centre.folder), "hospital-03")
    place = len(federation.log("hospital-03").read_text())
    federation.wait_rounds("faults", len(rounds(federation)) + 2, 240)
    assert "hospital-03" not in rounds(federation)[-1].sites
    assert "hospital-01" in rounds(federation)[-1].sites
    federation.wait_line("hospital-03", "the centre's door does not let this node in", place)
    assert "revoked" in federation.command("hemafed-server", "sites", str(federation.centre.folder))


def test_a_run_is_stopped_on_request_and_its_checkpoint_stays(federation: Federation) -> None:
    federation.command("hemafed-server", "stop", str(federation.centre.folder))
    assert federation.wait_end("faults", 60) == "stopped"
    assert read_request(federation.centre).status == "stopped"
    assert len(list((federation.run_folder("faults") / "checkpoint").glob("round-*"))) == 2
