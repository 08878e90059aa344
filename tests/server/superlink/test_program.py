"""The names inside of Flower that our SuperLink stands on; what it does with them is in federation/test_attacks.py."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import derive_auth_secret
from flwr.supercore.auth.superexec import create_superexec_auth_metadata
from flwr.superlink import main
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.routers.fleet import node_auth, router
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient

from server.centre.proxy import FLEET_CALLS
from server.superlink.local_calls import ACQUIRE_METHOD, LARGEST_ACQUIRE, LARGEST_CONTROL, refusal_of
from server.superlink.program import Operator

PINNED = "1.41.0"


def test_flower_is_the_version_whose_inside_was_read() -> None:
    """With another, read server/superlink/program.py's hooks again, then change this line."""
    assert version("flwr") == PINNED


@pytest.mark.parametrize(
    "name", ["pull_messages", "push_messages", "push_object", "pull_object", "confirm_message_received"]
)
def test_the_router_calls_a_handler_by_its_modules_name(name: str) -> None:
    assert re.search(rf"fleet_handlers\.{name}\(\s*request=request", inspect.getsource(router))
    assert "request" in inspect.signature(getattr(fleet_handlers, name)).parameters


def test_the_program_makes_its_app_by_name_and_parses_apart() -> None:
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    assert "create_app(lifespan_config, SuperLinkLifespan)" in inspect.getsource(program._run_superlink_http_api)
    assert list(inspect.signature(program._parse_superlink_lifespan_config).parameters) == []
    assert "authn_plugin" in SuperLinkLifespanConfig.__dataclass_fields__
    assert "linkstate_factory" in inspect.getsource(main.create_app)


def test_what_flower_checks_of_a_signature_is_what_the_gate_checks() -> None:
    source = inspect.getsource(node_auth.authenticate_node)
    for name in ("SYSTEM_TIME_TOLERANCE", "TIMESTAMP_TOLERANCE", "verify_signature", 'timestamp.encode("ascii")'):
        assert name in source


def test_every_call_of_a_node_has_a_largest_size() -> None:
    calls = inspect.getsource(FleetHttpClient)
    assert {call for call in FLEET_CALLS if f'"/v1/fleet/{call}"' not in calls} == set()
    assert calls.count('path="/v1/fleet/') == len(FLEET_CALLS) + 2, "all but register-node and unregister-node"


@pytest.mark.parametrize("given", [[], [("flwr-oidc-access-token", "")], [("flwr-oidc-access-token", b"no")]])
def test_a_call_without_the_centres_token_is_nobodys(given: list) -> None:
    operator = Operator("secret")
    assert operator.validate_tokens_in_metadata(given) == (False, None)
    assert operator.refresh_tokens(given) == (None, None)
    assert operator.validate_tokens_in_metadata([("flwr-oidc-access-token", "secret")])[0]


def test_a_local_call_is_known_by_its_head() -> None:
    from_executor = create_superexec_auth_metadata(
        auth_secret=derive_auth_secret(b"secret"), method=ACQUIRE_METHOD, request=AcquireTaskRequest()
    )
    tasks = SimpleNamespace(get_task_by_token={"task": "a task"}.get)

    def status(path: str, length: int = 10, **headers: str) -> int:
        given = {"content-length": str(length)} | {name.replace("_", "-"): value for name, value in headers.items()}
        refusal = refusal_of(path, given, "operator", b"secret", lambda: tasks)
        return 200 if refusal is None else refusal[0]

    assert status("/health") == 200
    assert status("/docs") == status("/v1/control/get-auth-tokens", authorization="Bearer operator") == 404
    assert status("/v1/control/list-runs", authorization="Bearer operator") == 200
    assert status("/v1/control/list-runs", LARGEST_CONTROL + 1, authorization="Bearer operator") == 413
    assert status("/v1/control/list-runs", authorization="operator") == 401
    assert status("/v1/control/list-runs", authorization="Bearer \xe4") == 401
    assert status("/v1/runtime/push-object", flwr_task_token="task") == 200
    assert status("/v1/runtime/push-object", flwr_task_token="other") == status("/v1/runtime/push-object") == 401
    assert status("/v1/runtime/acquire-task", **from_executor) == 200
    assert status("/v1/runtime/acquire-task", LARGEST_ACQUIRE + 1, **from_executor) == 413
    forged = from_executor | {"flwr-superexec-nonce": "another"}
    assert status("/v1/runtime/acquire-task", **forged) == status("/v1/runtime/acquire-task") == 401


def test_the_executor_signs_the_name_of_its_call() -> None:
    source = inspect.getsource(importlib.import_module("flwr.supercore.routers.runtime.router"))
    assert f'SuperExecAuthDependency("{ACQUIRE_METHOD}")' in source
    for call in re.findall(r'@router.post\("/([a-z-]+)"\)\ndef [\s\S]*?\) ->', source):
        body = source[source.index(f'"/{call}"') :].split(") ->")[0]
        assert "task: TaskDependency" in body or call == "acquire-task", "each call has a task's token in its head"
