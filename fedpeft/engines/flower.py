"""Flower carries the bytes: an engine for the server, an app for the clients, a simulation of both.

A message holds the request as one raw ``uint8`` array, and for which client, configuration and
memory it is; the answer holds the reply as one raw array. What a client remembers stays in its
node's ``Context.state``, the last two versions of it.
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
from fedpeft.types import NO_MEMORY, Client, Engine, Lost, Reply
from fedpeft.wire.messages import Response, forgotten

T = TypeVar("T")
QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
FAILED: Final = 2  # Flower's code for an app that raised
Build = Callable[[str], Worker]
"""Makes a worker from its configuration."""


@final
@dataclass(frozen=True)
class Pending:
    """A client whose request is under way until ``deadline``, in seconds of the monotonic clock."""

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

        A client is lost, with the reason, if it has no node, if Flower refuses its request, and if
        what comes back within ``patience`` is no answer or cannot be read; what comes later, or
        twice, is not looked at. Nodes that have joined since the last exchange are asked which
        client they are, and take part from the next one on. RuntimeError where the grid is gone;
        where it is out of reach, what it raises itself.
        """
        self.nodes.look()
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
        """Return a request and for whom it is as a message to ``node``."""
        to = ConfigRecord({"config": self.config, "client": client.id, "memory": client.memory})
        content = RecordDict({"to": to, "request": record(request)})
        return Message(content, node, MessageType.TRAIN, ttl=self.patience)

    def _look(self, under_way: dict[str, Pending]) -> Iterator[Reply | Lost]:
        """Wait a moment; yield what has become of requests ``under_way``, which then leave it."""
        if self.ended.wait(self.poll):
            raise RuntimeError("the Flower simulation ended while clients were at work")
        for sent, pending in list(under_way.items()):
            try:
                content = pull(self.grid, sent)
                reply = None if content is None else blob(content, "answer")
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

    Who is missing then neither holds up the run nor ends it, but counts as a client that falls
    silent later: its replies are lost, each with a line in the ledger; ``min_replies`` says whether
    the others are enough; and it takes part once its node joins after all. Only a run without any
    node, which could record nothing but losses, ends with BadInput.
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

    Ray pickles it as a class of this module, so that ``_workers`` is found again.
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
        to = content["to"]
        config, client, version = str(to["config"]), int(str(to["client"])), str(to["memory"])
        request = blob(content, "request")
        worker = self._worker(config)
        versions = arrays(state, config)
        assumed: dict[str, Array] = {}
        if version != str(NO_MEMORY):
            if version not in versions:
                return forgotten(request, worker.config)
            assumed[version] = versions[version]
        memory = assumed[version].data if assumed else b""
        [(reply, new_memory)] = worker.handle([client], [request], [memory])
        if new_memory:
            # Beside it stays the one that the server goes on to assume should this reply be lost.
            new_version = str(Response.decode(reply).memory)
            state[config] = ArrayRecord({**assumed, new_version: record(new_memory)["blob"]})
        return reply

    def _worker(self, config: str) -> Worker:
        """Return the worker of a configuration, built where it is not that of the last message."""
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
    """Keep Flower and Ray offline, quiet and in a folder of their own, which is yielded.

    Then put everything back and set ``ended``.
    """
    rays_warnings = (  # Ray 2.55, 2026-11
        r"unclosed file <_io\.\w+ name='/dev/null'",
        r"subprocess \d+ is still running",
    )
    with (
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
            os.environ |= before  # Flower has made PYTHONPATH longer


def launch(pool: ClientPool, body: Callable[[Engine], T], actors: int = 1) -> T:
    """Simulate the clients of ``pool``, call ``body`` with the engine, and return its result.

    ``body`` runs in the server app, a thread of this process. ``actors`` processes are the clients.
    """
    outcome, ended, server = Future[T](), threading.Event(), ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            engine = connect(grid, ended, pool.clients, pool.settings)
            outcome.set_result(body(engine))
        except BaseException as error:
            outcome.set_exception(error)

    with _surroundings(ended) as folder:
        ray: dict[str, ConfigRecordValues] = {
            "address": "local",
            "num_cpus": actors,
            "object_store_memory": 1 << 30,
        }
        ray |= {"log_to_driver": False, "logging_level": "ERROR", "_temp_dir": folder}
        actor: dict[str, ConfigRecordValues] = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}
        app = client_app(pool.rebuild)
        backend = {"client_resources": actor, "init_args": ray}
        run_simulation(server, app, pool.clients, backend_config=backend)
    if not outcome.done():
        raise RuntimeError("the Flower simulation ended before the run began")
    return outcome.result()
