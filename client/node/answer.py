"""From a message's bytes to the reply's bytes: the first code of the hospital that reads what a centre sent.

Order matters. What the parts become is counted first, before they are put together (client/node/parts.py). Then the signature,
so that only the centre's own instructions cost more than that; then the bundle's code against the hospital's, by its hash;
then the hospital's client app (client/app.py), whose policy decides what leaves. There is a reply in every case: a code of
the closed list where something is refused (shared/refusals.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.run_pb2 import Run as RunProto
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.boundary.audit import AuditError, printable
from client.boundary.code import CodeError, read_bundle
from client.boundary.daily import list_refusal
from client.boundary.policy import admit_code
from client.boundary.this_site import Node, opened
from client.node.frames import reply_frames
from client.node.parts import bounded_memory, check_parts
from client.node.task import Task
from shared.config import ConfigError, config_digest
from shared.host.files import replace_text
from shared.refusals import TEXTS, Refusal, Refused
from shared.site import Site, SiteError, read_site
from shared.wire.instructions import InstructionError, RepeatedError, open_instruction

ANSWERED = "answered.json"  # in the site's state folder: random number of an instruction -> until when it counts
MOST_ANSWERED = 100_000  # instructions within LONGEST_S; a round asks a hospital three or four times
log = logging.getLogger("hemafed.client")


def answer(task: Task, own_code: str) -> list[bytes]:
    """Answer one message.

    Args:
      task: from the process that is connected to the centre; what the centre sent is not checked yet.
      own_code: hash of the code that this process imported.
    Returns:
      Flower's message without its content, its object tree and the tree's objects, as bytes; these leave the hospital.
    Raises:
      FrameError, ValueError: the task itself is malformed, so that there is no message to reply to.
    """
    place = json.loads(task.place)
    run = run_from_proto(RunProto.FromString(task.run))
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, place["node_id"]
    with bounded_memory():
        message = _inflate(task)
    site = None
    try:
        site = _site(Path(place["site_yaml"]))
        authority = x509.load_pem_x509_certificate(place["authority"].encode())
        with bounded_memory():
            message, signed_config = _signed(message, authority, site)
        context = _admitted(message, run, task.bundle, own_code, site, place)
        with opened(context, site) as node:
            _check_config(node, signed_config)
            reply = app(message, context)
    except Refused as error:
        log.error("refused: %s", printable(str(error)))
        _note_refusal(site, message, error)
        reply = Message(Error(int(error.code), TEXTS[error.code]), reply_to=message)
    return reply_frames(reply)


def _inflate(task: Task) -> Message:
    """The message from its parts; every part is named by the hash of its content."""
    tree = ObjectTree.FromString(task.tree)
    contents = {get_object_id(content): content for content in task.objects}
    check_parts(tree.object_id, contents)
    message = inflate_object_from_contents(tree.object_id, contents)
    message.metadata.__dict__["_message_id"] = tree.object_id  # a deflated message does not hold its own name
    return message


def _site(path: Path) -> Site:
    try:
        return read_site(path)
    except SiteError as error:
        raise Refused(str(error), Refusal.SITE) from error


def _signed(message: Message, authority: x509.Certificate, site: Site) -> tuple[Message, str]:
    """The message and its run config's digest, if the centre signed it for this site and it is here for the first time."""
    try:
        return open_instruction(message, authority, site.name, lambda *number: first_time(site.state, *number))
    except RepeatedError as error:
        raise Refused(str(error), Refusal.REPLAYED) from error
    except InstructionError as error:
        raise Refused(str(error), Refusal.NOT_FROM_CENTRE) from error


def first_time(folder: Path, nonce: str, until: float, now: Callable[[], float] = time.time) -> bool:
    """Whether an instruction's random number is new; remembered on the disk before this returns.

    Raises:
      InstructionError: it cannot be remembered, so that the instruction could be repeated.
    """
    path = folder / ANSWERED
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        known = {number: end for number, end in known.items() if end > now()}
        if nonce in known:
            return False
        if len(known) >= MOST_ANSWERED:
            raise InstructionError(f"more than {MOST_ANSWERED} instructions in a few hours")
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(known | {nonce: until}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, InstructionError):
            raise
        raise InstructionError(f"{path} cannot be read or written ({type(error).__name__})") from error
    return True


def _admitted(message: Message, run: Run, content: bytes, own_code: str, site: Site, place: dict) -> Context:
    """The context of a run whose bundle holds this hospital's own client code."""
    try:
        if hashlib.sha256(content).hexdigest() != run.fab_hash:
            raise CodeError("the bundle is not the one that the run names")
        bundle = read_bundle(content)
        admit_code(site, own_code, bundle.code)
        defaults = bundle.defaults()
    except CodeError as error:
        raise Refused(str(error), Refusal.BUNDLE_UNREADABLE) from error
    return Context(
        run_id=run.run_id,
        node_id=place["node_id"],
        node_config={"site": place["site_yaml"]},
        state=RecordDict(),
        run_config=defaults | run.override_config,
    )


def _check_config(node: Node, signed: str) -> None:
    """That the run config, which came beside the message, is the one under which the centre signed it."""
    try:
        found = config_digest(node.config)
    except ConfigError as error:
        raise Refused(str(error), Refusal.NOT_FROM_CENTRE) from error
    if found != signed:
        raise Refused("an instruction with another run config than the centre signed", Refusal.NOT_FROM_CENTRE)


def _note_refusal(site: Site | None, message: Message, refused: Refused) -> None:
    """Put a refusal that came before the client app into the audit log."""
    if site is None:
        return
    metadata = message.metadata
    facts = {"flower_run": str(metadata.run_id), "asked": metadata.message_type}
    try:
        list_refusal(site.state, facts | {"code": int(refused.code), "reason": str(refused)})
    except AuditError as error:
        log.error("%s", printable(str(error)))
