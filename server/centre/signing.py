"""The centre's signature on everything that a run asks of a hospital."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid

from server.centre.config import read_centre
from server.centre.registry import registered_nodes
from shared.config import RunConfig, config_digest
from shared.wire.instructions import Signer


class SigningGrid(Grid):
    """A grid whose instructions carry the centre's signature for the site that they go to.

    Args:
      grid: Flower's.
      signer: the centre's key for instructions.
      registered: node -> site, as the centre registered them.
      config: digest of the run config (shared/config.py).
    """

    def __init__(self, grid: Grid, signer: Signer, registered: Callable[[], Mapping[int, str]], config: str):
        self._grid, self._signer, self._registered, self._config = grid, signer, registered, config

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sign and push."""
        sites, signed = self._registered(), list(messages)
        for message in signed:
            self._signer.sign(message, sites.get(message.metadata.dst_node_id, ""), self._config)
        return self._grid.push_messages(signed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        return self._grid.pull_messages(message_ids)

    def get_node_ids(self) -> Iterable[int]:
        """As Flower's."""
        return self._grid.get_node_ids()

    def set_run(self, run: object) -> None:
        """As Flower's."""
        self._grid.set_run(run)

    @property
    def run(self) -> object:
        """As Flower's."""
        return self._grid.run

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """As Flower's."""
        return self._grid.create_message(*args, **kwargs)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not used: it would send what is not signed."""
        raise NotImplementedError("push_messages signs, send_and_receive does not")


def sign_as_centre(grid: Grid, folder: Path, config: RunConfig) -> Grid:
    """A grid that signs with the key of the centre in `folder`; the grid itself where that is no centre, as in a simulation.

    Args:
      grid: Flower's.
      folder: of the centre, or not.
      config: the run's.
    """
    if not (folder / "centre.toml").is_file():
        return grid
    signer = Signer(*read_centre(folder).instructions.load())
    return SigningGrid(grid, signer, lambda: registered_nodes(folder), config_digest(config))
