"""Each model of a run is tested here once: what was tested is on the disk before a score is made, and so is the answer.

A run's models are the initial and the final one, and the one that each round begins with (client/training/round_numbers.py).
`evaluations.jsonl` in the site's state folder has a line for each test: when, which run, which stage, the model's hash. It
outlives a run's folder, so that a run cannot be tested again after its state was cleaned away. The answer lies in the run's
folder, and a repeated request gets that, byte for byte.
"""

from __future__ import annotations

import fcntl
import io
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.host.files import replace_bytes
from shared.refusals import Refusal, Refused
from shared.rules import Policy
from shared.site import Site

FILE = "evaluations.jsonl"
MONTH_S = 30 * 86400.0
KEPT_S = 400 * 86400.0  # longer than a study's runs
MOST_LINES = 100_000  # of rounds, and of other tests, at a hospital without a limit a month; 15 MB each
_ROUND = "round-"  # begins the stage of a round

Answer = Mapping[str, NDArray[Any]]  # "val/counts" and so on; of a split that is withheld none


class EvaluationsError(Refused):
    """The hospital tests no more models of this run, or this month."""

    code = Refusal.EVALUATIONS


class LedgerError(Refused):
    """The list of tests or a stored answer cannot be read or written, so nothing is tested."""

    code = Refusal.STATE


def reserve(site: Site, run: str, stage: str, model: str, now: float | None = None) -> None:
    """Note a test before it is made; the same model may be noted again, since its test may have been cut off.

    Args:
      site: whose.
      run, stage: which of the run's models.
      model: its hash.
      now: seconds since 1970; by default the clock's.
    Raises:
      EvaluationsError: another model was tested as this stage's, or the policy allows no more.
      LedgerError: the list cannot be read or written.
    """
    moment = time.time() if now is None else now
    path = site.state / FILE
    try:
        site.state.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed: two messages may be answered at a time
            lines = _read(path)
            same = [line for line in lines if (line["run"], line["stage"]) == (run, stage)]
            if same:
                if same[-1]["model"] != model:
                    raise EvaluationsError(f"another {stage} model of run {run!r} was tested before")
                return
            # Rounds are many: they have a limit of their own, and push no other test out of the list.
            alike = [line for line in lines if _is_round(line["stage"]) == _is_round(stage)]
            others = [line for line in lines if _is_round(line["stage"]) != _is_round(stage)]
            _check_limits(site.policy, run, stage, alike, moment)
            alike.append({"time": moment, "run": run, "stage": stage, "model": model})
            recent = [line for line in others + alike[-MOST_LINES:] if line["time"] > moment - KEPT_S]
            replace_bytes(path, "".join(json.dumps(line) + "\n" for line in recent).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} cannot be read or written ({type(error).__name__}: {error})") from error


def round_stage(number: int) -> str:
    """Name the stage of a run at which a round's model is tested."""
    return f"{_ROUND}{number:05d}"


def _is_round(stage: str) -> bool:
    return stage.startswith(_ROUND)


def tested(site: Site, run: str, stage: str) -> str | None:
    """The hash of the model that was tested as this stage's; None if none was.

    Raises:
      LedgerError: the list cannot be read.
    """
    path = site.state / FILE
    try:
        return next((line["model"] for line in _read(path) if (line["run"], line["stage"]) == (run, stage)), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _read(path: Path) -> list[dict[str, Any]]:
    """The list of tests; a line that is none is an error, since it may hide one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for line in lines:
        if not isinstance(line["time"], int | float) or not all(
            isinstance(line[k], str) for k in ("run", "stage", "model")
        ):
            raise ValueError("a line that is no test")
    return lines


def _check_limits(policy: Policy, run: str, stage: str, alike: list[dict[str, Any]], now: float) -> None:
    """Check the policy's limits; `alike` are the tests that count towards the same ones."""
    key, limit = "round_counts_per_month", policy.round_counts_per_month
    if not _is_round(stage):
        if sum(line["run"] == run for line in alike) >= policy.evaluations_per_run:
            raise EvaluationsError(f"policy.evaluations_per_run is {policy.evaluations_per_run}")
        key, limit = "evaluations_per_month", policy.evaluations_per_month
    # A clock that was put back must not free tests: what lies in the future counts.
    if limit is not None and sum(line["time"] > now - MONTH_S for line in alike) >= limit:
        raise EvaluationsError(f"policy.{key} is {limit}")


def keep_answer(folder: Path, stage: str, answer: Answer, facts: Mapping[str, object]) -> None:
    """Store an answer, on disk when this returns.

    Args:
      folder: of the run, in the site's state folder.
      stage: which of the run's models was tested.
      answer: what leaves.
      facts: JSON-ready, what leaves beside it.
    Raises:
      LedgerError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **answer, facts=np.array(json.dumps(dict(facts))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(_place(folder, stage), buffer.getvalue())
    except OSError as error:
        raise LedgerError(f"the answer cannot be kept in {folder} ({error.strerror})") from error


def kept_answer(folder: Path, stage: str) -> tuple[Answer, dict[str, object]] | None:
    """The stored answer and its facts; None if there is none.

    Raises:
      LedgerError: it is damaged.
    """
    path = _place(folder, stage)
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop("facts")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise LedgerError(f"{path} is damaged ({type(error).__name__})") from error


def _place(folder: Path, stage: str) -> Path:
    return folder / f"answer-{stage}.npz"
