"""Flower carries the bytes: the engine on the server's side, the app on the clients', a simulation that joins them.

A message holds the request as one raw ``uint8`` array, and for which client, configuration and memory it is; the answer
holds one raw array. What a client remembers stays in its node's ``Context.state``, the last two versions of it.
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
from fedpeft.wire.messages import Response
from fedpeft.wire.versions import written

T = TypeVar("T")
QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
FAILED: Final = 2  # Flower's code for an app that raised
Build = Callable[[str], Worker]


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

    ``ended``: set when the grid is gone. ``nodes``: the node of each client. ``config``: what a node builds its worker
    from. ``patience``: seconds until a request is lost. ``window``: requests under way at once, which bounds memory.
    ``poll``: seconds between two looks for answers (1 or more over a network).
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
        twice, is not looked at. Nodes that have joined since the last exchange are asked whom they
        play, and take part from the next one on. RuntimeError where the grid is gone; where it is
        out of reach, what it raises itself.
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
                answer = None if content is None else blob(content, "answer")
                if answer is None and time.monotonic() >= pending.deadline:
                    raise WireError(f"no answer within {self.patience:g} s")
            except WireError as error:
                del under_way[sent]
                yield Lost(pending.client, str(error))
                continue
            if answer is not None:
                del under_way[sent]
                yield Reply(pending.client, answer)


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


_workers: Final[
    dict[str, Worker]
] = {}  # the last configuration's worker, for as long as the actor lives


@final
@dataclass(frozen=True)
class _Play:
    """Plays one client for one message. Ray pickles it as a class of this module, so ``_workers`` is found again."""

    build: Build

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            answer = self._play(message.content, context.state)
        except Exception as error:  # told in one line; Flower would wrap it and log it twice
            return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
        return Message(RecordDict({"answer": record(answer)}), reply_to=message)

    def _play(self, content: RecordDict, state: RecordDict) -> bytes:
        config, client, version = (
            str(content["to"][name]) for name in ("config", "client", "memory")
        )
        held = arrays(state, config)
        if version not in {str(NO_MEMORY), *held}:
            here = sorted(written(int(known)) for known in held)
            lacks = f"holds no memory of round {written(int(version))}, only of {here or 'none'}"
            raise WireError(f"client {client} {lacks}")
        assumed = {round_: array for round_, array in held.items() if round_ == version}
        if config not in _workers:
            _workers.clear()  # one model in memory, not one per configuration
            _workers[config] = self.build(config)
        memory = b"".join(array.data for array in assumed.values())
        request = blob(content, "request")
        [(answer, kept)] = _workers[config].handle([int(client)], [request], [memory])
        if (
            kept
        ):  # beside it stays the one that the server goes on to assume should this answer be lost
            newest = str(Response.decode(answer).memory)
            state[config] = ArrayRecord({**assumed, newest: record(kept)["blob"]})
        return answer


def _partition(message: Message, context: Context) -> Message:
    return Message(RecordDict({"node": ConfigRecord({**context.node_config})}), reply_to=message)


def client_app(build: Build) -> ClientApp:
    """Return the app that plays clients; ``build`` makes a worker from its configuration."""
    app = ClientApp()
    app.query()(_partition)
    app.train()(_Play(build))
    return app


@contextlib.contextmanager
def _surroundings(ended: threading.Event) -> Iterator[str]:
    """Keep Flower and Ray offline, quiet and in a folder of their own; then put everything back and set ``ended``."""
    with (
        tempfile.TemporaryDirectory(prefix="fl", ignore_cleanup_errors=True) as folder,
        warnings.catch_warnings(),
    ):
        for message in (
            r"unclosed file <_io\.\w+ name='/dev/null'",
            r"subprocess \d+ is still running",
        ):
            warnings.filterwarnings("ignore", message, ResourceWarning)  # Ray 2.55, 2026-11
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


def launch(site: ClientPool, body: Callable[[Engine], T], actors: int = 1) -> T:
    """Start a simulation of the clients of ``site``, call ``body`` with the engine that reaches them, return its result.

    ``body`` runs in the server app, a thread of this process. ``actors`` processes play the clients.
    """
    outcome, ended, server = Future[T](), threading.Event(), ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        try:
            outcome.set_result(body(connect(grid, ended, site.clients, site.settings)))
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
        app = client_app(site.rebuild)
        run_simulation(
            server, app, site.clients, backend_config={"client_resources": actor, "init_args": ray}
        )
    if not outcome.done():
        raise RuntimeError("the Flower simulation ended before the run began")
    return outcome.result()
