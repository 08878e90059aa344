"""Speed of training: our step beside a plain fp32 loop of the same model, and both beside the machine.

    python -m simulations.benchmarks.train [VARIANT] [BATCH] [STEPS]

Both loops see the same drawn slices, model, losses and AdamW. The plain loop is what one writes first: it resamples and
augments every slice each time and computes in fp32, one optimiser loop over the parameters. Steps of the two alternate, so that
what else the machine does hits both. The peak is that of one large matrix product, measured in the same run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from client.training.round import build_learner, train_step, training_inputs
from shared.config import RunConfig, parse_config
from shared.model.batches import make_batch, make_inputs
from shared.model.losses import TaskBalance, slice_losses
from shared.model.scoring import best_device, build_model
from shared.slices import SliceCache
from simulations.phantom.draw_caches import draw_hospitals
from simulations.phantom.hospitals import HOSPITALS

PEAK_SIDE = 4096  # of the matrices whose product is the machine's peak


def plain_loop(cache: SliceCache, config: RunConfig) -> Callable[[], float]:
    """A step of the plain loop; returns the seconds that loading the batch took."""
    device = best_device()
    model = build_model(config.model, 0).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    balance = TaskBalance(config.loss).to(device)
    generator = torch.Generator().manual_seed(0)
    rows = cache.rows("train")

    def step() -> float:
        began = time.perf_counter()
        chosen = rows[torch.randperm(len(rows), generator=generator)[: config.train.batch].numpy()]
        inputs = make_inputs(cache, chosen, config.model.windows(), model.shape.image_size)
        batch = make_batch(inputs, np.arange(len(chosen)), config.train.augment, generator).to(device)
        loaded = time.perf_counter() - began
        optimiser.zero_grad()
        balance.total(slice_losses(model(batch.image), batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimiser.step()
        return loaded

    return step


def our_loop(cache: SliceCache, config: RunConfig) -> Callable[[], float]:
    """A step as client/training/round.py takes it; returns the seconds that loading the batch took."""
    learner = build_learner(config, best_device())
    learner.model.train()
    learner.optimisers.set_rate(0.1)
    inputs = training_inputs(cache, config, "benchmark")
    generator = torch.Generator().manual_seed(0)
    device = best_device()

    def step() -> float:
        began = time.perf_counter()
        chosen = torch.randperm(len(inputs), generator=generator)[: config.train.batch].numpy()
        batch = make_batch(inputs, chosen, config.train.augment, generator).to(device)
        loaded = time.perf_counter() - began
        train_step(learner, batch, config)
        return loaded

    return step


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step, and of loading its batch."""
    began = time.perf_counter()
    loaded = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, loaded


def peak_flops(dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product; the best of several."""
    a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=best_device()).to(dtype)
    seconds = [timed(lambda: float((a @ a)[0, 0]))[0] for _ in range(6)]
    return 2 * PEAK_SIDE**3 / min(seconds)


def flops_per_slice(config: RunConfig) -> float:
    """Count FLOPs of the forward and backward pass, matrix products only."""
    model = build_model(config.model, 0)
    side = model.shape.image_size
    with FlopCounterMode(display=False) as counter:
        prediction = model(torch.rand(2, len(config.model.windows()), side, side))
        sum(part.sum() for part in (prediction.hypodensity, prediction.hematoma, prediction.reconstruction)).backward()
    return counter.get_total_flops() / 2  # slices, as batch statistics need more than one


def main(variant: str = "default", batch: str = "8", steps: str = "5") -> None:
    """Measure and print."""
    keys = {"model.variant": variant, "train.batch": int(batch), "train.optimiser": "adamw", "federation.rounds": 1}
    config = parse_config(keys)
    with tempfile.TemporaryDirectory() as folder:
        hospital = replace(HOSPITALS[0], patients=max(8, int(batch)))
        cache = draw_hospitals([hospital], 0, Path(folder))[hospital.name]
        loops = {
            "plain fp32 loop": plain_loop(cache, replace(config, train=replace(config.train, precision="fp32"))),
            "ours": our_loop(cache, config),
            "ours, Muon": our_loop(cache, replace(config, train=replace(config.train, optimiser="muon"))),
        }
        for step in loops.values():
            step()  # memory is claimed and threads begin
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for _ in range(int(steps)):
            for name, step in loops.items():
                times[name].append(timed(step))
    peaks = {"fp32": peak_flops(torch.float32), "bf16": peak_flops(torch.bfloat16)}
    work = flops_per_slice(config) * int(batch)
    page = Table("loop", "slices/s", "times the plain loop", "loading, share of a step", "share of the bf16 peak")
    plain = statistics.median(seconds for seconds, _ in times["plain fp32 loop"])
    for name, pairs in times.items():
        seconds = statistics.median(pair[0] for pair in pairs)
        loaded = statistics.median(pair[1] for pair in pairs)
        page.add_row(
            name,
            f"{int(batch) / seconds:.2f}",
            f"{plain / seconds:.2f}",
            f"{loaded / seconds:.1%}",
            f"{work / seconds / peaks['bf16']:.0%}",
        )
    console = Console(width=110)
    console.print(f"{variant}, batch {batch}: {work / int(batch) / 1e9:.1f} GFLOP a slice; peak ", end="")
    console.print(", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.items()))
    console.print(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
