"""Four rounds of every method, played once; the tests compare with them or go on from the middle of them."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from fedpeft.ledger import ClientRow
from fedpeft.memory import Memories
from fedpeft.types import Lost, Reply, State
from fedpeft.wire import decode
from tests.tiny import Federation, federation, small, unchanged

ROUNDS = 4
BEGINS = [0, 3]
"""Rounds that contract tests look at: the first, and one in SLoRA's second stage, FedARA's ranks dying, memories stored."""


@dataclass(frozen=True)
class Reference:
    """``states[n]`` and ``memories[n]``: after n rounds."""

    playing: Federation
    states: list[State]
    memories: list[Memories]


@cache
def reference(name: str) -> Reference:
    """Return four rounds of method ``name``."""
    playing = federation(small(name))
    states, memories = [playing.start], [deepcopy(playing.memories)]
    for _ in range(ROUNDS):
        states.append(playing.play(1, states[-1]))
        memories.append(deepcopy(playing.memories))
    return Reference(playing, states, memories)


def going_on(
    name: str,
    begin: int,
    change: Callable[[int, Reply | Lost], Reply | Lost] = unchanged,
    *,
    backwards: bool = False,
) -> tuple[Federation, State]:
    """Return a federation of fresh processes, and the state, as they are after ``begin`` rounds of the reference."""
    found = reference(name)
    kept = deepcopy(found.memories[begin])
    return federation(small(name), change, backwards=backwards, memories=kept), found.states[begin]


def asked(playing: Federation, exchange: int, client: int) -> dict[str, Tensor]:
    """Return what a client was sent, without the fields of the request."""
    fields = decode(playing.engine.talks[exchange][client][0])
    return {name: tensor for name, tensor in fields.items() if not name.startswith("@")}


def unmeasured(rows: list[ClientRow]) -> list[ClientRow]:
    """Return rows without the fields that differ between two runs of the same thing."""
    return [replace(row, seconds=0.0, peak_memory=0) for row in rows]

