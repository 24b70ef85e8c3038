"""Four rounds of every method, played once; the tests compare with them or go on from the middle of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, final

import pytest
import torch
from torch import Tensor

from fedpeft.federation.memory import Memories
from fedpeft.ledger import ClientRow
from fedpeft.types import Client, Lost, Payload, Reply, State, Update
from fedpeft.wire.messages import Request, decode
from tests.tiny import CONFIG, NAMES, Tapped, TinyFederation, close, federation, small, unchanged

ROUNDS = 4
BEGINS = [0, 3]
"""Rounds that contract tests look at: the first, and one in SLoRA's second stage, FedARA's ranks dying, memories stored."""


SINGLE = {
    *(("full", 0), ("full", 3), ("sparse", 0), ("sparse", 3), ("slora", 0)),
    *(("peft", 0), ("peft", 3), ("slora_full", 0)),
}
"""(method, round) of which one client is as much as a model can carry: parameters of any kind, or whole matrices."""


LIKE = {
    **dict.fromkeys(["flexlora", "raflora", "lora_fair", "fedrot_lora"], "lora"),
    **dict.fromkeys(["fedsvd", "rolora"], "ffa_lora"),
    **dict.fromkeys(["fedex_lora", "florist"], "flora"),
    "fedsa_lora": "local_only",
    "adalora": "fedara",
    "slora_full": "slora",
}
"""Methods that mount and train as another one does. Tests of that alone run on them in ``make test-all``."""


CORE = frozenset(
    ["full", "bitfit", "lora", "ffa_lora", "federa", "sparse", "slora", "fedara", "local_only"]
)
"""Methods that between them mount, train and merge in every way there is."""


def rows(*columns: Iterable[Any], without: Collection[Any] = ()) -> list[Any]:
    """Return the rows of a table of methods and other ``columns``, those of methods in ``LIKE`` marked as slow."""
    return _table(set(NAMES) - LIKE.keys(), columns, without)


def core_rows(*columns: Iterable[Any], without: Collection[Any] = ()) -> list[Any]:
    """Return the same of a table that takes long: the rows of all but the ``CORE`` are marked as slow."""
    return _table(CORE, columns, without)


def _table(
    quick: Collection[str], columns: Iterable[Iterable[Any]], without: Collection[Any]
) -> list[Any]:
    table: list[Any] = []
    for row in product(NAMES, *columns):
        if row not in without and row[0] not in without:
            marks = () if row[0] in quick else pytest.mark.slow
            table.append(pytest.param(*row, marks=marks))
    return table


PHASES = {"lora_a2": 2}
"""Methods whose rounds have several exchanges, and how many. What is merged comes up in the last."""


def exchanges(name: str, number: int) -> range:
    """Return the exchanges of round ``number`` of a method."""
    phases = PHASES.get(name, 1)
    return range(phases * number, phases * (number + 1))


def merging(name: str, number: int) -> int:
    """Return the last exchange of a round, of which the replies are merged."""
    return exchanges(name, number)[-1]


PERSONAL = {"local_only", "fedsa_lora"}
"""Methods that keep a part of the model with each client."""

NOT_MEANS = {
    "local_only": "nothing goes up",
    "flexlora": "the products B A are averaged",
    "fedex_lora": "the server needs the mean of the products B A beside those of A and B",
    "flora": "the factors are stacked",
    "hetlora": "clients weigh as much as their products",
    "raflora": "each rank has a mean of its own, over the clients that have it",
    "lora_fair": "the server needs the mean of the products B A beside those of A and B",
    "fed_sb": "products are averaged in the first round that is not silent, which may be any",
    "ravan": "each head has a mean of its own, over the clients that train it",
    "florist": "the factors are stacked",
    "lora_a2": "each client sends the ranks that it has chosen",
}
"""Methods whose merge reads more of the replies than weighted sums, and what that is."""

MEANS_MOVED_ON = {
    "fedsvd": "the mean of the products is taken apart anew",
    "adalora": "ranks of the mean are put to sleep",
}
"""Methods of whose replies weighted sums suffice, but the next state is not the mean; and what it is."""


def is_mean(name: str, begin: int) -> bool:
    """Return whether what goes up in round ``begin`` is the mean of all replies afterwards."""
    # Means with something beside them; and of RAVAN's heads the clients here train all.
    if name in {"fedex_lora", "ravan"} or (name == "fed_sb" and begin > 0):
        return True
    # Sums suffice, but the server makes something else of them.
    return name not in NOT_MEANS and name not in MEANS_MOVED_ON


@dataclass(frozen=True)
class Reference:
    """``states[n]`` and ``memories[n]``: after n rounds. ``begins[n]``: as exchange n begins."""

    playing: TinyFederation
    states: list[State]
    memories: list[Memories]
    begins: list[State]

    def rows_of(self, begin: int, end: int = ROUNDS) -> list[ClientRow]:
        """Return the rows of the rounds from ``begin`` to before ``end``."""
        return [row for row in self.playing.rows if begin <= row.round < end]


@cache
def reference(name: str) -> Reference:
    """Return four rounds of method ``name``."""
    playing = federation(small(name))
    states, memories = [playing.start], [deepcopy(playing.memories)]
    begins: list[State] = []
    for number in range(ROUNDS):
        states.append(playing.play(1, states[-1]))
        memories.append(deepcopy(playing.memories))
        state = states[number]
        for exchange in exchanges(name, number):
            begins.append(state)
            if exchange != merging(name, number):
                state = _after(playing, state, exchange)
    return Reference(playing, states, memories, begins)


def updates(playing: TinyFederation, exchange: int) -> list[Update]:
    """Return what came up in an exchange."""
    found: list[Update] = []
    for client, answer in playing.answers(exchange).items():
        found.append(Update(Client(client), answer.measured.examples, answer.payload))
    return found


def _after(playing: TinyFederation, state: State, exchange: int) -> State:
    """Return the state of the next phase."""
    told = {client: answer.memory for client, answer in playing.answers(exchange).items()}
    merged = playing.method.receive(state, updates(playing, exchange))
    return replace(merged, memories={**state.memories, **told})


def going_on(
    name: str,
    begin: int,
    change: Callable[[int, Reply | Lost], Reply | Lost] = unchanged,
    *,
    backwards: bool = False,
) -> tuple[TinyFederation, State]:
    """Return a federation of fresh processes, and the state, as they are after ``begin`` rounds of the reference."""
    found = reference(name)
    kept = deepcopy(found.memories[begin])
    return federation(small(name), change, backwards=backwards, memories=kept), found.states[begin]


@final
@dataclass(frozen=True)
class Replay:
    """An engine that gives the replies of another day, by the phase; clients without one do not answer."""

    replies: Sequence[Mapping[int, bytes]]

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Build every request and give what was said to it then."""
        for client in clients:
            phase = Request.decode(request(client), CONFIG).phase
            yield Reply(client, self.replies[phase][client.id])


