"""A Flower Grid inside one process: real ServerApp, real ClientApp, real messages; only the network is left away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app

Change = Callable[[Message, Message], Message | None]  # (asked, reply) -> what arrives; None for nothing


class LoopbackGrid(Grid):
    """Answers a message when it is pushed, with the ClientApp of its node.

    Args:
      sites: site.yaml per node; node ids count from 1.
      run_config: flat.
      late: number of polls that a node's replies are held back.
      change: what the network, or a hospital gone wrong, makes of a reply.
    """

    def __init__(
        self,
        sites: list[Path],
        run_config: dict,
        late: dict[int, int] | None = None,
        change: Change = lambda asked, reply: reply,
    ) -> None:
        # Flower's processes set this before they call an app; a message cannot be made without.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.contexts = {
            number: Context(1, number, {"site": str(file)}, RecordDict(), run_config)
            for number, file in enumerate(sites, start=1)
        }
        self.late, self.change = late or {}, change
        self.replies: dict[str, tuple[Message, int]] = {}
        self.asked: list[Message] = []
        self.arrivals: list[int] = []

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as Flower's own InMemoryGrid does
            node = message.metadata.dst_node_id
            reply = self.change(message, client_app(message, self.contexts[node]))
            self.asked.append(message)
            ids.append(message.metadata.message_id)
            if reply is not None:
                self.replies[ids[-1]] = (reply, self.late.get(node, 0))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for waiting, (reply, polls) in list(self.replies.items()):
            self.replies[waiting] = (reply, polls - 1)
        ready = [i for i in message_ids if i in self.replies and self.replies[i][1] < 0]
        return [self.replies.pop(i)[0] for i in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def run_server(grid: Grid, run_config: dict) -> None:
    """The ServerApp's procedure on a grid."""
    from server.app import main

    main(grid, Context(1, 0, {}, RecordDict(), run_config))
