"""Run experiments: draw the hospitals, train what is missing, measure each arm; all of it resumable and in small pieces."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch

from simulations.studies.design import ROOT, STORE, Job, trainings
from simulations.studies.trials import draw_for, measure_job, train_one


def run_jobs(
    wanted: list[Job],
    store: Path = STORE,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Run what is not stored yet.

    Draws the hospitals, trains what is missing and measures an arm as soon as its models are there; each piece on its own
    core. Finished results are on disk at once, so that a stopped run resumes.

    Args:
      wanted: jobs; those with a stored result of their recipe are left alone.
      store: folder of drawn hospitals and trained models.
      workers: processes of one thread each; by default one per core, one where there is an accelerator.
      say: called with a line per finished piece.
    """
    left = [job for job in wanted if not job.done()]
    say(f"{len(wanted) - len(left)} of {len(wanted)} results are stored")
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    draw_for(left, store, say)
    missing = {t.folder(store): t for job in left for t in trainings(job) if not t.folder(store).is_dir()}
    pieces, done, started = len(missing) + len(left), 0, time.monotonic()
    running: set[Future] = set()
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver"), initializer=_one_thread) as pool:
        try:
            while missing or left or running:
                ready = [job for job in left if all(t.folder(store).is_dir() for t in trainings(job))]
                while len(running) < workers and (ready or missing):
                    if ready:
                        left.remove(ready[0])
                        running.add(pool.submit(measure_job, ready.pop(0), store, commit()))
                    else:
                        running.add(pool.submit(train_one, missing.pop(next(iter(missing))), store))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    done += 1
                    left_min = (time.monotonic() - started) / done * (pieces - done) / 60
                    say(f"{done} of {pieces}: {future.result()}; about {left_min:.0f} min left")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _one_thread() -> None:
    """Small models waste a second core's time; two trainings side by side do not."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def commit() -> str:
    """The commit of the code, with "+" where files differ from it."""
    try:
        head = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "--", "shared", "client", "server", "simulations/*.py"],
            cwd=ROOT,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")
