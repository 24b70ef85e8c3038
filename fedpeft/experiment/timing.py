"""Seconds of a local step and peak memory, measured of one client in each round of a rehearsal."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import final

from fedpeft.experiment.build import Federation
from fedpeft.experiment.rehearsal import Rehearsal, timed_client, timed_steps
from fedpeft.ledger import ClientRow


@final
@dataclass(frozen=True)
class Timing:
    """What was measured of the client that was timed.

    ``rounds``: its rows in each round, one for every exchange. ``steps``: how many it took in a
    round, in all of its exchanges together.
    """

    rounds: Sequence[Sequence[ClientRow]]
    steps: int

    @property
    def counted(self) -> Sequence[Sequence[ClientRow]]:
        """Return the rounds whose seconds count: the first one warms up, unless it is alone."""
        return self.rounds[1:] or self.rounds

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Return the seconds of a step in each round that counts, ascending."""
        seconds = [_seconds(rows) / self.steps for rows in self.counted]
        return tuple(sorted(seconds))

    @property
    def timed_steps(self) -> int:
        """Return how many steps were timed in all."""
        return self.steps * len(self.counted)

    @property
    def peak_memory(self) -> int:
        """Return the bytes of this process at the peak; 0 where the system does not tell."""
        rows = chain.from_iterable(self.rounds)
        return max(row.measured.peak_memory for row in rows)


def timing(rehearsal: Rehearsal, federation: Federation) -> Timing:
    """Return what was measured in the rehearsal of ``federation``."""
    clients = federation.clients
    rounds: list[list[ClientRow]] = []
    for rows in rehearsal.rounds:
        timed = timed_client([clients[row.client] for row in rows])
        rounds.append([row for row in rows if row.client == timed.id])
    # Not as the client tells: one that hides the number of its steps replies 0.
    steps = rehearsal.steps(timed_steps(federation.config))
    return Timing(rounds, sum(steps.values()))


def give_back_memory() -> None:
    """Return freed memory to the system, so that the peak of one method is not the next one's."""
    # glibc keeps what was freed; other C libraries have no such function.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _seconds(rows: Sequence[ClientRow]) -> float:
    return sum(row.measured.seconds for row in rows)
