"""Messages as a centre sends them to a node: signed, with a run and its bundle, in the parts in which they travel."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_from_proto, run_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.boundary.code import ROOT, CodeError, read_bundle
from client.node.task import Task, make_place
from server.centre.authority import Pair, issue_signer, make_authority, read_certificate
from shared.config import ConfigError, config_digest, parse_config
from shared.wire.instructions import Signer

RUN_ID, NODE_ID = 17, 5


@cache
def project_bundle() -> bytes:
    """The app bundle of this code."""
    return build_fab_from_disk(ROOT)


@dataclass(frozen=True)
class Sender:
    """A centre's keys, and how it asks one site."""

    folder: Path
    site_yaml: Path
    site: str
    config: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self._pair("authority").key.exists():
            make_authority(self._pair("authority"), "test")
            issue_signer(self._pair("authority"), self._pair("instructions"), "test")

    def _pair(self, name: str) -> Pair:
        return Pair(self.folder / f"{name}.key", self.folder / f"{name}.crt")

    @property
    def signer(self) -> Signer:
        return Signer(*self._pair("instructions").load())

    @property
    def authority(self) -> str:
        return read_certificate(self._pair("authority").certificate).public_bytes(Encoding.PEM).decode()

    def message(self, kind: str = "query.hello", content: RecordDict | None = None) -> Message:
        """An instruction that is not signed yet."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        return Message(content or RecordDict(), dst_node_id=NODE_ID, message_type=kind)

    def digest(self, bundle: bytes) -> str:
        """Of the run config, which a bundle's defaults and the run's own keys make; of the defaults where there is none."""
        try:
            return config_digest(parse_config(read_bundle(bundle).defaults() | self.config))
        except (CodeError, ConfigError):
            return config_digest(parse_config({}))

    def task(self, message: Message, bundle: bytes | None = None, fab_hash: str = "", sign: bool = True) -> Task:
        """A message as the node hands it to the process that answers."""
        content = project_bundle() if bundle is None else bundle
        if sign:
            self.signer.sign(message, self.site, self.digest(content))
        run = Run.create_empty(RUN_ID)
        run.fab_hash = fab_hash or hashlib.sha256(content).hexdigest()
        run.override_config = dict(self.config)
        parts = [part.deflate() for part in get_all_nested_objects(message).values()]
        return Task(
            make_place(self.site_yaml, NODE_ID, self.authority),
            run_to_proto(run).SerializeToString(),
            content,
            get_object_tree(message).SerializeToString(),
            tuple(parts),
        )


def opened(frames: list[bytes]) -> Message:
    """A reply from its parts."""
    bare, tree, *objects = frames
    contents = {get_object_id(content): content for content in objects}
    message = inflate_object_from_contents(ObjectTree.FromString(tree).object_id, contents)
    metadata = message_from_proto(MessageProto.FromString(bare)).metadata
    assert message.metadata.reply_to_message_id == metadata.reply_to_message_id
    return message
