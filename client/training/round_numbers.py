"""The numbers that leave beside a round's update: counts of validation scores and mean losses, once for each round.

A centre chooses the tensors that a round begins with. Numbers of each would be a test of each, so they leave under the rules
of tests (client/boundary/evaluations.py): only of tensors that the hospital can tie to the run, once for each round, and as often in
30 days as policy.round_counts_per_month says. A round without numbers is trained all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from numpy.typing import NDArray

from client.boundary.evaluations import EvaluationsError, keep_answer, kept_answer, reserve, round_stage, tested
from client.boundary.footing import Footing, ModelNotOfRunError, check_round
from client.boundary.orders import TrainOrder
from client.boundary.policy import metrics_refusal
from client.training.round import RoundReport
from shared.config import RunConfig
from shared.site import Site
from shared.wire.records import Tensors, tested_hash

DIGITS = 4  # of a mean loss that leaves: what the centre's log and report show
LOSSES = ("cls", "seg", "rec", "total")


@dataclass(frozen=True)
class RoundNumbers:
    """Numbers that leave beside a round's update.

    Attributes:
      metrics: patients, steps, slices, seconds and sums of losses.
      tally: arrays of the validation split's counts.
      model: hash of the tensors that the round began with.
    """

    metrics: Mapping[str, int | float]
    tally: Mapping[str, NDArray]
    model: str


@dataclass(frozen=True)
class Beside:
    """Decide which numbers may leave beside a round's update.

    Attributes:
      model: hash of the tensors that the round begins with.
      withheld: why numbers do not leave; empty if they do.
      kept: the numbers that left when the round was trained before, and leave again.
    """

    model: str
    withheld: str = ""
    kept: RoundNumbers | None = None

    @property
    def wanted(self) -> bool:
        """Whether numbers are to be made."""
        return not self.withheld and self.kept is None


def open_round(
    site: Site,
    config: RunConfig,
    order: TrainOrder,
    received: Tensors,
    footing: Footing | None,
    folder: Path,
    patients: int,
) -> Beside:
    """Decide before a round is trained which numbers leave with it; noted on the disk when this returns.

    Args:
      site, config, order: the hospital's, the run's, and what is asked.
      received: the tensors that the round begins with; those of round 1 were compared with the run's seed.
      footing: of the rounds that the hospital trained before.
      folder: of the run, in the site's state folder.
      patients: how many the numbers cover.
    Raises:
      LedgerError: the list of tests cannot be read or written, or the stored numbers are damaged.
    """
    model = tested_hash(received, [])
    if refusal := metrics_refusal(site, patients):
        return Beside(model, refusal)
    kept = _kept_numbers(folder, order.round_number)
    if kept is not None:
        return Beside(model, kept=kept)
    try:
        if order.round_number > 1:
            check_round(config, footing, order.round_number, received)
        elif config.model.brought and tested(site, order.run, "initial") is None:
            raise ModelNotOfRunError("the run's initial model was not tested here")
        reserve(site, order.run, round_stage(order.round_number), model)
    except (ModelNotOfRunError, EvaluationsError) as error:
        return Beside(model, str(error))
    return Beside(model)


def coarse_losses(report: RoundReport) -> dict[str, int | float]:
    """Return a round's report as it leaves: mean losses and seconds to DIGITS digits, the losses as sums again."""
    numbers = asdict(report)
    for name in LOSSES:
        numbers[name] = _coarse(numbers[name] / report.slices) * report.slices
    return numbers | {"seconds": _coarse(report.seconds)}


def _coarse(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def keep_numbers(folder: Path, round_number: int, numbers: RoundNumbers) -> RoundNumbers:
    """Store a round's numbers, on disk when this returns.

    Returns:
      What leaves: the same, or what another request for the round stored meanwhile.
    Raises:
      LedgerError: they cannot be written.
    """
    other = _kept_numbers(folder, round_number)
    if other is not None:
        return other
    facts = {"metrics": dict(numbers.metrics), "model": numbers.model}
    keep_answer(folder, round_stage(round_number), numbers.tally, facts)
    return numbers


def _kept_numbers(folder: Path, round_number: int) -> RoundNumbers | None:
    kept = kept_answer(folder, round_stage(round_number))
    if kept is None:
        return None
    tally, facts = kept
    return RoundNumbers(facts["metrics"], tally, str(facts["model"]))
