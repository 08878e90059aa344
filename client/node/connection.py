"""The hospital's node: one outgoing connection to the centre, through which messages come and replies go.

It speaks Flower's Fleet API with Flower's own client, in place of Flower's SuperNode, which would unpack and install what the
centre sends and would hand every message to anybody who asks on a local port. Nothing listens here. This process holds the
node's private key; it reads names, sizes and hashes of what comes and gives the bytes to the process that answers
(client/node/program.py).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import httpx
from flwr.app import Error, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.node.calls import (
    CALL_TIMEOUT_S,
    BoundedTransport,
    CentreFaultError,
    ConnectionLostError,
    NotAdmittedError,
    RunOverError,
    TimedSocket,
    call,
)
from client.node.enrol import Centre, centre_context, read_node_key
from client.node.frames import MOST_BYTES, MOST_FRAMES, reply_frames
from shared.refusals import TEXTS, Refusal

LONGEST_TEXT = 256  # characters of each name in a message's metadata


@dataclass(frozen=True)
class Order:
    """A message as it arrived, not looked into.

    Attributes:
      message: Flower's message without its content.
      run_id: Flower's number of its run.
      run: Flower's Run, serialised.
      bundle: the run's app bundle.
      tree: of its objects, serialised.
      objects: their contents; each object's name is its content's hash, which was checked.
    """

    message: MessageProto
    run_id: int
    run: bytes
    bundle: bytes
    tree: bytes
    objects: list[bytes]


class Connection:
    """A node's calls to the centre, while it is activated. Use as a context.

    Args:
      centre: whom the hospital answered.
      on_message: given each message before its parts are fetched: from then on the centre waits for its reply.

    Every method raises ConnectionLostError, NotAdmittedError, RunOverError or CentreFaultError and nothing else of the
    network's.
    """

    def __init__(self, centre: Centre, on_message: Callable[[MessageProto], object] = lambda message: None):
        self._on_message = on_message
        key = read_node_key(centre)
        context = centre_context(centre)
        context.sslsocket_class = TimedSocket
        http = httpx.Client(verify=context, timeout=CALL_TIMEOUT_S, follow_redirects=False)
        interceptors = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
            BoundedTransport(http),
        ]
        self._http = http
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient(f"https://{centre.address}", interceptors=interceptors, verify=context)
        self._node = Node()
        self._run: tuple[int, bytes, bytes] = (0, b"", b"")  # number, Run and bundle of the last message's run
        self._forgotten = threading.Event()
        self._heartbeat = HeartbeatSender(self._beat)

    @property
    def node_id(self) -> int:
        """Flower's number of this node, for as long as the centre's SuperLink runs."""
        return self._node.node_id

    @property
    def forgotten(self) -> bool:
        """Whether the centre has said that it does not know this node any more."""
        return self._forgotten.is_set()

    def __enter__(self) -> Connection:
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            self._node = Node(node_id=call(self._client.ActivateNode, request).node_id)
        except BaseException:
            self._close()
            raise
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.stop()
        try:
            if not self.forgotten:  # a node that says good-bye can come back at once
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
        except Exception:  # whatever it is, the connection ends
            pass
        finally:
            self._close()

    def _close(self) -> None:
        self._client.close()
        self._http.close()

    def _beat(self) -> bool:
        """One heartbeat, in a thread of its own; whether it was taken."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            if call(self._client.SendNodeHeartbeat, request).success:
                return True
            self._forgotten.set()
        except NotAdmittedError:
            self._forgotten.set()
        except Exception:  # else this thread would end, and with it the node's place at the centre
            pass
        return self.forgotten  # no more tries then

    def pull(self) -> Order | None:
        """The next message for this node, whole; None if there is none."""
        response = call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        if len(response.messages_list) != 1 or len(response.message_object_trees) != 1:
            raise CentreFaultError("several messages at a time, expected one")
        message, tree = response.messages_list[0], response.message_object_trees[0]
        check_metadata(message, self.node_id)
        self._on_message(message)
        run_id = message.metadata.run_id
        if self._run[0] != run_id:
            run = call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id)).run
            request = GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id)
            bundle = call(self._client.GetFab, request).fab.content
            self._run = (run_id, run.SerializeToString(), bundle)
        objects = self._pull_objects(run_id, tree)
        confirm = make_confirm_message_received_fn_protobuf(
            lambda request: call(self._client.ConfirmMessageReceived, request), self._node, run_id
        )
        confirm(tree.object_id)
        return Order(message, *self._run, tree.SerializeToString(), objects)

    def _pull_objects(self, run_id: int, tree: ObjectTree) -> list[bytes]:
        """The contents of a tree's objects, each checked against its name."""
        parts = list(islice(iterate_object_tree(tree), 2 * MOST_FRAMES))
        names = list(dict.fromkeys(part.object_id for part in parts))
        if len(names) > MOST_FRAMES - 10 or len(parts) == 2 * MOST_FRAMES:
            raise CentreFaultError(f"a message of {len(names)} objects or more, expected at most {MOST_FRAMES - 10}")
        fetch = make_pull_object_fn_protobuf(lambda request: call(self._client.PullObject, request), self._node, run_id)
        left, lock = MOST_BYTES // 2, threading.Lock()

        def pull(name: str) -> bytes:
            nonlocal left
            content = fetch(name)
            with lock:
                left -= len(content)
            if left < 0:
                raise CentreFaultError(f"a message of more than {MOST_BYTES // 2} bytes")
            if get_object_id(content) != name:
                raise CentreFaultError(f"object {name[:12]} has other content than its name says")
            return content

        try:
            contents = pull_objects(names, pull)
        except ObjectPullError as error:
            raise RunOverError("the message is gone") from error
        return [contents[name] for name in names]

    def is_running(self, run_id: int) -> bool:
        """Whether somebody still waits for a run's replies; True where the centre cannot be asked."""
        try:
            call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        except RunOverError:
            return False
        except (ConnectionLostError, NotAdmittedError, CentreFaultError):
            return not self.forgotten
        return True

    def push(self, run_id: int, frames: list[bytes]) -> None:
        """Send a reply; it leaves the hospital here.

        Args:
          run_id: of its message.
          frames: the reply's message without content, its object tree and its objects (client/node/answer.py).
        """
        message, tree, *objects = frames
        # Flower's time of computing is left out: how long a hospital trained is a number about its data.
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[MessageProto.FromString(message)],
            message_object_trees=[ObjectTree.FromString(tree)],
            clientapp_runtime_list=[0.0],
        )
        response = call(self._client.PushMessages, request)
        wanted = set(response.objects_to_push)
        push = make_push_object_fn_protobuf(
            lambda request: call(self._client.PushObject, request), self._node, run_id, response.session_id
        )
        named = ((get_object_id(content), content) for content in objects)
        try:
            push_object_contents_from_iterable(((name, part) for name, part in named if name in wanted), push)
        except ObjectPushError as error:
            raise RunOverError("the reply is not taken any more") from error


