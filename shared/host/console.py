"""What commands print: lines, progress bars, and one way to fail."""

from __future__ import annotations

import sys
from typing import Never, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared.host.rights import words_of

console = Console(width=None if sys.stdout.isatty() else 110)


class Bars:
    """A progress bar for each thing that is counted. Use as a context.

    Outside a terminal, as in a log file, a line is printed when a task is done.

    Args:
      name: what the bars are about, such as a site; it begins each bar's text.
    """

    def __init__(self, name: str = ""):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._name, self._terminal = name, console.is_terminal
        self._bars = Progress(*columns, console=console, disable=not self._terminal)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Move the bar of `what`."""
        text = f"{self._name}: {what}" if self._name else what
        tasks = [task.id for task in self._bars.tasks if task.description == text]
        self._bars.update(tasks[0] if tasks else self._bars.add_task(text), completed=done, total=total)
        if done == total and not self._terminal:
            say(f"{text}: {done} of {total}")


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def fail(error: Exception, status: int = 1) -> Never:
    """Print an error and end the command.

    Raises:
      typer.Exit: with the status.
    """
    text = f"{type(error).__name__}: {words_of(error)}"
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status) from error
