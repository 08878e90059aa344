"""The groups of the model's tensors, and which of them travel."""

from __future__ import annotations

TENSOR_GROUPS = ("encoder", "cls", "seg", "rec")
HEADS = TENSOR_GROUPS[1:]


def group(name: str) -> str:
    """Return the part of the model that a tensor belongs to: one of TENSOR_GROUPS."""
    return name.split(".", 1)[0]


def groups_shared(share: str) -> tuple[str, ...]:
    """Return the groups that travel in a round, for federation.share "encoder" or "all"."""
    return ("encoder",) if share == "encoder" else TENSOR_GROUPS