def replayed(
    name: str,
    begin: int,
    change: Callable[[int, Reply | Lost], Reply | Lost] = unchanged,
    *,
    backwards: bool = False,
) -> tuple[TinyFederation, State]:
    """Return a federation, and the state, that play round ``begin`` of the reference again without training."""
    found = reference(name)
    playing = found.playing
    phases: list[Mapping[int, bytes]] = []
    for exchange in exchanges(name, begin):
        talk = playing.engine.talks[exchange]
        phases.append({client: reply for client, (_, reply) in talk.items()})
    engine = Replay(phases)
    return TinyFederation(
        playing.method, playing.worker, Memories(), Tapped(engine, change, backwards)
    ), found.states[begin]


def asked(playing: TinyFederation, exchange: int, client: int) -> dict[str, Tensor]:
    """Return what a client was sent, without the fields of the request."""
    fields = decode(playing.engine.talks[exchange][client][0])
    return {name: tensor for name, tensor in fields.items() if not name.startswith("@")}


def unmeasured(rows: list[ClientRow]) -> list[ClientRow]:
    """Return rows without the fields that differ between two runs of the same thing."""
    found = []
    for row in rows:
        same = replace(row.measured, seconds=0.0, seconds_alone=0.0, peak_memory=0)
        found.append(replace(row, measured=same))
    return found


def close_or_counted(left: Payload, right: Payload, tolerance: float) -> None:
    """Assert that what two servers keep is equal: real numbers within ``tolerance``, all others to the bit."""
    close(left, right, tolerance)
    for part, tensor in left.items():
        assert tensor.dtype == right[part].dtype, part
        assert tensor.is_floating_point() or torch.equal(tensor, right[part]), part
