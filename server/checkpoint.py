"""What a crash must not lose: the global tensors, the server optimiser and the round, in one file.

The file is written beside the old one and swapped in, so there is always one whole checkpoint. Format: safetensors;
the round stands in its metadata, the optimiser's tensors under `optimiser.`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shared.wire import Tensors

FILE = "global.safetensors"


class CheckpointError(ValueError):
    """A checkpoint is missing or damaged; names the file and the next step."""


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Attributes:
      round_number: the last finished round; 0 before the first.
      arrays: global tensors, float32.
      optimiser: the server optimiser's tensors; empty for FedAvg and FedProx.
    """

    round_number: int
    arrays: dict[str, NDArray[np.float32]]
    optimiser: dict[str, NDArray[np.float32]]


def write_tensors(path: Path, arrays: Tensors, metadata: dict[str, str]) -> None:
    """A safetensors file, replaced in one step and on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, partial, metadata=metadata)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, NDArray], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
      CheckpointError: no such file, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; check the run's name, or start it without run.resume")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}); restore the file, or start a new run"
        ) from error


def save_checkpoint(folder: Path, round_number: int, arrays: Tensors, strategy: FedAvg) -> None:
    """Write the state after a round to `folder`."""
    optimiser = {f"optimiser.{name}": value for name, value in _optimiser_state(strategy, list(arrays)).items()}
    write_tensors(folder / FILE, {**arrays, **optimiser}, {"round": json.dumps(round_number)})


def has_checkpoint(folder: Path) -> bool:
    """Whether a state was ever written there."""
    return (folder / FILE).is_file()


def load_checkpoint(folder: Path) -> Checkpoint:
    """The state after the last finished round.

    Raises:
      CheckpointError: none there, or damaged.
    """
    tensors, metadata = read_tensors(folder / FILE)
    return Checkpoint(
        round_number=int(json.loads(metadata["round"])),
        arrays={n: v for n, v in tensors.items() if not n.startswith("optimiser.")},
        optimiser={n.removeprefix("optimiser."): v for n, v in tensors.items() if n.startswith("optimiser.")},
    )


def _optimiser_state(strategy: FedAvg, names: list[str]) -> dict[str, NDArray]:
    """Moments of Flower's server optimisers, by tensor name."""
    if isinstance(strategy, FedAdam):
        moments = {"m": strategy.m_t or {}, "v": strategy.v_t or {}}
    elif isinstance(strategy, FedAvgM):
        moments = {"m": dict(zip(names, strategy.momentum_vector or [], strict=False))}
    else:
        moments = {}
    return {f"{kind}.{name}": np.asarray(value) for kind, values in moments.items() for name, value in values.items()}


def restore_optimiser(strategy: FedAvg, checkpoint: Checkpoint) -> None:
    """Give Flower's server optimiser back what it had after the checkpoint's round."""

    def moments(kind: str) -> dict[str, NDArray]:
        return {n.removeprefix(f"{kind}."): v for n, v in checkpoint.optimiser.items() if n.startswith(f"{kind}.")}

    if isinstance(strategy, FedAdam):
        strategy.m_t, strategy.v_t = moments("m") or None, moments("v") or None
    elif isinstance(strategy, FedAvgM):
        saved = moments("m")
        strategy.momentum_vector = [saved[name] for name in checkpoint.arrays] if saved else None
        strategy.current_arrays = ArrayRecord({name: Array(value) for name, value in checkpoint.arrays.items()})
