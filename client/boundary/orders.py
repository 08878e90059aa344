"""Orders: what the centre asks, checked against the run config before any of it is used.

In: a message's records. Out: a frozen order, or a refusal. Every key and record is known, every value is of its type and
range, and what the run config also says must be the same there, because the hospital's policy looked at the run config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from shared.config import RunConfig, is_name
from shared.groups import TENSOR_GROUPS
from shared.refusals import Refusal, Refused
from shared.wire.codecs import PLAIN

ORDER_KEYS = ("run", "server-round", "proximal-mu", "held-round", "model", "groups", "stage")
STAGES = ("initial", "final")
HEADS = "heads-"  # begins the name of a record with a set of heads
MOST_HEAD_SETS = 32  # of an ensemble, one for each hospital


class OrderError(Refused):
    """An order is malformed, or does not fit the run config."""

    code = Refusal.ORDER


@dataclass(frozen=True)
class TrainOrder:
    """Train a round.

    Attributes:
      run: name of the run, fit to be a folder's name.
      round_number: from 1 to federation.rounds.
      proximal_mu: of FedProx; 0 for other strategies.
      arrays: the global tensors, or the coded difference to those of an earlier round; their names and values are not
        checked yet.
      held_round: the earlier round; 0 for the initial model, None where the tensors are whole.
      model: hash of the global tensors; empty where they are whole.
    """

    run: str
    round_number: int
    proximal_mu: float
    arrays: ArrayRecord
    held_round: int | None = None
    model: str = ""


@dataclass(frozen=True)
class HeadsOrder:
    """Give your heads.

    Attributes:
      run: as in TrainOrder.
      groups: of TENSOR_GROUPS, each once.
    """

    run: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationOrder:
    """Test a model of the run on your validation and test splits.

    Attributes:
      run: as in TrainOrder.
      stage: one of STAGES.
      encoder: the encoder's tensors, not checked yet.
      heads: one set of heads, or several of an ensemble; in order of the records' names, not checked yet.
    """

    run: str
    stage: str
    encoder: ArrayRecord
    heads: tuple[ArrayRecord, ...]


def train_order(content: RecordDict, config: RunConfig) -> TrainOrder:
    """Read an order to train.

    Raises:
      OrderError: see the module.
    """
    keys = _config(content, {"run", "server-round"}, {"proximal-mu", "held-round", "model"})
    _only(content, {"arrays": ArrayRecord})
    number = _integer(keys, "server-round", 1, config.federation.rounds)
    coded = "held-round" in keys
    if coded != ("model" in keys) or (coded and config.federation.codec == PLAIN):
        raise OrderError(
            "held-round and model do not stand together, or federation.codec of the run config codes nothing"
        )
    held = _integer(keys, "held-round", 0, number - 1) if coded else None
    model = str(keys.get("model", ""))
    if coded and not re.fullmatch(r"[0-9a-f]{64}", model):
        raise OrderError("model is no hash")
    expected = config.federation.proximal_mu if config.federation.strategy == "fedprox" else 0.0
    given = keys.get("proximal-mu", 0.0)
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given) or given != expected:
        raise OrderError("proximal-mu is not federation.proximal_mu of the run config")
    return TrainOrder(_run(keys), number, float(given), content.array_records["arrays"], held, model)


def heads_order(content: RecordDict) -> HeadsOrder:
    """Read an order to give heads.

    Raises:
      OrderError: see the module.
    """
    keys = _config(content, {"run", "groups"})
    _only(content, {})
    groups = keys["groups"].split(",") if isinstance(keys["groups"], str) and len(keys["groups"]) < 100 else []
    if not groups or len(set(groups)) != len(groups) or not set(groups) <= set(TENSOR_GROUPS):
        raise OrderError(f"groups are not some of {', '.join(TENSOR_GROUPS)}, each once")
    return HeadsOrder(_run(keys), tuple(groups))


def evaluation_order(content: RecordDict, config: RunConfig) -> EvaluationOrder:
    """Read an order to test a model.

    Raises:
      OrderError: see the module.
    """
    keys = _config(content, {"run", "stage"})
    if keys["stage"] not in STAGES:
        raise OrderError(f"the stage is not one of {', '.join(STAGES)}")
    names = sorted(name for name in content if name.startswith(HEADS))
    _only(content, {"arrays": ArrayRecord} | dict.fromkeys(names, ArrayRecord))
    most = MOST_HEAD_SETS if keys["stage"] == "final" and config.federation.heads == "ensemble" else 1
    if not 1 <= len(names) <= most:
        raise OrderError(f"{len(names)} sets of heads, expected 1 to {most} with federation.heads of the run config")
    arrays = content.array_records
    return EvaluationOrder(_run(keys), str(keys["stage"]), arrays["arrays"], tuple(arrays[name] for name in names))


def no_order(content: RecordDict) -> None:
    """Check that a question without an order has none.

    Raises:
      OrderError: it has a record.
    """
    if len(content):
        raise OrderError("records with a question that has none")


def _config(content: RecordDict, needed: set[str], optional: Collection[str] = ()) -> ConfigRecord:
    """The order's keys: all that are needed, and no unknown one."""
    keys = content.get("config")
    if not isinstance(keys, ConfigRecord) or not needed <= keys.keys() <= needed.union(optional):
        raise OrderError(f"an order without exactly the keys {sorted(needed)}")
    return keys


def _only(content: RecordDict, kinds: Mapping[str, type]) -> None:
    """Check that beside the order's keys there are exactly these records."""
    if content.keys() != kinds.keys() | {"config"} or any(type(content[name]) is not kinds[name] for name in kinds):
        raise OrderError(f"records other than the expected {len(kinds)} beside the order's keys")


def _integer(keys: ConfigRecord, key: str, least: int, most: int) -> int:
    value = keys[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise OrderError(f"{key} is not a whole number from {least} to {most}")
    return value


def _run(keys: ConfigRecord) -> str:
    """The run's name: it becomes a folder's name."""
    if not is_name(keys["run"]):
        raise OrderError("the run's name has other than up to 64 letters, digits, '.', '_' or '-'")
    return str(keys["run"])
