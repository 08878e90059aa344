"""A stretch of network that can be cut: TCP between two ports on loopback."""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Self


class Relay:
    """Passes bytes to a port until it is cut; then it holds connections open and passes nothing, as a dead line does.

    Args:
      target: port on loopback.
    """

    def __init__(self, target: int):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = threading.Event()
        self._open.set()
        self._ended = threading.Event()
        self.port = self._listener.getsockname()[1]

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._open.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            threading.Thread(target=self._pass, args=(near, far), daemon=True).start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while not self._ended.is_set():
                for key, _ in ready.select(0.5):
                    self._open.wait()
                    try:
                        content = key.fileobj.recv(65536)
                        if not content:
                            return
                        key.data.sendall(content)
                    except OSError:
                        return
