"""The base of hemafed's errors."""

from __future__ import annotations


class HemafedError(Exception):
    """An error that a person can fix: the text names the thing, the value, what was expected and the next step.

    A command prints it and ends. It names no patient.
    """
