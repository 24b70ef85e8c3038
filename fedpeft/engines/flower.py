"""Flower carries the bytes: an engine for the server, an app for the clients, a simulation of both.

A message holds the request as one raw ``uint8`` array, and names the client, the configuration and
the version of the memory that it is for. The answer holds the reply as one raw array. A client's
memory stays in its node's ``Context.state``, in its last two versions.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, TypeVar, final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads it once, when it is imported

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Context,
    Error,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedpeft.engines.grid import Nodes, arrays, blob, pull, push, record
from fedpeft.engines.pool import ClientPool
from fedpeft.errors import BadInput, WireError
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import still_needed, used
from fedpeft.types import NO_MEMORY, Client, Engine, Lost, Reply
from fedpeft.wire.messages import Response, forgotten

T = TypeVar("T")
# Ray reports its use over the network; and it would hide the accelerators from actors without any.
QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
FAILED: Final = 2  # Flower's code for an app that raised
Build = Callable[[str], Worker]
"""Makes a worker from its configuration."""


@final
@dataclass(frozen=True)
class Pending:
    """A client that has until ``deadline`` to answer, in seconds of the monotonic clock."""

    client: Client
    deadline: float


@final
@dataclass(frozen=True)
class FlowerEngine:
    """An engine whose clients sit behind a Flower grid.

    ``ended``: set when the grid is gone. ``nodes``: the node of each client. ``config``: what a
    node builds its worker from. ``patience``: seconds until a request is lost. ``window``: requests
    under way at once, which bounds memory. ``poll``: seconds between two looks for answers (1 or
    more over a network).
    """

    grid: Grid
    ended: threading.Event
    nodes: Nodes
    config: str
    patience: float = 3600.0
    window: int = 2
    poll: float = 0.02

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Send every client its request, ``window`` at a time, and yield the answers as they come.

        A client is lost, with the reason, if it has no node, if Flower refuses its request, or if
        no readable answer comes within ``patience``; later and second answers are ignored. Nodes
        that have joined since the last exchange are asked which client they are, and take part from
        the next exchange on. RuntimeError where the grid is gone; the grid's own error where it is
        out of reach.
        """
        self.nodes.look()
        # Message id -> who is asked. Refilled one by one: a slow client holds up one slot only.
        under_way: dict[str, Pending] = {}
        for client in clients:
            yield from self._ask(client, request, under_way)
            while len(under_way) >= self.window:
                yield from self._look(under_way)
        while under_way:
            yield from self._look(under_way)

    def _ask(
        self,
        client: Client,
        request: Callable[[Client], bytes],
        under_way: dict[str, Pending],
    ) -> Iterator[Lost]:
        """Send ``client`` its request and add it to ``under_way``, or yield the client as lost."""
        node = self.nodes.get(client.id)
        if node is None:
            yield Lost(client, "no node has joined for this client")
            return
        message = self._message(client, node, request(client))
        pending = Pending(client, time.monotonic() + self.patience)
        try:
            under_way[push(self.grid, message)] = pending
        except WireError as error:
            yield Lost(client, str(error))

    def _message(self, client: Client, node: int, request: bytes) -> Message:
        """Return the message to ``node`` that holds a request and names its client."""
        # Past our patience the answer is of no use, and Flower need not keep the message either.
        to = ConfigRecord({"config": self.config, "client": client.id, "memory": client.memory})
        content = RecordDict({"to": to, "request": record(request)})
        return Message(content, node, MessageType.TRAIN, ttl=self.patience)

    def _look(self, under_way: dict[str, Pending]) -> Iterator[Reply | Lost]:
        """Wait a moment; yield the outcomes so far, and take their requests off ``under_way``."""
        # The event doubles as the clock: the wait ends early when the simulation does.
        if self.ended.wait(self.poll):
            raise RuntimeError("the Flower simulation ended while clients were at work")
        for sent, pending in list(under_way.items()):  # a copy, as entries are removed
            try:
                content = pull(self.grid, sent)
                reply = None if content is None else blob(content, "answer")
                # The clock is read after the look: an answer that is there is never too late.
                if reply is None and time.monotonic() >= pending.deadline:
                    raise WireError(f"no answer within {self.patience:g} s")
            except WireError as error:
                del under_way[sent]
                yield Lost(pending.client, str(error))
                continue
            if reply is not None:
                del under_way[sent]
                yield Reply(pending.client, reply)


def connect(
    grid: Grid,
    ended: threading.Event,
    clients: int,
    config: str,
    joining: float = 300.0,
) -> FlowerEngine:
    """Return the engine once all ``clients`` have a node, or after ``joining`` seconds.

    A client that is missing then neither holds up the run nor ends it: its replies are lost, each
    with a line in the ledger, until its node joins after all. ``min_replies`` decides whether the
    other clients are enough. Only a run without any node ends with BadInput: it could record
    nothing but losses.
    """
    nodes = Nodes(grid, clients)
    deadline = time.monotonic() + joining
    nodes.look()
    while len(nodes) < clients and time.monotonic() < deadline:
        if ended.wait(0.05):
            raise RuntimeError(f"the Flower simulation ended with {len(nodes)} of {clients} nodes")
        nodes.look()
    if len(nodes) == 0:
        raise BadInput(
            f"engine.kind = 'flower': no node joined within {joining:g} s; "
            "start the nodes first, each with the partition-id of its client"
        )
    return FlowerEngine(grid, ended, nodes, config)


