"""Checkpoint: the global tensors, the server optimiser, the round and who took part, in one file per round.

A file is written beside its place and moved there in one step; the last KEPT rounds are kept, and each carries a hash of its
content, so that a damaged one is found and the one before is used. Format: safetensors; round, sites and hash are in
the metadata, the optimiser's tensors under `optimiser.`. The server draws no random numbers: what is random in a run is
drawn in hospitals from the run's seed, the site and the round, so the round is all of the random state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.errors import HemafedError
from shared.host.files import replace_bytes
from shared.wire.records import Tensors

KEPT = 2
_HASH = "sha256"  # key of the metadata
_HELD = "held."  # begins the names of what hospitals hold
_KINDS = ("optimiser.m.", "optimiser.v.")  # begin the names of first and second moments


class CheckpointError(HemafedError, ValueError):
    """A checkpoint is missing or damaged; names the file and the next step."""


@dataclass(frozen=True)
class Moments:
    """State of a server optimiser; empty before the first round, and always for FedAvg and FedProx.

    Attributes:
      first: tensor name -> momentum of FedAvgM, first moment of FedAdam; float32.
      second: tensor name -> second moment of FedAdam; float32.
    """

    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Attributes:
      round_number: the last finished round; 0 before the first.
      sites: who took part in it.
      arrays: global tensors, float32.
      moments: what the server optimiser remembers.
      held: the tensors that the round began with at every hospital of `sites`; empty without a codec.
    """

    round_number: int
    sites: tuple[str, ...]
    arrays: dict[str, NDArray[np.float32]]
    moments: Moments
    held: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def write_tensors(path: Path, arrays: Tensors, metadata: dict[str, str]) -> None:
    """A safetensors file with a hash of its content, replaced in one step and on disk when this returns.

    Raises:
      OSError: it cannot be written, as on a full disk; what was there is there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    for left in path.parent.glob(f"{path.name}.*.partial"):  # of a process that was killed
        left.unlink(missing_ok=True)
    replace_bytes(path, save(whole, metadata=metadata | {_HASH: _hash(whole, metadata)}))


def read_tensors(path: Path) -> tuple[dict[str, NDArray], dict[str, str]]:
    """Tensors and metadata of a file that write_tensors wrote.

    Raises:
      CheckpointError: no such file, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; check the run's name, or start it without run.resume")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}); restore the file, or start a new run"
        ) from error
    if metadata.pop(_HASH, "") != _hash(tensors, metadata):
        raise CheckpointError(
            f"checkpoint {path} is damaged (its content has another hash than it had); restore the file, or start a new run"
        )
    return tensors, metadata


def _hash(arrays: Tensors, metadata: dict[str, str]) -> str:
    """SHA-256 over metadata and, in order of their names, names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\0".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path,
    round_number: int,
    arrays: Tensors,
    moments: Moments,
    sites: Sequence[str] = (),
    held: Tensors = MappingProxyType({}),
) -> None:
    """Write the state after a round to `folder`, and forget all but the last KEPT.

    Raises:
      OSError: it cannot be written; the state before is there still.
    """
    kinds = zip(_KINDS, (moments.first, moments.second), strict=True)
    optimiser = {kind + name: value for kind, values in kinds for name, value in values.items()}
    beside = optimiser | {_HELD + name: value for name, value in held.items()}
    metadata = {"round": json.dumps(round_number), "sites": json.dumps(sorted(sites))}
    write_tensors(folder / f"round-{round_number:05d}.safetensors", {**arrays, **beside}, metadata)
    for path in checkpoints(folder)[KEPT:]:
        path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """Files of finished rounds, newest first."""
    return sorted(folder.glob("round-*.safetensors"), reverse=True)


def load_checkpoint(folder: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint:
    """The state after the last finished round whose file is whole.

    Args:
      folder: of a run.
      say: called with a line for each damaged file that is skipped.
    Raises:
      CheckpointError: there is none, or all are damaged.
    """
    files = checkpoints(folder)
    for number, path in enumerate(files, 1):
        try:
            tensors, metadata = read_tensors(path)
        except CheckpointError as error:
            if number == len(files):
                raise
            say(f"{error}; using the one before")
            continue
        return Checkpoint(
            round_number=int(json.loads(metadata["round"])),
            sites=tuple(json.loads(metadata["sites"])),
            arrays={n: v for n, v in tensors.items() if not n.startswith(("optimiser.", _HELD))},
            moments=Moments(*({n.removeprefix(k): v for n, v in tensors.items() if n.startswith(k)} for k in _KINDS)),
            held={n.removeprefix(_HELD): v for n, v in tensors.items() if n.startswith(_HELD)},
        )
    raise CheckpointError(f"no checkpoint in {folder}; check the run's name, or start it without run.resume")
