"""systemd units of what hemafed runs as a service (systemd.service(5), systemd.syntax(7))."""

from __future__ import annotations

import sys
from pathlib import Path


def unit_text(
    description: str, arguments: list[str], user: str, stop_s: int, target: str = "multi-user.target", extra: str = ""
) -> str:
    """A unit that keeps one of this installation's programs running.

    Args:
      description: what it is, one line.
      arguments: name of the program, next to this Python, and its arguments, of any characters.
      user: who it runs as; empty for root, and in a unit of a user.
      stop_s: seconds that it may take to end.
      target: that wants it.
      extra: more lines of [Service].
    """
    program = str(Path(sys.executable).parent / arguments[0])
    command = " ".join(_quoted(part) for part in (program, *arguments[1:]))
    who = f"User={user}\n" if user else ""
    return f"""\
[Unit]
Description={_plain(description)}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
{extra}{who}Restart=always
RestartSec=10
TimeoutStopSec={stop_s}
NoNewPrivileges=true
ProtectSystem=full
PrivateTmp=true

[Install]
WantedBy={target}
"""


def _plain(text: str) -> str:
    """Text in which systemd sees no specifier."""
    return text.replace("%", "%%")


def _quoted(part: str) -> str:
    """One argument of a command line, in which systemd sees no escape, quote, specifier or variable."""
    escaped = part.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{_plain(escaped)}"'
