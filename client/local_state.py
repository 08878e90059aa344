"""A run's heads and optimiser state on the hospital's own disk, between its rounds."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch

from client.train import Learner, TrainError

KEPT_ROUNDS = 3


@dataclass(frozen=True)
class LocalState:
    """A run's heads and optimiser state on the hospital's disk; nothing of it leaves.

    One file per round, written beside its place and moved there in one step; the last KEPT_ROUNDS are kept, so that a round
    which the server asks for again, after a crash, begins where it began, also where the server's newest checkpoint was
    damaged and it goes on from the one before. Flower's context state would lose all this on
    a restart of the node, and silently above 400 MB.

    Attributes:
      folder: of one run, in the site's state folder.
    """

    folder: Path

    def save(self, learner: Learner, round_number: int) -> None:
        """Write heads, balance and optimisers' state after `round_number`.

        Raises:
          TrainError: the disk is full, or the folder cannot be written; its place is not told.
        """
        try:
            self._save(learner, round_number)
        except OSError as error:
            raise TrainError(
                f"the site's state of run {self.folder.name!r} cannot be written ({error.strerror}), so its update does not leave; the "
                "site must make room or correct the rights of its state folder"
            ) from error

    def _save(self, learner: Learner, round_number: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "heads": {n: tensor for n, tensor in learner.model.state_dict().items() if not n.startswith("encoder.")},
            "balance": learner.balance.state_dict(),
            "optimisers": learner.optimisers.state_dict(),
        }
        for left in self.folder.glob("*.partial"):  # of a process that was killed
            left.unlink()
        partial = self.folder / f"{os.getpid()}.partial"
        buffer = io.BytesIO()
        torch.save(content, buffer)  # to a file, a full disk is a RuntimeError without a cause
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path(round_number))
        for number in self._rounds():
            if not round_number - KEPT_ROUNDS < number <= round_number:
                self._path(number).unlink()

    def restore(self, learner: Learner, before: int | None = None) -> int:
        """Load what the last round left.

        Args:
          learner: its heads, balance and optimisers' state are replaced.
          before: only what was saved before this round counts; by default the newest.
        Returns:
          The round it was saved after; 0 if there is none, and then the learner keeps its initial state.
        Raises:
          TrainError: the file does not fit the model.
        """
        rounds = [number for number in self._rounds() if before is None or number < before]
        if not rounds:
            return 0
        model = learner.model
        device = next(model.parameters()).device
        try:
            saved = torch.load(self._path(rounds[-1]), weights_only=True, map_location=device)
            if saved["heads"].keys() != {name for name in model.state_dict() if not name.startswith("encoder.")}:
                raise KeyError("other heads")
            model.load_state_dict(saved["heads"], strict=False)
            learner.balance.load_state_dict(saved["balance"])
            learner.optimisers.load_state_dict(saved["optimisers"])
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            EOFError,
            OSError,
            UnpicklingError,
        ) as error:
            raise TrainError(
                f"the site's state of run {self.folder.name!r} is damaged or does not fit the model ({type(error).__name__}); "
                "start the run under a new run.id, or delete the run's folder in the site's state folder"
            ) from error
        return rounds[-1]

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:05d}.pt"

    def _rounds(self) -> list[int]:
        """Rounds whose state is there, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.pt"))
