from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.ingest import workers as crew
from client.ingest.workers import WorkerEnded, WorkerPool, restart_clock

ROOT = Path(__file__).resolve().parents[3]


def work(job: int | str) -> object:
    """Squares numbers; words say what happens to the process."""
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "crash":
        faulthandler.disable()
        os.abort()
    if job == "exit":
        os._exit(3)
    if job == "spin":
        while True:
            pass
    if job == "fail":
        raise KeyError("a defect of the program")
    return job * job


def long_but_moving(seconds: float) -> float:
    """Uses processor time and gets on."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        restart_clock()
    return seconds


def leave_trace(path: Path) -> None:
    path.touch()


def results(jobs: list, workers: int = 2) -> list:
    with WorkerPool(workers) as some:
        return [r if isinstance(r, int) else type(r) for _, r in some.run(work, jobs)]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pids: list[int]) -> bool:
    for _ in range(500):
        if all(map(gone, pids)):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    jobs = list(range(40))
    with WorkerPool(workers) as some:
        assert list(some.run(work, jobs)) == [(n, n * n) for n in jobs]


def test_no_process_is_started_before_there_is_a_job() -> None:
    with WorkerPool(2) as some:
        assert list(some.run(work, [])) == []
        assert some._pool is None


def test_few_jobs_are_under_way_at_a_time(tmp_path: Path) -> None:
    """Results wait in memory until they are taken: with a series each, 2 workers must not run through a hospital."""
    with WorkerPool(2) as some:
        running = some.run(leave_trace, [tmp_path / str(n) for n in range(50)])
        next(running)
        time.sleep(0.3)
        assert 1 <= len(list(tmp_path.iterdir())) <= 2 * 2 + 1


@pytest.mark.parametrize(("end", "place"), [("die", 0), ("die", 11), ("crash", 5), ("exit", 5)])
def test_a_job_that_ends_its_process_is_the_only_one_without_a_result(end: str, place: int) -> None:
    jobs: list = list(range(12))
    jobs[place] = end
    expected: list = [n * n for n in range(12)]
    expected[place] = WorkerEnded
    assert results(jobs) == expected


def test_several_jobs_that_end_their_process() -> None:
    assert results(["die", 1, "crash", "exit", 2, 3, "die"]) == [
        WorkerEnded,
        1,
        WorkerEnded,
        WorkerEnded,
        4,
        9,
        WorkerEnded,
    ]


def test_a_crew_works_on_after_a_process_ended() -> None:
    with WorkerPool(2) as some:
        assert [type(r) for _, r in some.run(work, ["die"])] == [WorkerEnded]
        assert [r for _, r in some.run(work, [2, 3])] == [4, 9]


def test_a_job_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PATIENCE_S", 0.2)
    assert results([1, "spin", 2]) == [1, WorkerEnded, 4]


def test_a_long_job_that_gets_on_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "PATIENCE_S", 0.2)
    with WorkerPool(1) as some:
        assert [r for _, r in some.run(long_but_moving, [0.6])] == [0.6]


def test_the_clock_runs_in_workers_only() -> None:
    restart_clock()
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_defect_of_the_program_is_not_hidden() -> None:
    with pytest.raises(KeyError, match="a defect"):
        results([1, "fail", 2])


def test_no_process_outlives_the_context() -> None:
    with WorkerPool(2) as some:
        list(some.run(work, [1, 2, 3]))
        pids = list(some._pool._processes)
    assert len(pids) == 2
    assert all(map(gone, pids))


_PARENT = """
import os, sys, time
from client.ingest.workers import WorkerPool

def wait(job):
    time.sleep(60)

if __name__ == "__main__":
    with WorkerPool(2) as some:
        for job in [1, 2, 3]:
            some._start().submit(wait, job)
        print(*some._pool._processes, flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(gone, pids))
        parent.kill()
        assert wait_until_gone(pids)
