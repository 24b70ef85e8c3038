"""Clients in this process, whole stacks of them side by side; still, only bytes cross."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

from fedpeft.engines.pool import ClientPool
from fedpeft.errors import Forgotten, NotStackable, WireError
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.types import Client, Engine, Lost, Reply
from fedpeft.wire.messages import Form, Response, forgotten, form

T = TypeVar("T")
Forms = tuple[Form, Form]


@final
@dataclass(frozen=True)
class Asked:
    """A client with its request and the memory that this assumes."""

    client: Client
    request: bytes
    memory: bytes


@final
@dataclass(frozen=True)
class LocalEngine:
    """Lets ``worker`` play every client; ``memories`` is what the clients keep.

    ``stack``: how many clients train side by side, if their requests and memories have the same form. ``single``: forms
    of which it was found out that they cannot.
    """

    worker: Worker
    memories: Memories = field(default_factory=Memories)
    stack: int = 1
    single: set[Forms] = field(default_factory=set)

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Ask the clients, stack by stack; a request that a client refuses makes it lost.

        Requests are held back until there are enough of one form for a stack, but not past twice as many clients.
        A client that lacks the memory which its request assumes says so at once. An error that is
        no WireError ends the exchange; its note names clients and round.
        """
        waiting: dict[Forms, list[Asked]] = {}
        since: dict[Forms, int] = {}
        last: tuple[bytes, Form] = (b"", ())
        for number, client in enumerate(clients):
            blob = request(client)
            try:
                asked = Asked(client, blob, self.memories.get(client.id, client.memory))
                last = last if last[0] is blob else (blob, form(blob))  # many get the very same
                kind = last[1], form(asked.memory)
            except Forgotten:
                yield self._forgotten(client, blob)
                continue
            except WireError as error:
                yield Lost(client, str(error))
                continue
            waiting.setdefault(kind, []).append(asked)
            since.setdefault(kind, number)
            full = (
                {kind}
                if len(waiting[kind]) >= (1 if kind in self.single else self.stack)
                else set[Forms]()
            )
            for due in full | {
                old for old, first in since.items() if number - first >= 2 * self.stack
            }:
                del since[due]
                yield from self._play(waiting.pop(due), due)
        for kind, group in waiting.items():
            yield from self._play(group, kind)

    def _forgotten(self, client: Client, request: bytes) -> Reply | Lost:
        """Return what a client says that lacks the memory which ``request`` assumes."""
        try:
            return Reply(client, forgotten(request, self.worker.config))
        except WireError as error:
            return Lost(client, str(error))

    def _play(self, group: Sequence[Asked], kind: Forms) -> Iterator[Reply | Lost]:
        """Let ``group`` train side by side; one by one where that cannot be, and where it never can be, remember that."""
        try:
            found = self.worker.handle(
                [asked.client.id for asked in group],
                [asked.request for asked in group],
                [asked.memory for asked in group],
            )
        except WireError as error:
            if len(group) == 1:
                yield Lost(group[0].client, str(error))
                return
            if isinstance(error, NotStackable):
                self.single.add(kind)
            for asked in group:
                yield from self._play([asked], kind)
            return
        for asked, (answer, kept) in zip(group, found, strict=True):
            if kept:
                self.memories.put(
                    asked.client.id, Response.decode(answer).memory, kept, asked.client.memory
                )
            yield Reply(asked.client, answer)


def launch(site: ClientPool, body: Callable[[Engine], T]) -> T:
    """Call ``body`` with the clients of ``site`` in this process."""
    return body(LocalEngine(site.worker, site.memories, site.worker.hardware.stack))
