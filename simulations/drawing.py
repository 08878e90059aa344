"""Processes that draw."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch


def drawing_pool(workers: int | None = None) -> ProcessPoolExecutor:
    """Processes with one thread each, by default one per core.

    One thread, because the last bits of a sum depend on how many share it, and a seed is to give the same bytes everywhere.
    Not forked: a process that has run torch may hold a lock.
    """
    return ProcessPoolExecutor(
        workers or os.cpu_count(),
        mp_context=get_context("forkserver"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
