"""What an engine needs to run clients: the worker here, or how to build one elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories


@final
@dataclass(frozen=True)
class ClientPool:
    """The clients 0 .. ``clients`` - 1 of one run.

    ``worker`` does their work in this process and ``memories`` is what they keep there.
    ``rebuild(settings)`` returns an equal worker in another process; that process keeps the
    memories of its clients itself.
    """

    clients: int
    worker: Worker
    settings: str
    rebuild: Callable[[str], Worker]
    memories: Memories = field(default_factory=Memories)