# The last configuration's worker, for as long as the process of an actor lives.
_workers: Final[dict[str, Worker]] = {}


@final
@dataclass(frozen=True)
class ClientHandler:
    """Handles the messages to a node's client.

    A class of this module and not a closure: Ray pickles it by name, so that every call in an actor
    finds the same ``_workers``.
    """

    build: Build

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer ``message`` with a reply, or with an error of one line; nothing is raised.

        Flower would wrap what is raised and log it twice.
        """
        try:
            reply = self._handle(message.content, context.state)
        except Exception as error:
            return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
        return Message(RecordDict({"answer": record(reply)}), reply_to=message)

    def _handle(self, content: RecordDict, state: RecordDict) -> bytes:
        """Return the reply to a request, and store the client's new memory in ``state``.

        A client that lacks the memory which the request assumes says so. WireError where the
        message or the request cannot be read.
        """
        # 1. Read the message, and fetch the memory that it assumes from the node's state.
        to = content["to"]
        config, client, version = str(to["config"]), int(str(to["client"])), str(to["memory"])
        request = blob(content, "request")
        worker = self._worker(config)
        versions = arrays(state, config)  # version -> memory
        memory = b""
        if version != str(NO_MEMORY):
            if version not in versions:
                return forgotten(request, worker.config)
            memory = versions[version].data
        # 2. Do the work: a stack of one client.
        [(reply, new_memory)] = worker.handle([client], [request], [memory])
        if new_memory:
            # 3. Store the new memory. The assumed one stays beside it: should this reply be lost,
            # the server goes on to assume that one.
            new_version = Response.decode(reply).memory
            kept: dict[str, Array] = {}
            for needed in still_needed(map(int, versions), int(version), new_version):
                kept[str(needed)] = record(used(versions[str(needed)].data))["blob"]
            state[config] = ArrayRecord({**kept, str(new_version): record(new_memory)["blob"]})
        return reply

    def _worker(self, config: str) -> Worker:
        """Return the worker of a configuration; it is built unless the last message used it."""
        if config not in _workers:
            _workers.clear()  # one model in memory, not one per configuration
            _workers[config] = self.build(config)
        return _workers[config]


def _tell_partition(message: Message, context: Context) -> Message:
    """Answer the question which partition this node holds."""
    return Message(RecordDict({"node": ConfigRecord({**context.node_config})}), reply_to=message)


def client_app(build: Build) -> ClientApp:
    """Return the app of the clients; ``build`` makes a worker from its configuration."""
    app = ClientApp()
    app.query()(_tell_partition)
    app.train()(ClientHandler(build))
    return app


@contextlib.contextmanager
def _surroundings(ended: threading.Event) -> Iterator[str]:
    """Keep Flower and Ray offline, quiet and in a folder of their own; yield that folder.

    At the end, put everything back and set ``ended``.
    """
    # What Ray leaves open is no fault of the user's.
    rays_warnings = (  # Ray 2.55, 2026-11
        r"unclosed file <_io\.\w+ name='/dev/null'",
        r"subprocess \d+ is still running",
    )
    with (
        # A short prefix: Ray puts sockets in there, and a socket's path has about 100 characters.
        tempfile.TemporaryDirectory(prefix="fl", ignore_cleanup_errors=True) as folder,
        warnings.catch_warnings(),
    ):
        for message in rays_warnings:
            warnings.filterwarnings("ignore", message, ResourceWarning)
        before, log = dict(os.environ), logging.getLogger("flwr")
        level = log.level
        os.environ |= {"FLWR_HOME": folder, "FLWR_LOG_LEVEL": "CRITICAL", **QUIET}
        log.setLevel(logging.CRITICAL)  # what fails is a Lost with its reason, or is raised
        try:
            yield folder
        finally:
            ended.set()
            log.setLevel(level)
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ |= before  # Flower makes PYTHONPATH longer


def launch(pool: ClientPool, body: Callable[[Engine], T], actors: int = 1) -> T:
    """Simulate the clients of ``pool``, call ``body`` with the engine, and return its result.

    ``body`` runs in the server app, a thread of this process. ``actors``: processes that do the
    clients' work.
    """
    # 1. The server app. The result of `body` and any error leave its thread through a future.
    outcome, ended, server = Future[T](), threading.Event(), ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            engine = connect(grid, ended, pool.clients, pool.settings)
            outcome.set_result(body(engine))
        except BaseException as error:
            outcome.set_exception(error)

    # 2. The simulation: a Ray of this machine alone, without Ray's console output.
    with _surroundings(ended) as folder:
        ray: dict[str, ConfigRecordValues] = {
            "address": "local",
            "num_cpus": actors,
            "object_store_memory": 1 << 30,  # bytes; Ray's default is a share of all memory
        }
        ray |= {"log_to_driver": False, "logging_level": "ERROR", "_temp_dir": folder}
        # One CPU a client makes `actors` the number of actors; one that dies is started again.
        actor: dict[str, ConfigRecordValues] = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}
        app = client_app(pool.rebuild)
        backend = {"client_resources": actor, "init_args": ray}
        run_simulation(server, app, pool.clients, backend_config=backend)
    # 3. Where Flower failed to start, `main` was never called.
    if not outcome.done():
        raise RuntimeError("the Flower simulation ended before the run began")
    return outcome.result()
