"""Clients in this process, one cohort after the other; still, only bytes cross."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, final

from fedpeft.client import Worker
from fedpeft.engines.site import Site
from fedpeft.memory import Memories
from fedpeft.types import Client, Engine, Lost, Reply, WireError
from fedpeft.wire import Answer

T = TypeVar("T")


@final
@dataclass(frozen=True)
class LocalEngine:
    """Lets ``worker`` play every client, in cohorts of one; ``memories`` is what the clients keep."""

    worker: Worker
    memories: Memories = field(default_factory=Memories)

    def exchange(self, clients: Sequence[Client], request: Callable[[Client], bytes]) -> Iterator[Reply | Lost]:
        """Ask the clients one by one, in order; a request that a client refuses makes it lost."""
        for client in clients:
            blob = request(client)
            try:
                memory = self.memories.get(client.id, client.memory)
                [(answer, kept)] = self.worker.handle([client.id], [blob], [memory])
            except WireError as error:
                yield Lost(client, str(error))
                continue
            if kept:
                self.memories.put(client.id, Answer.decode(answer).memory, kept, client.memory)
            yield Reply(client, answer)


def launch(site: Site, body: Callable[[Engine], T]) -> T:
    """Call ``body`` with the clients of ``site`` in this process."""
    return body(LocalEngine(site.worker, site.memories))
