"""Clients in this process, in stacks that train side by side; still, only bytes cross."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

from fedpeft.engines.pool import ClientPool
from fedpeft.errors import Forgotten, NotStackable, WireError
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.types import Client, Engine, Lost, Reply
from fedpeft.wire.messages import Form, forgotten, form, memory_told

T = TypeVar("T")
Forms = tuple[Form, Form]
"""The forms of a request and of the memory that it assumes."""


@final
@dataclass(frozen=True)
class Pending:
    """A client with its request and the memory that the request assumes."""

    client: Client
    request: bytes
    memory: bytes


@final
@dataclass(frozen=True)
class LocalEngine:
    """An engine whose clients are all in this process, where ``worker`` does their work.

    ``memories``: what the clients keep. ``stack``: how many of them train side by side, if their
    requests and memories have the same form. ``unstackable``: forms that turned out not to train
    side by side.
    """

    worker: Worker
    memories: Memories = field(default_factory=Memories)
    stack: int = 1
    unstackable: set[Forms] = field(default_factory=set)

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Ask the clients, stack by stack; a request that a client refuses makes it lost.

        A request waits until there are enough of its form for a stack, but no longer than for twice
        as many clients. A client that lacks the memory which its request assumes says so at once.
        An error that is no WireError ends the exchange; its note names clients and round.
        """
        waiting: dict[Forms, list[Pending]] = {}
        first_index: dict[Forms, int] = {}  # of the client that has waited longest, by form
        last_request, last_form = b"", form(b"")
        for index, client in enumerate(clients):
            # 1. Encode the request, and find out whom this client could train beside.
            blob = request(client)
            try:
                pending = Pending(client, blob, self.memories.get(client.id, client.memory))
                if blob is not last_request:  # many clients get the very same one
                    last_request, last_form = blob, form(blob)
                forms = last_form, form(pending.memory)
            except Forgotten:
                yield self._forgotten(client, blob)
                continue
            except WireError as error:
                yield Lost(client, str(error))
                continue
            # 2. Run the stacks that are full, and those that have waited too long.
            waiting.setdefault(forms, []).append(pending)
            first_index.setdefault(forms, index)
            size = 1 if forms in self.unstackable else self.stack
            ready = {forms} if len(waiting[forms]) >= size else set[Forms]()
            # A form that few clients share does not wait for ever: meanwhile the server keeps the
            # replies of all clients after it, to yield them in order.
            for other, first in first_index.items():
                if index - first >= 2 * self.stack:
                    ready.add(other)
            for group in ready:
                del first_index[group]
                yield from self._run_group(waiting.pop(group), group)
        # 3. Nobody else comes: run the stacks that never became full.
        for group, remaining in waiting.items():
            yield from self._run_group(remaining, group)

    def _forgotten(self, client: Client, request: bytes) -> Reply | Lost:
        """Return the reply of a client that lacks the memory which ``request`` assumes."""
        try:
            return Reply(client, forgotten(request, self.worker.config))
        except WireError as error:
            return Lost(client, str(error))

    def _run_group(self, group: Sequence[Pending], forms: Forms) -> Iterator[Reply | Lost]:
        """Let the clients of ``group``, whose messages have these ``forms``, train side by side.

        If they cannot, they train one by one; forms that never can are remembered.
        """
        ids: list[int] = []
        requests: list[bytes] = []
        memories: list[bytes] = []
        for pending in group:
            ids.append(pending.client.id)
            requests.append(pending.request)
            memories.append(pending.memory)
        try:
            results = self.worker.handle(ids, requests, memories)
        except WireError as error:
            # One client's fault must not cost the others their replies: try each of them alone.
            if len(group) == 1:
                yield Lost(group[0].client, str(error))
                return
            if isinstance(error, NotStackable):
                self.unstackable.add(forms)
            for pending in group:
                yield from self._run_group([pending], forms)
            return
        for pending, (reply, memory) in zip(group, results, strict=True):
            client = pending.client
            if memory:
                self.memories.put(client.id, memory_told(reply), memory, assumed=client.memory)
            yield Reply(client, reply)


def launch(pool: ClientPool, body: Callable[[Engine], T]) -> T:
    """Call ``body`` with an engine for the clients of ``pool`` in this process."""
    return body(LocalEngine(pool.worker, pool.memories, pool.worker.hardware.stack))
