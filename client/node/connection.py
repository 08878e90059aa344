"""The hospital's node: one outgoing connection to the centre, through which messages come and replies go.

It speaks Flower's Fleet API with Flower's own client, in place of Flower's SuperNode, which would unpack and install what the
centre sends and would hand every message to whoever asks on a local port. Nothing listens here. This process holds the
node's private key; it reads names, sizes and hashes of what comes and gives the bytes to the process that answers
(client/node/program.py).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import FlowerError
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
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.node.enrol import Centre, centre_context, read_node_key
from client.node.frames import MOST_BYTES, MOST_FRAMES

CALL_TIMEOUT_S = 60.0
MOST_RESPONSE = 16 << 20  # bytes of one call's answer; tensors come in pieces of 5 MB, bundles have less than 4
NOT_ACTIVATED = 2004  # Flower's code: the key is not registered, or the node counts as online


class NodeError(Exception):
    """A call to the centre did not succeed."""


class ConnectionLostError(NodeError):
    """The centre cannot be reached now; what was being done may be tried again."""


class NotAdmittedError(NodeError):
    """The centre does not take this node, or has forgotten it; the connection must be made again."""


class RunOverError(NodeError):
    """The run of a message has ended; nobody waits for its reply."""


class CentreFaultError(NodeError):
    """What the centre sent is larger than our bounds, or is not what its name says."""


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


class _BoundedTransport:
    """Interceptor that makes the call itself and reads at most MOST_RESPONSE bytes of its answer."""

    def __init__(self, http: httpx.Client):
        self._http = http

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request = context.request
        with self._http.stream(
            request.method, request.url, headers=request.headers, content=request.content
        ) as response:
            body = bytearray()
            for piece in response.iter_raw():
                body += piece
                if len(body) > MOST_RESPONSE:
                    raise CentreFaultError(f"{request.url.path} answers with more than {MOST_RESPONSE} bytes")
        kept = [(k, v) for k, v in response.headers.multi_items() if k not in ("content-encoding", "content-length")]
        return httpx.Response(response.status_code, headers=kept, content=bytes(body), request=request)


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
        http = httpx.Client(verify=context, timeout=CALL_TIMEOUT_S, follow_redirects=False)
        interceptors = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
            _BoundedTransport(http),
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
            self._node = Node(node_id=_call(self._client.ActivateNode, request).node_id)
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
        except (httpx.HTTPError, ValueError, CentreFaultError):
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
            if _call(self._client.SendNodeHeartbeat, request).success:
                return True
            self._forgotten.set()
        except NotAdmittedError:
            self._forgotten.set()
        except (ConnectionLostError, RunOverError, CentreFaultError):
            pass
        return self.forgotten  # no more tries then

    def pull(self) -> Order | None:
        """The next message for this node, whole; None if there is none."""
        response = _call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        if len(response.messages_list) != 1 or len(response.message_object_trees) != 1:
            raise CentreFaultError("several messages at a time, expected one")
        message, tree = response.messages_list[0], response.message_object_trees[0]
        self._on_message(message)
        run_id = message.metadata.run_id
        if self._run[0] != run_id:
            run = _call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id)).run
            request = GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id)
            bundle = _call(self._client.GetFab, request).fab.content
            self._run = (run_id, run.SerializeToString(), bundle)
        objects = self._pull_objects(run_id, tree)
        confirm = make_confirm_message_received_fn_protobuf(
            lambda request: _call(self._client.ConfirmMessageReceived, request), self._node, run_id
        )
        confirm(tree.object_id)
        return Order(message, *self._run, tree.SerializeToString(), objects)

    def _pull_objects(self, run_id: int, tree: ObjectTree) -> list[bytes]:
        """The contents of a tree's objects, each checked against its name."""
        names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        if len(names) > MOST_FRAMES - 10:
            raise CentreFaultError(f"a message of {len(names)} objects, expected at most {MOST_FRAMES - 10}")
        fetch = make_pull_object_fn_protobuf(
            lambda request: _call(self._client.PullObject, request), self._node, run_id
        )
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
            raise RunOverError(f"the message is gone: {error}") from error
        return [contents[name] for name in names]

    def is_running(self, run_id: int) -> bool:
        """Whether somebody still waits for a run's replies; True where the centre cannot be asked."""
        try:
            _call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
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
        response = _call(self._client.PushMessages, request)
        wanted = set(response.objects_to_push)
        push = make_push_object_fn_protobuf(
            lambda request: _call(self._client.PushObject, request), self._node, run_id, response.session_id
        )
        named = ((get_object_id(content), content) for content in objects)
        try:
            push_object_contents_from_iterable(((name, part) for name, part in named if name in wanted), push)
        except ObjectPushError as error:
            raise RunOverError(str(error)) from error


def message_text(message: MessageProto) -> str:
    """A message in a few words, for the log; its kind is from the centre and may be anything."""
    kind = message.metadata.message_type
    return f"{kind if re.fullmatch(r'[a-z.]{1,40}', kind) else 'an unknown kind'} of run {message.metadata.run_id}"


def _call(method: Callable, request: object) -> object:
    """One call, again for a while where the connection breaks; Flower's and httpx' errors as ours."""
    pause_s, end = 1.0, time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            lost = _status_error(error)
            if not isinstance(lost, ConnectionLostError):
                raise lost from error
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise NotAdmittedError(
                    "the centre's certificate cannot be trusted; 'hemafed-client join --check' says why"
                ) from error
            lost = ConnectionLostError(f"the centre does not answer ({type(error).__name__}: {error})")
        except ValueError as error:  # no protobuf
            raise CentreFaultError(f"an answer that is not Flower's ({error})") from error
        if time.monotonic() + pause_s > end:
            raise lost
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 15.0)


def _status_error(error: httpx.HTTPStatusError) -> Exception:
    """What an HTTP status means for this node."""
    status = error.response.status_code
    flower = FlowerError.from_json(error.response.text)
    if flower is not None and flower.code == NOT_ACTIVATED:
        return NotAdmittedError(
            "the centre does not take this node: it is not registered or revoked (ask the centre), or it still counts as online "
            "from before, for up to a minute"
        )
    if status == httpx.codes.FORBIDDEN and error.response.headers.get("content-type", "").startswith("text/plain"):
        return NotAdmittedError(
            "the centre's door does not let this node in: 'hemafed-client join --check' says why (not registered yet, or revoked)"
        )
    if status == httpx.codes.FORBIDDEN:
        return RunOverError("the run has ended, or nobody waits for this reply")
    if status in (400, 401):
        return NotAdmittedError(f"the centre has forgotten this node ({status}), as it does when it starts again")
    if status in (429, 502, 503, 504):
        return ConnectionLostError(f"the centre is busy or starting ({status})")
    return CentreFaultError(f"the centre answers with status {status}")
