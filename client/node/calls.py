"""One call to the centre: bounded in bytes and time, and every way in which it can fail as one of four errors.

No answer of a centre, or of a proxy before it, may end the daemon, fill its memory or block a call for ever.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable

import httpx
from flwr.supercore.error import FlowerError
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from shared.errors import HemafedError

CALL_TIMEOUT_S = 60.0  # in which nothing comes or goes
WHOLE_CALL_S = 600.0  # from the first byte of a call to the last of its answer; 8 MB at 0.1 Mbit/s
MOST_RESPONSE = 16 << 20  # bytes of one call's answer; tensors come in pieces of 5 MB, bundles have less than 4
MOST_TOLD = 4 << 20  # bytes of other answers: a list of 20,000 objects has 1.4 MB
LARGE = ("/pull-object", "/get-fab")
LONGEST_ERROR = 4096  # bytes of an error's body that are read
NOT_ACTIVATED = 2004  # Flower's code: the key is not registered, or the node counts as online
_call = threading.local()  # `end` of this thread's call


class NodeError(HemafedError):
    """A call to the centre did not succeed."""


class ConnectionLostError(NodeError):
    """The centre cannot be reached now; what was being done may be tried again."""


class NotAdmittedError(NodeError):
    """The centre does not take this node, or has forgotten it; the connection must be made again."""


class RunOverError(NodeError):
    """The run of a message has ended; nobody waits for its reply."""


class CentreFaultError(NodeError):
    """The centre's answer exceeds our bounds, or its content does not match its hash."""


class TimedSocket(ssl.SSLSocket):
    """A socket whose reads and writes end with the call that they are of, so that dripped bytes prolong nothing."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As a socket's.

        Raises:
          TimeoutError: the call has lasted too long.
        """
        _limit(self)
        return super().recv(buflen, flags)

    def send(self, data: bytes, flags: int = 0) -> int:
        """As a socket's.

        Raises:
          TimeoutError: the call has lasted too long.
        """
        _limit(self)
        return super().send(data, flags)


def _limit(line: socket.socket) -> None:
    """Give a socket no more time than its call has left."""
    left, timeout = getattr(_call, "end", float("inf")) - time.monotonic(), line.gettimeout()
    if left <= 0:
        raise TimeoutError(f"a call of more than {WHOLE_CALL_S:.0f} s")
    if timeout is None or timeout > left:
        line.settimeout(None if left == float("inf") else left)


class BoundedTransport:
    """Interceptor that makes the call itself, within WHOLE_CALL_S, and reads a bounded number of bytes of its answer."""

    def __init__(self, http: httpx.Client):
        self._http = http

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Make the call; Flower's own transport, `call_next`, would read whatever comes."""
        request = context.request
        most = MOST_RESPONSE if request.url.path.endswith(LARGE) else MOST_TOLD
        _call.end = time.monotonic() + WHOLE_CALL_S
        try:
            with self._http.stream(
                request.method, request.url, headers=request.headers, content=request.content
            ) as response:
                body = bytearray()
                for piece in response.iter_raw():
                    body += piece
                    if len(body) > most:
                        raise CentreFaultError(f"{request.url.path} answers with more than {most} bytes")
        finally:
            del _call.end
        kept = [(k, v) for k, v in response.headers.multi_items() if k not in ("content-encoding", "content-length")]
        return httpx.Response(response.status_code, headers=kept, content=bytes(body), request=request)


def call(method: Callable, request: object) -> object:
    """One call, again for a while where the connection breaks; Flower's and httpx' errors as ours.

    Raises:
      ConnectionLostError, NotAdmittedError, RunOverError, CentreFaultError: and nothing else.
    """
    pause_s, end = 1.0, time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            return method(request)
        except NodeError:
            raise
        except httpx.HTTPStatusError as error:
            lost = status_error(error)
            if not isinstance(lost, ConnectionLostError):
                raise lost from error
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise NotAdmittedError(
                    "the centre's certificate cannot be trusted; 'hemafed-client join --check' says why"
                ) from error
            lost = ConnectionLostError(f"the centre does not answer ({type(error).__name__}: {error})")
        except Exception as error:  # no protobuf, or whatever else Flower or httpx makes of an answer
            raise CentreFaultError(f"an answer that is not Flower's ({type(error).__name__})") from error
        if time.monotonic() + pause_s > end:
            raise lost
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 15.0)


def status_error(error: httpx.HTTPStatusError) -> NodeError:
    """Return what an HTTP status means for this node."""
    status = error.response.status_code
    if _flower_code(error.response.content) == NOT_ACTIVATED:
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


def _flower_code(body: bytes) -> int | None:
    """Flower's code in an error's body, whatever charset its header names; None where there is none that can be read."""
    try:
        error = FlowerError.from_json(body[:LONGEST_ERROR].decode())
    except (ValueError, RecursionError):  # also of numbers of thousands of digits
        return None
    return None if error is None else error.code
