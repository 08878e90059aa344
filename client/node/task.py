"""One message on its way from the process that is connected to the one that answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from client.node.frames import FrameError


@dataclass(frozen=True)
class Task:
    """One message and what is needed to answer it, as frames.

    Attributes:
      place: site_yaml, node_id, task_id and the authority's certificate in PEM, as JSON.
      run: Flower's Run, serialised.
      bundle: the run's app bundle.
      tree: Flower's ObjectTree of the message, serialised.
      objects: contents of the tree's objects.
    """

    place: bytes
    run: bytes
    bundle: bytes
    tree: bytes
    objects: tuple[bytes, ...]

    def frames(self) -> list[bytes]:
        """As they are sent."""
        return [self.place, self.run, self.bundle, self.tree, *self.objects]

    @classmethod
    def of(cls, frames: list[bytes]) -> Task:
        """The inverse of `frames`.

        Raises:
          FrameError: there are too few.
        """
        if len(frames) < 5:
            raise FrameError(f"a message in {len(frames)} parts, expected at least 5")
        return cls(*frames[:4], tuple(frames[4:]))


def make_place(site_yaml: Path, node_id: int, authority: str) -> bytes:
    """The first frame of a task."""
    return json.dumps({"site_yaml": str(site_yaml), "node_id": node_id, "authority": authority}).encode()
