"""Worker processes that outlive a bad file.

A decoder written in C can end its process on damaged data, or never end, and a process pool is then lost with all its jobs. A crew
restarts, runs the jobs that were under way one by one, and returns the one that killed its process as an error.
Stays in the hospital.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Self, TypeVar

from client.dicom.elements import silence_readers

Job = TypeVar("Job")
PATIENCE_S = 120.0  # of processor time for one image or mask; a damaged stream can keep a decoder busy for ever
ENDED_ITS_READER = "ended its reader: damaged; export it again"  # what a report says of a job that was WorkerEnded
_PR_SET_PDEATHSIG = 1  # prctl(2)


class WorkerEnded(Exception):
    """The process that ran a job ended, twice: once among others, once alone."""


def _prepare(parent: int) -> None:
    """A worker writes nothing, leaves Ctrl-C to its parent and, on Linux, ends with it even when that is killed."""
    silence_readers()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:  # killed before the line above
            os._exit(1)


def _timed(work: Callable[[Job], Any], job: Job) -> Any:
    """A job in a worker; the system ends the process if it uses PATIENCE_S of processor time and does not get on."""
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)
    try:
        return work(job)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def restart_clock() -> None:
    """Give a job PATIENCE_S again: it has got on, as a long series does. Without effect outside a worker."""
    if signal.getitimer(signal.ITIMER_PROF)[0]:
        signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)


class WorkerPool:
    """Some processes. Use as a context.

    Attributes:
      workers: how many.
    """

    def __init__(self, workers: int | None = None):
        self.workers = workers or os.cpu_count() or 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, work: Callable[[Job], Any], jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Results in order of the jobs; a few jobs per worker are under way at a time, so memory stays bounded.

        Args:
          work: called in a worker with one job.
          jobs: anything that can be pickled.
        Yields:
          The job, and its result or a WorkerEnded.
        """
        waiting: deque[Job] = deque(jobs)
        ahead = 2 * self.workers + 1
        under_way: deque[tuple[Job, Future]] = deque()
        while waiting or under_way:
            try:
                while waiting and len(under_way) < ahead:
                    under_way.append((waiting[0], self._start().submit(_timed, work, waiting[0])))
                    waiting.popleft()
                job, future = under_way[0]
                result = future.result()
            except BrokenProcessPool:
                self._end()
                for job, future in under_way:
                    yield job, self._again(work, job, future)
                under_way.clear()
                continue
            under_way.popleft()
            yield job, result

    def _again(self, work: Callable[[Job], Any], job: Job, future: Future) -> Any:
        """The result of a job that was under way when a process ended; alone if it has none."""
        try:
            return future.result(timeout=0)
        except (BrokenProcessPool, TimeoutError):
            pass
        with ProcessPoolExecutor(1, initializer=_prepare, initargs=(os.getpid(),)) as alone:
            try:
                return alone.submit(_timed, work, job).result()
            except BrokenProcessPool:
                return WorkerEnded("its process ended")

    def _start(self) -> ProcessPoolExecutor:
        """The processes, started when first needed."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, initializer=_prepare, initargs=(os.getpid(),))
        return self._pool

    def _end(self) -> None:
        """End the processes; jobs that wait are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
