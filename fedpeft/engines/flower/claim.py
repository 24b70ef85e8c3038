"""A run of Flower's whose server is this very process.

Flower would start a program of its own for the server's side of every run. With ``--isolation
process`` whoever holds the SuperLink's secret may claim that task instead: so the loop, its model
and its state stay in one process over all rounds and runs.
"""

import contextlib
import hashlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedpeft.engines.flower.app_folder import APP
from fedpeft.engines.flower.reach import error_code
from fedpeft.engines.flower.superlink import Link
from fedpeft.errors import BadInput

T = TypeVar("T")
TASK: Final = "flwr-serverapp"
ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
CLAIMING: Final = 60.0
"""Seconds in which a run that was started has to appear."""
KEY_IN_USE: Final = 23
"""Flower's code where a public key is registered already."""


def _client(kind: Any, link: Link, name: str, *others: Any) -> Any:
    """Return Flower's client of one of a SuperLink's APIs."""
    return kind.from_server_address(
        server_address=link.address,
        insecure=False,
        root_certificates=link.ca,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=name), *others],
    )


def patient(call: Callable[[], T], seconds: float = 60.0) -> T:
    """Return what ``call`` returns; tried again while the SuperLink is being restarted."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def register(link: Link, keys: Mapping[bytes, str]) -> None:
    """Let the nodes with these public ``keys`` in, each under its name, and no others.

    BadInput where a key is of no use.
    """
    with _client(ControlHttpClient, link, "CLI") as control:
        nodes = patient(lambda: control.ListNodes(ListNodesRequest())).nodes_info
        registered = {bytes(node.public_key): node.node_id for node in nodes}
        for key, name in keys.items():
            if key not in registered:
                _register(control, key, name)
        for key, node in registered.items():
            if key not in keys:
                _unregister(control, node)


def _unregister(control: Any, node: int) -> None:
    """Let a node in no longer; one that is out already is still listed after a restart."""
    try:
        control.UnregisterNode(UnregisterNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise


def _register(control: Any, key: bytes, name: str) -> None:
    try:
        control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
    except httpx.HTTPStatusError as error:
        code = error_code(error.response)
        if code != KEY_IN_USE:
            raise BadInput(f"{name}: Flower refuses this public key (code {code})") from error


@contextlib.contextmanager
def claimed_run(link: Link) -> Iterator[HttpGrid]:
    """Start a run of Flower's, be its server for the length of a ``with``, and end it.

    Yields the grid that reaches its nodes.
    """
    # An answer is announced before its bytes have come; Flower would wait for a second then.
    defaults = getattr(inflatable_utils.pull_objects, "__kwdefaults__", None)
    if defaults and "initial_backoff" in defaults:
        defaults["initial_backoff"] = 0.05
    token = _token(link)
    grid = HttpGrid(
        runtime_api_address=link.address, insecure=False, root_certificates=link.ca, token=token
    )
    runtime = grid._runtime_client
    beat = make_task_heartbeat_fn_http(runtime)
    heart = HeartbeatSender(lambda: _beaten(beat))
    heart.start()
    try:
        task = runtime.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        yield grid
        with contextlib.suppress(httpx.HTTPError):
            output = PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
            runtime.PushTaskOutput(output)
    finally:
        if heart.is_running:
            heart.stop()
        grid.close()


def _beaten(beat: Callable[[], bool]) -> bool:
    """Send a heartbeat; where the SuperLink no longer knows the task, this process is interrupted.

    A SuperLink that answers with another error, as one that is just starting may, is asked again.
    """
    try:
        return beat()
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            signal.raise_signal(signal.SIGINT)
            return True
        return False


def _token(link: Link) -> str:
    """Start a run, claim its task, and return the token that goes with it."""
    content, _ = build_fab_from_files({"pyproject.toml": APP})
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    with _client(ControlHttpClient, link, "CLI") as control:
        run = patient(lambda: control.StartRun(StartRunRequest(fab=fab))).run_id
    auth = SuperExecAuthHttpInterceptor(
        master_secret=link.secret, protected_methods=frozenset({ACQUIRE})
    )
    deadline = time.monotonic() + CLAIMING
    with _client(RuntimeHttpClient, link, "SuperExec", auth) as runtime:
        while time.monotonic() < deadline:
            got = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TASK]))
            if got.token and got.task.run_id == run:
                token: str = got.token
                return token
            time.sleep(0.05)
    raise BadInput(f"the SuperLink did not hand out the run's task within {CLAIMING:g} s")
