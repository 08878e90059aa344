"""Flower's SuperLink with what it lacks in 1.41: `python -m server.superlink.program CENTRE_FOLDER FLOWER_ARGUMENTS...`

- A hospital's call is authenticated before its body is read, by Flower's own signature in its headers; large bodies are
  read a few at a time.
- A hospital sends replies of its own and nothing else (server/superlink/filter.py).
- The operator's calls (Control), which Flower leaves open to every user of this machine, need a token of the centre, and no
  call's body is read before its head shows whose it is (server/superlink/local_calls.py).

The hooks are names inside of Flower that another version may not have: a test names the version and looks at each.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import flwr.superlink.main as superlink_main
from flwr.common.constant import ACCESS_TOKEN_KEY, SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from server.centre.config import Centre, read_centre
from server.centre.flower_commands import operator_token
from server.centre.proxy import LARGEST_KB
from server.centre.registry import registered_nodes
from server.superlink.filter import OBJECT, Ledger, Refusals
from server.superlink.local_calls import refusal_of
from server.superlink.objects import RefusedError

FLEET = "/v1/fleet/"
LARGE = 64 * 1024  # bytes of a body
MOST_LARGE = 4  # bodies of that size that are in memory at once, each of them three times


class Operator(NoOpControlAuthnPlugin):
    """Takes Control calls that carry the centre's token alone."""

    def __init__(self, token: str):
        super().__init__()
        self._token = token

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        """Return whether a call is the operator's."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        given = given if isinstance(given, bytes) else given.encode()
        if not hmac.compare_digest(given, self._token.encode()):
            return False, None
        return super().validate_tokens_in_metadata(metadata)

    def refresh_tokens(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        """Give nobody another token."""
        return None, None


class Gate:
    """ASGI middleware, the outermost: answers a call before its body is read, where it can."""

    def __init__(self, app: Callable, ledger: Ledger, refusals: Refusals, operator: str):
        self._app, self._ledger, self._refusals, self._operator = app, ledger, refusals, operator
        self._large = asyncio.Semaphore(MOST_LARGE)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Let a call through to Flower, or answer it."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # Flower has no web sockets
            return await send({"type": "websocket.close"})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        flower = scope["app"].state
        state = flower.linkstate_factory.state
        if not scope["path"].startswith(FLEET):
            given = (scope["path"], headers, self._operator, flower.superexec_auth_secret, state)
            refusal = await run_in_threadpool(refusal_of, *given)
            app = self._app if refusal is None else _answer(*refusal)
            return await app(scope, receive, send)
        call = scope["path"].removeprefix(FLEET)
        node = await run_in_threadpool(_caller, state, headers)
        if node is None or (node == 0 and call != "activate-node"):  # Flower itself tells an unknown node what it is
            return await _answer(401, "Invalid SuperNode authentication")(scope, receive, send)
        length = headers.get("content-length", "")
        largest = LARGEST_KB.get(call, 0) * 1024
        if not length.isdecimal() or int(length) > largest:
            return await _answer(413, f"expected a body of at most {largest} bytes")(scope, receive, send)
        if call == "push-object" and not self._ledger.expects(node):
            self._refusals.count(node, OBJECT)
            return await _answer(403, OBJECT)(scope, receive, send)
        if int(length) <= LARGE:
            return await self._app(scope, receive, send)
        async with self._large:
            return await self._app(scope, receive, send)


def _answer(status: int, text: str) -> JSONResponse:
    return JSONResponse({"detail": text}, status_code=status)


def _caller(state: Callable[[], Any], headers: dict[str, str]) -> int | None:
    """Return the node that signed a call; 0 for a key that is not registered, None if there is no good signature.

    The same as flwr/superlink/routers/fleet/node_auth.py, which compares the node with the body's afterwards.
    """
    try:
        public_key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        moment = headers[TIMESTAMP_HEADER]
        age_s = (now() - datetime.fromisoformat(moment)).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        if not verify_signature(bytes_to_public_key(public_key), moment.encode("ascii"), signature):
            return None
    except (KeyError, ValueError, TypeError):  # binascii's and Unicode's errors are ValueErrors
        return None
    return state().get_node_id_by_public_key(public_key) or 0


def install(ledger: Ledger, refusals: Refusals, operator: str) -> None:
    """Put the ledger around Flower's handlers of hospitals' calls, and the gate around its app."""
    # What a reply costs depends on which objects are stored: nothing is stored between its check and its announcement.
    storing = threading.RLock()

    def checked(
        name: str,
        check: Callable,
        done: Callable = lambda request, response: None,
        known: Callable = lambda request: None,
    ) -> None:
        handler = getattr(fleet_handlers, name)

        def handle(request: Any, **rest: Any) -> Any:
            try:
                check(request, **rest)
            except RefusedError as error:
                refusals.count(request.node.node_id, str(error))
                raise HTTPException(403, str(error)) from error
            if (answer := known(request)) is not None:
                return answer
            response = handler(request=request, **rest)
            done(request, response)
            return response

        def handle_alone(request: Any, **rest: Any) -> Any:
            with storing:
                return handle(request, **rest)

        setattr(fleet_handlers, name, handle_alone if name.startswith("push_") else handle)

    def stored(request: Any, response: Any) -> None:
        if response.stored:
            ledger.stored(request)

    def check_reply(request: Any, state: Any) -> None:
        ledger.check_reply(request, state.object_store.get)

    def check_object(request: Any, state: Any) -> None:
        for reply in ledger.check_object(request):
            state.object_store.delete(reply)  # the run gets an error in its place

    checked("pull_messages", lambda *_, **__: None, lambda request, answer: ledger.sent(request.node.node_id, answer))
    checked("push_messages", check_reply, ledger.replied, ledger.repeated)
    checked("push_object", check_object, stored)
    checked("pull_object", lambda request, **_: ledger.check_pull(request))
    checked("confirm_message_received", lambda request, **_: ledger.check_confirmation(request))
    create = superlink_main.create_app

    def create_app(*arguments: Any, **keywords: Any) -> Any:
        app = create(*arguments, **keywords)
        app.add_middleware(Gate, ledger=ledger, refusals=refusals, operator=operator)
        return app

    superlink_main.create_app = create_app


def serve(centre: Centre) -> None:
    """Run the SuperLink with Flower's arguments of this process until it is ended."""

    def site_of(node: int) -> str:
        return registered_nodes(centre.folder).get(node, f"node {node}")

    ledger = Ledger(centre.largest_reply_mb * 1_000_000)
    install(ledger, Refusals(lambda line: print(line, flush=True), site_of), operator_token(centre))
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    config = program._parse_superlink_lifespan_config()
    config.authn_plugin = Operator(operator_token(centre))
    program._run_superlink_http_api(lifespan_config=config)


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    serve(read_centre(Path(folder)))
