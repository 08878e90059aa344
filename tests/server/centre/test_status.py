from __future__ import annotations

import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from server.centre.authority import issue_server, read_certificate
from server.centre.config import Centre, CentreError
from server.centre.registry import read_sites
from server.centre.run_request import (
    TERMINAL,
    RunRequest,
    is_running,
    lock_path,
    read_request,
    request_run,
    write_request,
)
from server.centre.status import follow_run, last_refusals, online, sites_table, status_lines, write_unit
from server.storage.lines import RoundLine, SiteLine
from server.storage.run_folder import append_round, write_status
from shared.host.processes import hold
from tests.support.centres import closed_port, enrol, make_centre

CONFIG = {"federation": {"rounds": 3}, "run": {"id": "one"}}


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    return make_centre(tmp_path / "centre")


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands, for between a line and its reading a second may go by, and room on the disk."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr("server.centre.status.LEAST_FREE_GB", 0.0)


def lines(centre: Centre) -> list[str]:
    """The state, without the first line, which says whether the centre runs."""
    return list(status_lines(centre))[1:]


def done(centre: Centre, number: int, sites: tuple[str, ...] = (), ago_s: float = 0.0, **refused: str) -> None:
    """A round as server/app.py keeps it."""
    took = {site: SiteLine(weight=1.0, bytes_up=0, norm=0.0, audit="") for site in sites}
    line = RoundLine(number, time.time() - ago_s, 1.5, 0, 0, took, refused)
    (centre.runs / "one").mkdir(parents=True, exist_ok=True)
    append_round(centre.runs / "one", line)


def stands(centre: Centre, state: str, **facts: object) -> None:
    (centre.runs / "one").mkdir(parents=True, exist_ok=True)
    write_status(centre.runs / "one", state, **facts)


def test_what_is_wanted_is_kept(centre: Centre) -> None:
    assert read_request(centre) is None
    request_run(centre, "one", CONFIG)
    assert read_request(centre) == RunRequest("one", CONFIG, "waiting")
    running = replace(
        RunRequest("one", CONFIG), status="running", attempts=2, flower_run="17", not_before=1.5, stop=True
    )
    write_request(centre, running)
    assert read_request(centre) == running
    assert [path.name for path in centre.state.iterdir()] == ["run.json"]


@pytest.mark.parametrize("status", ["waiting", "running"])
def test_a_second_run_is_refused_while_one_goes_on(centre: Centre, status: str) -> None:
    write_request(centre, RunRequest("one", CONFIG, status))
    with pytest.raises(
        CentreError,
        match=f"run 'one' is {status}; a centre carries out one run at a time: wait, or 'hemafed-server stop' it",
    ):
        request_run(centre, "two", {})
    assert read_request(centre) == RunRequest("one", CONFIG, status)


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_a_second_run_begins_afresh_once_the_first_has_ended(centre: Centre, status: str) -> None:
    assert status in TERMINAL
    write_request(centre, RunRequest("one", CONFIG, status, attempts=3, error="of old", stop=True))
    request_run(centre, "two", {})
    assert read_request(centre) == RunRequest("two", {})


def test_a_centre_runs_as_long_as_its_daemon_holds_the_lock(centre: Centre, tmp_path: Path) -> None:
    assert not is_running(centre)
    with hold(lock_path(centre)):
        assert is_running(centre)
    assert not is_running(centre)
    nowhere = replace(centre, folder=tmp_path / "nowhere")
    assert not is_running(nowhere)
    assert not nowhere.folder.exists(), "a look makes no folder"


def test_a_centre_that_is_not_running_and_had_no_run(centre: Centre) -> None:
    assert list(status_lines(centre)) == [
        f"centre localhost:443 is not running ({centre.folder})",
        "no run yet; 'hemafed-server run' starts one",
    ]
    assert online(centre) == {}


