"""A run's heads and optimiser state on the hospital's own disk, between its rounds; bounded, whatever a centre begins."""

from __future__ import annotations

import io
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch

from client.boundary.footing import Footing
from client.training.round import Learner, TrainError
from shared.host.files import replace_bytes
from shared.refusals import Refusal
from shared.wire.records import Tensors

KEPT_ROUNDS = 3
# A run of the default model leaves about 1.1 GB: three rounds of heads and optimisers, and the encoder last received; with a
# codec half a GB more, two encoders a round.
MOST_RUNS, MOST_BYTES, MOST_AGE_S = 20, 40 * 2**30, 180 * 86400.0
IN_PROGRESS_S = 86400.0  # a run that wrote something within that time may go on
_UNREADABLE = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, UnpicklingError)


@dataclass(frozen=True)
class Exchange:
    """What a codec needs of a round in the next one; stays in the hospital.

    Attributes:
      received: the global tensors that the round began with.
      residual: what its update lacked after coding.
    """

    received: Tensors
    residual: Tensors


@dataclass(frozen=True)
class LocalState:
    """A run's heads and optimiser state on the hospital's disk; nothing of it leaves.

    One file per round, written beside its place and moved there in one step; the last KEPT_ROUNDS are kept, so that a round
    which the server asks for again, after a crash, begins where it began, even if the server's newest checkpoint was
    damaged and it goes on from the one before. Flower's context state would lose all this on
    a restart of the node, and silently above 400 MB.

    Attributes:
      folder: of one run, in the site's state folder.
    """

    folder: Path

    def save(self, learner: Learner, round_number: int, exchange: Exchange | None = None) -> None:
        """Write heads, balance and optimisers' state after `round_number`, and what a codec needs.

        Raises:
          TrainError: the disk is full, or the folder cannot be written.
        """
        try:
            self._save(learner, round_number, exchange)
        except OSError as error:
            raise self._unwritable(error) from error

    def save_footing(self, footing: Footing) -> None:
        """Write what a test of the run's final model is compared with.

        Raises:
          TrainError: as in save.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save(asdict(footing), buffer)
            replace_bytes(self.folder / "footing.pt", buffer.getbuffer())
        except OSError as error:
            raise self._unwritable(error) from error

    def footing(self) -> Footing | None:
        """Read what save_footing wrote last; None if nothing was.

        Raises:
          TrainError: the file is damaged.
        """
        path = self.folder / "footing.pt"
        if not path.is_file():
            return None
        try:
            return Footing(**torch.load(path, weights_only=True))
        except _UNREADABLE as error:
            raise self._damaged(error) from error

    def _unwritable(self, error: OSError) -> TrainError:
        return TrainError(
            f"the site's state of run {self.folder.name!r} cannot be written ({error.strerror}), so its update does not leave; the "
            "site must make room or correct the rights of its state folder",
            Refusal.STATE,
        )

    def _damaged(self, error: Exception) -> TrainError:
        return TrainError(
            f"the site's state of run {self.folder.name!r} is damaged or does not fit the model ({type(error).__name__}); "
            "start the run under a new run.id, or delete the run's folder in the site's state folder",
            Refusal.STATE,
        )

    def _save(self, learner: Learner, round_number: int, exchange: Exchange | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, object] = {
            "heads": {n: tensor for n, tensor in learner.model.state_dict().items() if not n.startswith("encoder.")},
            "balance": learner.balance.state_dict(),
            "optimisers": learner.optimisers.state_dict(),
        }
        if exchange is not None:
            content["received"] = {name: torch.from_numpy(value) for name, value in exchange.received.items()}
            content["residual"] = {name: torch.from_numpy(value) for name, value in exchange.residual.items()}
        for left in self.folder.glob("*.partial"):  # of a process that was killed
            left.unlink()
        buffer = io.BytesIO()
        torch.save(content, buffer)  # to a file, a full disk is a RuntimeError without a cause
        replace_bytes(self._path(round_number), buffer.getbuffer())
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
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        return rounds[-1]

    def exchange(self, round_number: int) -> Exchange | None:
        """Read what a round with a codec left; None if it left nothing.

        Raises:
          TrainError: the file is damaged.
        """
        path = self._path(round_number)
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            if "received" not in saved:
                return None
            return Exchange(*({n: t.numpy() for n, t in saved[key].items()} for key in ("received", "residual")))
        except _UNREADABLE as error:
            raise self._damaged(error) from error

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:05d}.pt"

    def _rounds(self) -> list[int]:
        """Rounds whose state is there, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.pt"))


def make_room(runs: Path, run: str, now: float | None = None) -> None:
    """Remove the state of old runs before a new one begins.

    Args:
      runs: folder with one folder a run.
      run: the one that is asked for; it stays.
      now: seconds since 1970; by default the clock's.
    Raises:
      TrainError: the runs in progress alone are too many or too large, so that a new one is refused.
    """
    moment = time.time() if now is None else now
    others = [path for path in runs.iterdir() if path.is_dir() and path.name != run] if runs.is_dir() else []
    newest = sorted(((_last_use(path), path) for path in others), key=lambda pair: (-pair[0], pair[1].name))
    count, size = 1, 0
    for used, path in newest:
        bytes_here = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        fits = count < MOST_RUNS and size + bytes_here <= MOST_BYTES and moment - used <= MOST_AGE_S
        if not fits and moment - used > IN_PROGRESS_S:
            shutil.rmtree(path, ignore_errors=True)
            continue
        count, size = count + 1, size + bytes_here
    if not (runs / run).is_dir() and (count > MOST_RUNS or size > MOST_BYTES):
        raise TrainError(
            f"{count - 1} runs in progress hold {size} bytes in {runs}, at most {MOST_RUNS} and {MOST_BYTES}; let one end first",
            Refusal.STATE,
        )


def _last_use(folder: Path) -> float:
    """When something in a run's folder was last written."""
    return max((path.stat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
