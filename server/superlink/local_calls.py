"""Calls from this machine to the SuperLink: the operator's (Control) and those of a run's process (Runtime).

Flower 1.41 reads a body before it looks at who sends it, so that any user of the machine could fill the SuperLink's memory.
Here a call is answered by its head alone where it is nobody's.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Any

from flwr.supercore.auth import derive_auth_secret
from flwr.supercore.auth.superexec import compute_superexec_signature
from flwr.supercore.constant import (
    SUPEREXEC_AUTH_BODY_SHA256_HEADER,
    SUPEREXEC_AUTH_NONCE_HEADER,
    SUPEREXEC_AUTH_SIGNATURE_HEADER,
    SUPEREXEC_AUTH_TIMESTAMP_HEADER,
    TASK_TOKEN_HEADER,
)

RUNTIME, CONTROL = "/v1/runtime/", "/v1/control/"
ACQUIRE = "acquire-task"
ACQUIRE_METHOD = "/flwr.proto.Runtime/AcquireTask"
# Of accounts, which this centre does not have; Flower answers them without any token.
LOGIN_CALLS = frozenset({"get-login-details", "get-auth-tokens", "refresh-auth-tokens"})
HEALTH = "/health"  # Flower answers it by its head
# Largest bodies in bytes. Flower takes apps of 10 MB, and a piece of an array has 5 MB.
LARGEST_CONTROL, LARGEST_RUNTIME, LARGEST_ACQUIRE = 16 << 20, 64 << 20, 4 << 10
Refusal = tuple[int, str]


def refusal_of(
    path: str, headers: Mapping[str, str], operator: str, secret: bytes | None, state: Callable[[], Any]
) -> Refusal | None:
    """Return why a call that no hospital makes is answered at once; None for one that Flower may have.

    Args:
      path: of the call.
      headers: of the call, names in lower case.
      operator: token of the centre's own commands.
      secret: that the centre's SuperExec signs with.
      state: gives Flower's state, which knows the tokens of runs.
    """
    if path == HEALTH:
        return None
    area = next((one for one in (CONTROL, RUNTIME) if path.startswith(one)), "")
    call = path.removeprefix(area)
    if not area or (area == CONTROL and call in LOGIN_CALLS):
        return 404, "Not Found"
    largest = LARGEST_CONTROL if area == CONTROL else LARGEST_ACQUIRE if call == ACQUIRE else LARGEST_RUNTIME
    if area == CONTROL:
        known = _is_operator(headers, operator)
    elif call == ACQUIRE:
        known = _is_superexec(headers, secret)
    else:
        token = headers.get(TASK_TOKEN_HEADER, "")
        known = bool(token) and state().get_task_by_token(token) is not None
    if not known:
        return 401, "Invalid authentication"
    length = headers.get("content-length", "")
    if not length.isdecimal() or int(length) > largest:
        return 413, f"expected a body of at most {largest} bytes"
    return None


def _is_operator(headers: Mapping[str, str], operator: str) -> bool:
    """Whether a call has the operator's token."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), operator.encode())


def _is_superexec(headers: Mapping[str, str], secret: bytes | None) -> bool:
    """Whether the head of a call is signed by the centre's SuperExec; Flower compares the body, the time and the nonce."""
    if secret is None:
        return False
    try:
        expected = compute_superexec_signature(
            auth_secret=derive_auth_secret(secret),
            method=ACQUIRE_METHOD,
            timestamp=int(headers[SUPEREXEC_AUTH_TIMESTAMP_HEADER]),
            nonce=headers[SUPEREXEC_AUTH_NONCE_HEADER],
            body_sha256=headers[SUPEREXEC_AUTH_BODY_SHA256_HEADER],
        )
    except (KeyError, ValueError):
        return False
    return hmac.compare_digest(expected.encode(), headers.get(SUPEREXEC_AUTH_SIGNATURE_HEADER, "").encode())