def test_a_centre_that_runs_says_who_is_online_even_while_flower_does_not_answer(
    tmp_path: Path,
) -> None:
    centre = make_centre(tmp_path / "centre", loopback_port=closed_port())
    enrol(centre, tmp_path / "hospital", "hospital-01")
    with hold(lock_path(centre)):
        told = list(status_lines(centre))
    assert told[0] == f"centre localhost:443 is running ({centre.folder})"
    assert told[1] == "hospitals online: none (of 1 registered)"


def test_certificates_that_end_soon_are_told(centre: Centre) -> None:
    issue_server(centre.authority, centre.public, ["localhost"], days=10)
    issue_server(centre.authority, centre.loopback, ["localhost"], days=-3)
    ends = {pair: read_certificate(pair.certificate).not_valid_after_utc for pair in (centre.public, centre.loopback)}
    renew = f"'hemafed-server renew {centre.folder}' makes new ones; hospitals need nothing new"
    assert lines(centre)[:2] == [
        f"the certificate public.crt expires in 10 days ({ends[centre.public]:%Y-%m-%d}): {renew}",
        f"the certificate loopback.crt expired 3 days ago ({ends[centre.loopback]:%Y-%m-%d}): {renew}",
    ]


def test_a_disk_that_is_nearly_full_is_told(centre: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.centre.status.LEAST_FREE_GB", 1e9)
    assert lines(centre)[0].startswith(f"the disk of {centre.folder} has ")
    assert "GB left: make room, a run waits where it cannot be stored" in lines(centre)[0]


def test_a_run_says_for_whom_it_waits(centre: Centre) -> None:
    write_request(centre, RunRequest("one", CONFIG, "running", attempts=1))
    assert lines(centre) == ["run one: running"]
    stands(centre, "running", what="round 1 of 3", sites=["hospital-02", "hospital-05"])
    assert lines(centre) == [
        "run one: running",
        "  running round 1 of 3 0 s ago",
        "  not answered yet: hospital-02, hospital-05",
    ]
    stands(centre, "waiting", what="2 hospitals (federation.quorum), 1 are there: hospital-01")
    assert lines(centre)[1:] == ["  waiting for 2 hospitals (federation.quorum), 1 are there: hospital-01 0 s ago"]


def test_a_run_says_how_far_it_is_and_how_often_it_was_started(centre: Centre) -> None:
    write_request(centre, RunRequest("one", CONFIG, "waiting", attempts=3, error="the server was restarted"))
    done(centre, 1, ("hospital-01",), ago_s=8000)
    done(centre, 2, ("hospital-01",), ago_s=301)
    assert lines(centre) == [
        "run one: waiting, 2 rounds done, the last 5 minutes ago, started 3 times; the server was restarted"
    ]


def test_a_round_that_was_done_again_counts_once(centre: Centre) -> None:
    write_request(centre, RunRequest("one", CONFIG, "running"))
    done(centre, 1, ("hospital-01",))
    done(centre, 2, ("hospital-01",), **{"hospital-02": "no reply"})
    with open(centre.runs / "one" / "rounds.jsonl", "a") as file:
        file.write('{"round": 3, "sit')  # a crash
    done(centre, 2, ("hospital-01", "hospital-02"))
    assert lines(centre) == ["run one: running, 2 rounds done, the last 0 s ago"]


@pytest.mark.parametrize("status", TERMINAL)
def test_a_run_that_has_ended_waits_for_nobody(centre: Centre, status: str) -> None:
    write_request(centre, RunRequest("one", CONFIG, status, error="on request"))
    stands(centre, "running", what="round 2 of 3", sites=["hospital-02"])
    assert lines(centre) == [f"run one: {status}; on request"]


@pytest.mark.parametrize(
    ("ago_s", "told"),
    [
        (0, "0 s"),
        (-50, "0 s"),
        (119, "119 s"),
        (121, "2 minutes"),
        (7100, "118 minutes"),
        (7300, "2 hours"),
        (172000, "48 hours"),
        (173000, "2 days"),
    ],
)
def test_time_is_told_in_a_unit_that_says_something(centre: Centre, ago_s: float, told: str) -> None:
    write_request(centre, RunRequest("one", CONFIG, "running"))
    done(centre, 1, ago_s=ago_s)
    assert lines(centre) == [f"run one: running, 1 rounds done, the last {told} ago"]


def test_the_last_error_of_each_site_is_told_until_a_good_update_follows(centre: Centre) -> None:
    write_request(centre, RunRequest("one", CONFIG, "running"))

    def errors() -> list[str]:
        return [line for line in lines(centre) if "last error" in line]

    done(centre, 1, ("hospital-01",), **{"hospital-02": "no reply within 45 s", "hospital-03": "policy.hours"})
    assert errors() == [
        "  last error of hospital-02, round 1: no reply within 45 s",
        "  last error of hospital-03, round 1: policy.hours",
    ]
    done(centre, 2, ("hospital-01",), **{"hospital-02": "2 values are not finite"})
    assert errors() == [
        "  last error of hospital-02, round 2: 2 values are not finite",
        "  last error of hospital-03, round 1: policy.hours",
    ]
    done(centre, 3, ("hospital-01", "hospital-02"))
    assert errors() == ["  last error of hospital-03, round 1: policy.hours"]
    done(centre, 4, ("hospital-02", "hospital-03"), **{"hospital-01": "its node went offline"})
    assert errors() == ["  last error of hospital-01, round 4: its node went offline"]


def test_no_rounds_have_no_errors() -> None:
    assert last_refusals([]) == {}


def test_the_table_of_sites_shows_status_and_key_of_each(centre: Centre, tmp_path: Path) -> None:
    enrol(centre, tmp_path / "b", "hospital-02")
    enrol(centre, tmp_path / "a", "hospital-01")
    table = sites_table(centre)
    cells = [list(column.cells) for column in table.columns]
    known = read_sites(centre)
    assert cells[0] == ["hospital-01", "hospital-02"]
    assert cells[1] == ["registered", "registered"]
    assert cells[3] == ["no", "no"]
    assert cells[4] == [known["hospital-01"].fingerprint, known["hospital-02"].fingerprint]


def test_a_run_is_followed_to_its_end(centre: Centre, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that were there before come first, and each once."""
    monkeypatch.setattr("server.centre.status.FOLLOW_S", 0.02)
    write_request(centre, RunRequest("one", CONFIG, "running"))
    done(centre, 1, ("hospital-02", "hospital-01"))
    said: list[str] = []

    def goes_on() -> None:
        wait(lambda: said)
        stands(centre, "waiting", what="2 hospitals")
        wait(lambda: len(said) == 2)
        stands(centre, "running", what="round 2 of 3")
        done(centre, 2, ("hospital-01",), **{"hospital-02": "no reply"})
        wait(lambda: len(said) == 3)
        write_request(centre, RunRequest("one", CONFIG, "failed", error="full disk"))

    def wait(until: object) -> None:
        end = time.monotonic() + 20
        while not until() and time.monotonic() < end:
            time.sleep(0.01)

    other = threading.Thread(target=goes_on)
    other.start()
    ended = follow_run(centre, "one", said.append)
    other.join()
    assert ended == RunRequest("one", CONFIG, "failed", error="full disk")
    assert said == [
        "round 1: hospital-01, hospital-02 in 1.5 s",
        "waiting for 2 hospitals",
        "round 2: hospital-01 in 1.5 s; hospital-02: no reply",
    ]


def test_a_run_is_not_followed_into_the_next(centre: Centre) -> None:
    write_request(centre, RunRequest("two", CONFIG, "running"))
    assert follow_run(centre, "one", lambda line: pytest.fail(line)) == RunRequest("two", CONFIG, "running")


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    centre = make_centre(tmp_path / "the centre of 'all'")
    unit = write_unit(centre)
    assert unit == centre.folder / "hemafed-server.service"
    assert f'" "start" "{centre.folder}"\n' in unit.read_text()
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    told = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert [line for line in told.stderr.splitlines() if unit.name in line] == []
    assert told.returncode == 0
    unit.write_text(unit.read_text().replace("Restart=always", "Restart=allways"))
    told = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "Failed to parse service restart specifier" in told.stderr, "else the lines above say nothing"
