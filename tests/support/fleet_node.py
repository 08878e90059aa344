"""A hospital's node made of Flower's own Fleet client and a registered key, for tests of the door: honest, or not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.node.enrol import centre_context, read_known_centre, read_node_key
from server.superlink.objects import objects_of
from shared.site import read_site


class FleetNode:
    """One registered hospital's way to the centre, call by call.

    Attributes:
      client: Flower's, with the hospital's certificate and signature.
      key: the node's.
      number: of the node, once it is active.
    """

    def __init__(self, site_yaml: Path, patient: bool = False):
        """One that is patient tries again where a line is cut or the door is busy, as Flower's own node does."""
        known = read_known_centre(read_site(site_yaml))
        self.key: ec.EllipticCurvePrivateKey = read_node_key(known)
        self.client = FleetHttpClient(
            f"https://{known.address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self.key, self.key.public_key()),
            ],
            verify=centre_context(known),
            retry_invoker=make_simple_http_retry_invoker() if patient else None,
        )
        self.number = 0

    def activate(self) -> None:
        public = public_key_to_bytes(self.key.public_key())
        self.number = self.client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id

    def beat(self) -> None:
        self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=Node(node_id=self.number), heartbeat_interval=30))

    def pull(self) -> PullMessagesResponse:
        """The next instruction, if there is one, without its content."""
        return self.client.PullMessages(PullMessagesRequest(node=Node(node_id=self.number)))

    def get(self, run: int, number: str) -> bytes:
        """An object's bytes; none while the centre has not sent it yet."""
        request = PullObjectRequest(node=Node(node_id=self.number), run_id=run, object_id=number)
        return self.client.PullObject(request).object_content

    def confirm(self, run: int, number: str) -> None:
        request = ConfirmMessageReceivedRequest(node=Node(node_id=self.number), run_id=run, message_object_id=number)
        self.client.ConfirmMessageReceived(request)

    def push(self, message: Message) -> PushMessagesResponse:
        """Announce a message and its objects."""
        with no_object_id_recompute():
            return self.client.PushMessages(
                PushMessagesRequest(
                    node=Node(node_id=self.number),
                    messages_list=[message_to_proto(remove_content_from_message(message))],
                    message_object_trees=[get_object_tree(message)],
                    clientapp_runtime_list=[0.1],
                )
            )

    def put(self, run: int, session: str, number: str, content: bytes) -> bool:
        """Send an object's bytes; whether they were stored."""
        request = PushObjectRequest(
            node=Node(node_id=self.number), run_id=run, session_id=session, object_id=number, object_content=content
        )
        return self.client.PushObject(request).stored

    def answer(self, instruction: Message, content: RecordDict) -> int:
        """Reply to an instruction as an honest node does; how many objects were sent."""
        message = reply_of(self.number, instruction, content)
        taken = self.push(message)
        objects = get_all_nested_objects(message)
        run = instruction.metadata.run_id
        for number in taken.objects_to_push:
            assert self.put(run, taken.session_id, number, objects[number].deflate())
        return len(taken.objects_to_push)

    def serve(self, stop: threading.Event, content: Callable[[], RecordDict]) -> None:
        """Answer every instruction until `stop`, heartbeats among them."""
        while not stop.wait(0.05):
            self.beat()
            got = self.pull()
            for one, tree in zip(got.messages_list, got.message_object_trees, strict=True):
                instruction = message_from_proto(one)
                run = instruction.metadata.run_id
                for number in objects_of(tree):
                    while not self.get(run, number):
                        stop.wait(0.05)
                self.confirm(run, tree.object_id)
                self.answer(instruction, content())


def reply_of(node: int, instruction: Message, content: RecordDict, **changes: object) -> Message:
    """A node's reply to an instruction; `changes` of its metadata make it another's, or another thing."""
    told = instruction.metadata
    fields = {
        "run_id": told.run_id,
        "message_id": "",
        "src_node_id": node,
        "dst_node_id": SUPERLINK_NODE_ID,
        "reply_to_message_id": told.message_id,
        "group_id": told.group_id,
        "created_at": told.created_at + 1,
        "ttl": told.ttl - 2,
        "message_type": told.message_type,
    } | changes
    message = make_message(Metadata(**fields), content)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def status_of(call: Callable[[], object]) -> int:
    """The status that a call is answered with; 0 where the line is cut."""
    try:
        call()
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    except httpx.TransportError:
        return 0
    return 200


def small() -> RecordDict:
    return RecordDict({"facts": ConfigRecord({"word": "pong"})})
