"""The app of the clients in Flower's simulation; a memory stays in its node's ``Context.state``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.engines.flower.grid import FAILED, arrays, blob, record
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import still_needed, used
from fedpeft.types import NO_MEMORY
from fedpeft.wire.messages import Response, forgotten

Build = Callable[[str], Worker]
"""Makes a worker from its configuration."""

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
