"""``now.json`` in a run's folder: who is there and who has answered, for those who watch it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from fedpeft.engines.flower.engine import FlowerEngine
from fedpeft.experiment.run_folder import NOW
from fedpeft.experiment.watching import Now
from fedpeft.types import Client, Lost, Reply

OFTEN: Final = 0.25
"""Seconds between two writes at least, within an exchange."""


@final
@dataclass
class Announced:
    """An engine of sites that says in ``folder`` who is there and who has answered, as it happens.

    The file is for watching alone. It is not forced onto the disk, and a disk without room for it
    ends no run.
    """

    engine: FlowerEngine
    folder: Path
    _asked: set[int] = field(default_factory=set)
    _replied: set[int] = field(default_factory=set)
    _lost: set[int] = field(default_factory=set)
    _said: Now | None = None
    _when: float = 0.0

    def __post_init__(self) -> None:
        self.engine.nodes.on_look = self._say

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Do what the engine's own ``exchange`` does."""
        for of_the_last in (self._asked, self._replied, self._lost):
            of_the_last.clear()

        def ask(client: Client) -> bytes:
            self._asked.add(client.id)
            return request(client)

        for outcome in self.engine.exchange(clients, ask):
            match outcome:
                case Reply(client):
                    self._replied.add(client.id)
                case Lost(client):
                    self._lost.add(client.id)
            self._say()
            yield outcome
        self._say(at_once=True)

    def _say(self, *, at_once: bool = False) -> None:
        """Write the file where something has changed, and it was not written just now."""
        now = Now(
            online=frozenset(self.engine.nodes.online()),
            asked=frozenset(self._asked),
            replied=frozenset(self._replied),
            lost=frozenset(self._lost),
        )
        moment = time.monotonic()
        if now == self._said or (not at_once and moment - self._when < OFTEN):
            return
        self._said, self._when = now, moment
        temporary = self.folder / f"{NOW}.tmp"
        with suppress(OSError):
            temporary.write_text(now.to_json(), encoding="ascii")
            temporary.replace(self.folder / NOW)
