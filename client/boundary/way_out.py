"""The first code of the client app that sees a message, and the last before a reply leaves the hospital.

An error leaves as a code of a closed list with a fixed text (shared/refusals.py); its detail stays in the hospital's log.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime

from flwr.app import Context, Error, Message

from client.boundary.audit import AuditError, contents, known_items, printable, record
from client.boundary.daily import MOST_A_DAY, QUESTIONS, count_question, list_refusal
from client.boundary.orders import ORDER_KEYS
from client.boundary.policy import FACTS, PolicyError, admit, enforce
from client.boundary.this_site import Node, opened
from shared.config import ConfigError, RunConfig, Scalar
from shared.metrics import MetricsError
from shared.refusals import TEXTS, Refusal, Refused
from shared.site_file import SiteError
from shared.slices import CacheError
from shared.wire.records import UpdateError

log = logging.getLogger("hemafed.client")

# Errors of code that knows no refusals.
_CODES: dict[type[Exception], Refusal] = {
    UpdateError: Refusal.TENSORS,
    ConfigError: Refusal.RUN_CONFIG,
    MetricsError: Refusal.DIVERGED,
    SiteError: Refusal.SITE,
    CacheError: Refusal.SITE,
}
HELLO = "query.hello"


def way_out(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower mod around every handler: the first code that sees a message, and the last before a reply leaves the hospital.

    The question must be one that the hospital's policy accepts, the answer one that it releases, and both are in its audit
    log before anything leaves.
    A handler that returned nothing or a reply that could not be made would block the hospital's Flower node for all
    later runs, so there is a reply in every case.
    """
    with opened(context) as node:
        return _checked(message, context, node, call_next)


def _checked(
    message: Message, context: Context, node: Node, call_next: Callable[[Message, Context], Message]
) -> Message:
    """A reply, or a refusal."""
    site = number = None
    try:
        site = node.site
        number = _admit_question(node, message)
        if number is not None and number > MOST_A_DAY:
            raise PolicyError(f"site {site.name!r} answers {MOST_A_DAY} {message.metadata.message_type} a day")
        if message.metadata.message_type != HELLO:
            admit(site, node.config, now=datetime.now())
        reply = call_next(message, context)
        enforce(site, reply.content)
        asked = _asked(message, context)
        # Written before it leaves: what cannot be recorded does not.
        reply.content.config_records[FACTS]["audit"] = record(site.state, "released", asked | contents(reply.content))
        return reply
    except (Refused, UpdateError, ConfigError, MetricsError, SiteError, CacheError) as error:
        code = error.code if isinstance(error, Refused) else _CODES[type(error)]
        detail = str(error)
        log.error("refused: %s", printable(detail))
    except Exception as error:  # its text may hold anything
        code, detail = Refusal.FAILED, type(error).__name__
        log.error("failed:\n%s", "\n".join(map(printable, traceback.format_exc().splitlines())))
    if site is not None:
        try:
            list_refusal(site.state, _asked(message, context) | {"code": int(code), "reason": detail}, number)
        except AuditError as error:
            log.error("%s", printable(str(error)))
    # The one place where it is decided: a researcher who simulates sees the detail, a centre the fixed text.
    return Message(Error(int(code), detail if node.simulated else TEXTS[code]), reply_to=message)


def _admit_question(node: Node, message: Message) -> int | None:
    """The number of a question among those of its kind and day; None of what is no question, or asked in a simulation."""
    kind = message.metadata.message_type
    return count_question(node.site.state, kind) if kind in QUESTIONS and not node.simulated else None


def _asked(message: Message, context: Context) -> dict[str, object]:
    """Describe the question for the audit log: its run, the kind of message and the run config where it is not the default."""
    orders = message.content.config_records if message.has_content() else {}
    order: Mapping[str, object] = orders.get("config", {})
    default = RunConfig().flat()
    hello = message.metadata.message_type == HELLO  # depends on neither, so that both could be anything
    return {
        "flower_run": str(message.metadata.run_id),
        "asked": message.metadata.message_type,
        "order": known_items(
            {key: value for key, value in order.items() if isinstance(value, Scalar)}, () if hello else ORDER_KEYS
        ),
        "config": known_items(
            {k: v for k, v in context.run_config.items() if default.get(k) != v}, () if hello else default
        ),
    }
