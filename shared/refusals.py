"""Refusals: the closed list of what a hospital says when it does not answer.

A refusal leaves the hospital as a code and that code's fixed text, which holds a next step and nothing else: no number of
the data, no name from a file, no text of an exception. The detail stays in the hospital's log. A refused value of the run
config has a code for each key: it follows from site.yaml and the run config, which the centre knows, and from no patient.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from shared.config import RunConfig
from shared.errors import HemafedError

FIRST_KEY = 1100  # codes from here on: the run config's keys in their order


class Refusal(IntEnum):
    """Codes that leave; Flower's own are below 1000."""

    POLICY = 1001
    FAILED = 1002
    HOURS = 1003
    NOT_TRAINED = 1004
    ROLE = 1005
    ORDER = 1006
    TENSORS = 1007
    DIVERGED = 1008
    METRICS = 1009
    GROUP = 1010
    NOT_OF_RUN = 1011
    EVALUATIONS = 1012
    AUDIT = 1013
    STATE = 1014
    SITE = 1015
    CODE_MISMATCH = 1016
    BUNDLE_UNREADABLE = 1017
    NOT_FROM_CENTRE = 1018
    REPLAYED = 1019
    RUN_CONFIG = 1020
    NOT_HELD = 1021


_TEXTS = {
    Refusal.POLICY: "the site's policy does not allow what was asked; ask the site for its policy",
    Refusal.FAILED: "the site could not answer; its own log has the cause",
    Refusal.HOURS: "the site works between the hours of its policy.hours only; ask again within them",
    Refusal.NOT_TRAINED: "the site has trained no round of this run",
    Refusal.ROLE: "the site's role is not 'train', so it takes no part in a run",
    Refusal.ORDER: "the instruction is malformed or does not fit the run config; run the same version as the site",
    Refusal.TENSORS: "the tensors do not fit the run's model, or hold values that are not finite",
    Refusal.DIVERGED: "the model diverged: a loss, gradient or score is not finite; lower train.learning_rate and "
    "train.matrix_rate, or set train.precision to 'fp32'",
    Refusal.METRICS: "the site's policy.metrics or policy.min_patients withholds these numbers",
    Refusal.GROUP: "the site's policy.release does not hold a tensor group that was asked for",
    Refusal.NOT_OF_RUN: "the model is not one of this run: the site compares it with what the run sent it before",
    Refusal.EVALUATIONS: "the site tested this run's models as often as its policy.evaluations_per_run and "
    "policy.evaluations_per_month allow",
    Refusal.AUDIT: "the site's audit log cannot be written, so nothing leaves; the site must make room or correct the "
    "rights of its state folder",
    Refusal.STATE: "the site's state of this run is damaged, does not fit the model or cannot be written; its own log has "
    "the cause",
    Refusal.SITE: "the site.yaml or the slice cache of this site cannot be used; its own log has the cause",
    Refusal.CODE_MISMATCH: "the run brings other client code than the site installed; start the run from the site's "
    "version, or ask the site to install and review the new one",
    Refusal.BUNDLE_UNREADABLE: "the run's bundle cannot be read",
    Refusal.NOT_FROM_CENTRE: "the site answers only what its centre signed",
    Refusal.REPLAYED: "the site answered this instruction before",
    Refusal.RUN_CONFIG: "the run config cannot be used by the site's version; run the same version as the site",
    Refusal.NOT_HELD: "the site does not hold the tensors that the round's difference is to; it gets them whole when it is asked again",
}
_KEYS = {
    FIRST_KEY
    + number: f"the site does not accept this run's value of {key}; client/README.md lists the bounds that hold without a "
    "policy.accept, ask the site for its own"
    for number, key in enumerate(RunConfig().flat())
}
TEXTS: Mapping[int, str] = MappingProxyType({int(code): text for code, text in _TEXTS.items()} | _KEYS)


def code_of_key(key: str) -> int:
    """Return the code for a run config key whose value is not accepted."""
    return FIRST_KEY + list(RunConfig().flat()).index(key)


class Refused(HemafedError, RuntimeError):
    """A request is refused; its text is for the hospital's log and never leaves a deployed site.

    Attributes:
      code: what leaves.
    """

    code: int = Refusal.FAILED

    def __init__(self, detail: str, code: int | None = None):
        super().__init__(detail)
        self.code = type(self).code if code is None else code