def check_metadata(message: MessageProto, node_id: int) -> None:
    """Refuse a message that could not be answered, or that has content where its metadata alone belongs.

    Raises:
      CentreFaultError: see above.
    """
    metadata = message.metadata
    texts = (metadata.message_id, metadata.reply_to_message_id, metadata.group_id, metadata.message_type)
    if max(map(len, texts)) > LONGEST_TEXT or message.content.ByteSize() or message.HasField("error"):
        raise CentreFaultError("a message whose metadata are none")
    try:
        error_frames(message, node_id)
    except Exception as error:  # of Flower's checks
        raise CentreFaultError(f"a message that cannot be answered ({type(error).__name__})") from error


def error_frames(message: MessageProto, node_id: int) -> list[bytes]:
    """The reply for a message whose process ended."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, message.metadata.run_id, node_id
    return reply_frames(
        Message(Error(int(Refusal.FAILED), TEXTS[Refusal.FAILED]), reply_to=message_from_proto(message))
    )


def message_text(message: MessageProto) -> str:
    """A message in a few words, for the log; its kind is from the centre and may be anything."""
    kind = message.metadata.message_type
    return f"{kind if re.fullmatch(r'[a-z.]{1,40}', kind) else 'an unknown kind'} of run {message.metadata.run_id}"
