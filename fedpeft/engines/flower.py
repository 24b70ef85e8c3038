"""Flower carries the bytes: the engine on the server's side, the app on the clients', a simulation that joins them.

A message holds the request as one raw ``uint8`` array, and for which client, configuration and memory it is; the answer
holds one raw array. What a client remembers stays in its node's ``Context.state``, the last two versions of it.
"""

import contextlib
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, TypeVar, final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # flwr reads it once, when it is imported

from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedpeft.client import Worker
from fedpeft.engines.site import Site
from fedpeft.memory import written
from fedpeft.types import NEVER, Client, Engine, Lost, Reply, WireError
from fedpeft.wire import Answer

T = TypeVar("T")
BYTES: Final = "fedpeft.bytes"  # our stype: the data is a message of wire.py, not a saved NumPy array
QUIET: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
FAILED, EXPIRED = 2, 3  # Flower's codes for an app that raised and for a message past its time to live
Build = Callable[[str], Worker]


def _record(blob: bytes) -> ArrayRecord:
    return ArrayRecord({"blob": Array("uint8", (len(blob),), BYTES, blob)})


def _arrays(records: RecordDict, name: str) -> ArrayRecord:
    found = records.get(name, ArrayRecord())  # not records.array_records: a cycle in it keeps the blobs until the next gc
    if not isinstance(found, ArrayRecord) or any(array.stype != BYTES for array in found.values()):
        raise WireError(f"record {name!r} of a Flower message should hold arrays of type {BYTES}")
    return found


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
    nodes: dict[int, int]
    config: str
    patience: float = 3600.0
    window: int = 2
    poll: float = 0.02

    def exchange(self, clients: Sequence[Client], request: Callable[[Client], bytes]) -> Iterator[Reply | Lost]:
        """Send every client its request, ``window`` of them at a time, and yield the answers as they come."""
        queue, under_way = iter(clients), dict[str, Client]()
        while True:
            while len(under_way) < self.window and (client := next(queue, None)) is not None:
                under_way[_push(self.grid, self._message(client, request(client)))] = client
            if not under_way:
                return
            for message in _pull(self.grid, under_way, self.ended, self.poll):
                yield self._answer(under_way.pop(message.metadata.reply_to_message_id), message)

    def _message(self, client: Client, request: bytes) -> Message:
        to = ConfigRecord({"config": self.config, "client": client.id, "memory": client.memory})
        content = RecordDict({"to": to, "request": _record(request)})
        return Message(content, self.nodes[client.id], MessageType.TRAIN, ttl=self.patience)

    def _answer(self, client: Client, message: Message) -> Reply | Lost:
        if message.has_content():
            return Reply(client, _arrays(message.content, "answer")["blob"].data)
        late = f"no answer within {self.patience:g} s"
        return Lost(client, late if message.error.code == EXPIRED else str(message.error.reason))


def _push(grid: Grid, message: Message) -> str:
    """Send one message and return its id."""
    sent = next(iter(grid.push_messages([message])), None)
    if not sent:
        raise RuntimeError("Flower refused a message")
    return sent


def _pull(grid: Grid, sent: dict[str, Client], ended: threading.Event, poll: float) -> Iterator[Message]:
    if ended.wait(poll):
        raise RuntimeError("the Flower simulation ended while clients were at work")
    yield from grid.pull_messages(list(sent))


def connect(grid: Grid, ended: threading.Event, clients: int, config: str) -> FlowerEngine:
    """Wait for ``clients`` nodes, ask each which partition it holds, and return the engine that reaches them."""
    while len(ids := list(grid.get_node_ids())) < clients:
        if ended.wait(0.05):
            raise RuntimeError(f"the Flower simulation ended with {len(ids)} of {clients} nodes")
    asked = {_push(grid, Message(RecordDict(), node, MessageType.QUERY)): Client(node) for node in ids}
    nodes: dict[int, int] = {}
    while asked:
        for message in _pull(grid, asked, ended, 0.02):
            node = asked.pop(message.metadata.reply_to_message_id)
            nodes[int(str(message.content["node"]["partition-id"]))] = node.id
    return FlowerEngine(grid, ended, nodes, config)


_workers: Final[dict[str, Worker]] = {}  # the last configuration's worker, for as long as the actor lives


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
        return Message(RecordDict({"answer": _record(answer)}), reply_to=message)

    def _play(self, content: RecordDict, state: RecordDict) -> bytes:
        config, client, version = (str(content["to"][name]) for name in ("config", "client", "memory"))
        held = _arrays(state, config)
        if version not in {str(NEVER), *held}:
            here = sorted(written(int(known)) for known in held)
            lacks = f"holds no memory of round {written(int(version))}, only of {here or 'none'}"
            raise WireError(f"client {client} {lacks}")
        assumed = {round_: array for round_, array in held.items() if round_ == version}
        if config not in _workers:
            _workers.clear()  # one model in memory, not one per configuration
            _workers[config] = self.build(config)
        memory = b"".join(array.data for array in assumed.values())
        request = _arrays(content, "request")["blob"].data
        [(answer, kept)] = _workers[config].handle([int(client)], [request], [memory])
        if kept:  # beside it stays the one that the server goes on to assume should this answer be lost
            state[config] = ArrayRecord({**assumed, str(Answer.decode(answer).memory): _record(kept)["blob"]})
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
    with tempfile.TemporaryDirectory(prefix="fl", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        for message in (r"unclosed file <_io\.\w+ name='/dev/null'", r"subprocess \d+ is still running"):
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


def launch(site: Site, body: Callable[[Engine], T], actors: int = 1) -> T:
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
        ray: dict[str, ConfigRecordValues] = {"address": "local", "num_cpus": actors, "object_store_memory": 1 << 30}
        ray |= {"log_to_driver": False, "logging_level": "ERROR", "_temp_dir": folder}
        actor: dict[str, ConfigRecordValues] = {"num_cpus": 1, "num_gpus": 0, "max_restarts": -1}
        app = client_app(site.rebuild)
        run_simulation(server, app, site.clients, backend_config={"client_resources": actor, "init_args": ray})
    return outcome.result()
