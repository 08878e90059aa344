"""Questions to a hospital's real ClientApp, and what its refusals say."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from shared.config import parse_config
from shared.groups import HEADS
from shared.model.scoring import build_model
from shared.refusals import TEXTS
from shared.wire.records import Tensors, from_record, shapes_of, to_arrays, to_record
from tests.conftest import small_config

NAME = "hospital-01"


def ask(node: dict, kind: str, content: RecordDict | None = None, flat: dict | None = None) -> Message:
    """Send one message to the ClientApp of a node."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(content or RecordDict(), dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = "1"
    return app(message, Context(1, 1, node, RecordDict(), flat or small_config()))


def model_record(groups: tuple[str, ...], flat: dict | None = None) -> ArrayRecord:
    config = parse_config(flat or small_config())
    return to_record(to_arrays(build_model(config.model, config.run.seed).state_dict(), groups))


def train_order(**keys: object) -> RecordDict:
    order = {"server-round": 1, "run": "test"} | keys
    return RecordDict({"arrays": model_record(("encoder",)), "config": ConfigRecord(order)})


def refusal(reply: Message) -> int:
    """The code of a refusal, which says what is fixed for it and no more."""
    assert reply.has_error()
    assert reply.error.reason == TEXTS[reply.error.code]
    return reply.error.code


def tensors(groups: tuple[str, ...], flat: dict | None = None) -> Tensors:
    """Tensors of the run's initial model."""
    config = parse_config(flat or small_config())
    return to_arrays(build_model(config.model, config.run.seed).state_dict(), groups)


def evaluation_order(
    stage: str, encoder: Tensors | None = None, heads: Tensors | None = None, run: str = "test", **more: Tensors
) -> RecordDict:
    """An order to test the run's initial model, or the given encoder and heads."""
    content = {
        "config": ConfigRecord({"run": run, "stage": stage}),
        "arrays": to_record(tensors(("encoder",)) if encoder is None else encoder),
        "heads-average": to_record(tensors(HEADS) if heads is None else heads),
    }
    return RecordDict(content | {f"heads-{name}": to_record(one) for name, one in more.items()})


def evaluate(file: Path, stage: str, flat: dict | None = None, **changes: object) -> Message:
    """The reply of a hospital that is asked to test a model."""
    return ask({"site": str(file)}, "evaluate", evaluation_order(stage, **changes), flat)


def train_rounds(file: Path, rounds: int, run: str = "test", flat: dict | None = None) -> Tensors:
    """Train rounds as the only hospital of a run; the encoder after them."""
    flat = flat or small_config()
    encoder = tensors(("encoder",), flat)
    for number in range(1, rounds + 1):
        order = {"server-round": number, "run": run}
        content = RecordDict({"arrays": to_record(encoder), "config": ConfigRecord(order)})
        reply = ask({"site": str(file)}, "train", content, flat)
        assert not reply.has_error(), reply.error.reason
        encoder = from_record(reply.content["update"], shapes_of(encoder))
    return encoder


def own_heads(file: Path, run: str = "test", flat: dict | None = None) -> Tensors:
    """The heads of a hospital that releases them."""
    order = RecordDict({"config": ConfigRecord({"run": run, "groups": ",".join(HEADS)})})
    reply = ask({"site": str(file)}, "query.heads", order, flat)
    return from_record(reply.content["update"], shapes_of(tensors(HEADS, flat)))
