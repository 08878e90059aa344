"""A run's global model as one file with its card, for use outside of the federation.

In: the folder of a finished run. Out: a model file as shared/model/starting.py reads it, which `hemafed-client segment` takes.
Nothing of a hospital is in it but what training left in the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from server.evaluation.evaluate import EvaluationError, load_model
from server.storage.run_folder import read_config, read_summary
from shared.model.starting import write_model


def export_model(run: Path, path: Path) -> None:
    """Write a run's final model, float32.

    Args:
      run: the run's folder.
      path: of the file, ending in .safetensors.
    Raises:
      EvaluationError: the run did not finish, its heads are several or without a decoder, or the file's name is of another kind.
      RunError, CheckpointError: the folder is no run, or damaged.
    """
    if path.suffix != ".safetensors":
        raise EvaluationError(f"{path} should end in .safetensors: nothing else reads the file")
    config = read_config(run)
    model, sets = load_model(run, config, "final")
    if len(sets) > 1 or not any(name.startswith("seg.") for name in sets[0]):
        raise EvaluationError(
            f"run {run.resolve().name!r} has federation.heads = {config.federation.heads!r}, which is not one whole model; "
            "expected 'average'"
        )
    model.load_state_dict(sets[0], strict=False)
    summary = read_summary(run)
    facts = {
        "data": f"slices of {len(summary.sites)} hospitals, in run {run.resolve().name}",
        "run": run.resolve().name,
        "config": config.hash(),
        "rounds": config.federation.rounds,
    }
    write_model(path, model.cpu(), config.model, facts, torch.float32)
