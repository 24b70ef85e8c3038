"""What of Flower's own insides is used, and a self-test of it.

Flower promises nothing about these. They are looked up before anything is started; where a release
has changed one, the way that uses Flower's public interface alone is named.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

from fedpeft.errors import BadInput

Pieces = Mapping[str, Sequence[str]]
"""``module:name`` -> the parameters that are given to it by name or place; empty for no call."""

SITE: Final[Pieces] = {
    "flwr.app.message:remove_content_from_message": ("message",),
    "flwr.common.constant:HEARTBEAT_DEFAULT_INTERVAL": (),
    "flwr.common.serde:message_from_proto": ("message_proto",),
    "flwr.common.serde:message_to_proto": ("message",),
    "flwr.proto.fleet_pb2:ActivateNodeRequest": (),
    "flwr.proto.fleet_pb2:DeactivateNodeRequest": (),
    "flwr.proto.fleet_pb2:PullMessagesRequest": (),
    "flwr.proto.fleet_pb2:PushMessagesRequest": (),
    "flwr.proto.heartbeat_pb2:SendNodeHeartbeatRequest": (),
    "flwr.proto.message_pb2:ConfirmMessageReceivedRequest": (),
    "flwr.proto.message_pb2:PullObjectRequest": (),
    "flwr.proto.message_pb2:PushObjectRequest": (),
    "flwr.proto.node_pb2:Node": (),
    "flwr.supercore.heartbeat:HeartbeatSender": ("heartbeat_fn",),
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": ("obj",),
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": ("obj",),
    "flwr.supercore.inflatable.inflatable_object:iterate_object_tree": ("tree",),
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": (),
    "flwr.supercore.inflatable.inflatable_utils:ObjectPullError": (),
    "flwr.supercore.inflatable.inflatable_utils:ObjectUnavailableError": (),
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": (
        "object_id",
        "object_contents",
    ),
    "flwr.supercore.inflatable.inflatable_utils:pull_objects": (
        "object_ids",
        "pull_object_fn",
        "max_time",
        "initial_backoff",
        "backoff_cap",
    ),
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor": ("component_name",),
    "flwr.supercore.date:now": (),
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": ("public_key",),
    "flwr.supercore.primitives.asymmetric:sign_message": ("private_key", "message"),
    "flwr.supernode.fleet_http_client:FleetHttpClient.from_server_address": (
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
    ),
    "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor": (
        "private_key",
        "public_key",
    ),
}
"""What a site uses (``connector.py``, ``reach.py``)."""

SERVER: Final[Pieces] = {
    "flwr.cli.build:build_fab_from_files": ("files",),
    "flwr.common.constant:SubStatus": (),
    "flwr.common.serde:fab_to_proto": ("fab",),
    "flwr.common.serde:run_from_proto": ("run_proto",),
    "flwr.proto.control_pb2:ListNodesRequest": (),
    "flwr.proto.control_pb2:RegisterNodeRequest": (),
    "flwr.proto.control_pb2:StartRunRequest": (),
    "flwr.proto.control_pb2:UnregisterNodeRequest": (),
    "flwr.proto.runtime_pb2:AcquireTaskRequest": (),
    "flwr.proto.runtime_pb2:PullTaskInputRequest": (),
    "flwr.proto.runtime_pb2:PushTaskOutputRequest": (),
    "flwr.supercore.control.control_http_client:ControlHttpClient.from_server_address": (
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
    ),
    "flwr.supercore.fab:Fab": ("hash_str", "content", "verifications"),
    "flwr.supercore.heartbeat:HeartbeatSender": ("heartbeat_fn",),
    "flwr.supercore.heartbeat:make_task_heartbeat_fn_http": ("client",),
    "flwr.supercore.inflatable.inflatable_utils:ObjectPushError": (),
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor": ("component_name",),
    "flwr.supercore.interceptors:SuperExecAuthHttpInterceptor": (
        "master_secret",
        "protected_methods",
    ),
    "flwr.supercore.date:now": (),
    "flwr.supercore.primitives.asymmetric:bytes_to_public_key": ("public_key_bytes",),
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": ("public_key",),
    "flwr.supercore.primitives.asymmetric:verify_signature": (
        "public_key",
        "message",
        "signature",
    ),
    "flwr.supercore.runtime:RuntimeHttpClient.from_server_address": (
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
    ),
    "flwr.supercore.task_identity:TaskIdentity": (),
    "flwr.superlink.grid:HttpGrid": (
        "runtime_api_address",
        "insecure",
        "root_certificates",
        "token",
    ),
}
"""What the server uses (``claim.py``, ``gate.py``, ``sites.py``)."""

STOCK: Final = (
    "install a flwr from 1.41 up to, but not including, 1.43, or go the way of Flower's own "
    "programs: fedpeft flower-app, see docs/deploy.md"
)


def check(pieces: Pieces) -> None:
    """Raise BadInput for the first of ``pieces`` that is gone, or takes other parameters.

    >>> check({"flwr.app:Message": ()})
    """
    if find_spec("flwr") is None:
        raise BadInput("sites and their server need 'flwr'; get it: pip install 'fedpeft[flower]'")
    for piece, parameters in pieces.items():
        fault = _fault(piece, parameters)
        if fault:
            raise BadInput(f"flwr {version('flwr')}: {piece} {fault}; {STOCK}")


def _fault(piece: str, parameters: Sequence[str]) -> str:
    """Return what is wrong with one piece; empty where it is as expected."""
    module, _, path = piece.partition(":")
    try:
        found = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return "is gone"
    if not parameters:
        return ""
    assert callable(found)
    known = inspect.signature(found).parameters
    missing = [name for name in parameters if name not in known]
    return f"takes no {missing[0]!r} any more" if missing else ""
