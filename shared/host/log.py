"""The log of a program: lines with their time and level on the standard output."""

from __future__ import annotations

import logging


class _Printed(logging.Handler):
    """Prints, to whatever the standard output is at that moment: Flower puts its own in place while an app runs."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def start_log(name: str) -> logging.Logger:
    """Have a logger's lines printed; once for a process, however often this is called.

    Args:
      name: "hemafed.server" or "hemafed.client".
    """
    log = logging.getLogger(name)
    if not log.handlers:
        handler = _Printed()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
