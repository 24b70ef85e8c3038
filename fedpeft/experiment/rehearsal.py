"""A run in miniature: what a method moves and needs, counted and measured in a few rounds."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from statistics import median
from typing import ClassVar, Final, final

from torch import nn

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation
from fedpeft.experiment.config import Config
from fedpeft.experiment.rounds import drawn
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.federation.server import federate
from fedpeft.ledger import ClientRow
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.loop import num_steps
from fedpeft.types import (
    Base,
    Client,
    Context,
    LocalTask,
    Lost,
    Method,
    Payload,
    Reply,
    State,
    Update,
)

ROUNDS: Final = 4
"""Rounds of a rehearsal; schedules that end with the run, such as FedARA's, go through whole."""
STEPS: Final = 2
"""Steps that one client takes in each of them for the clock; the others take one of one text."""


@final
@dataclass(frozen=True)
class Exchange:
    """What one exchange of a round asks of the clients of a class.

    ``moved``: the most bytes that one of them moved in it, both ways, counted. ``steps``: the local
    steps of the one that takes most of them in the run.
    """

    moved: int
    steps: int


@final
@dataclass(frozen=True)
class Group:
    """Clients of one class of devices; where all clients are alike, all of them, without a name.

    ``moved`` and ``steps``: as of an exchange, but in all of a round together; ``moved`` is None
    where no client was drawn. ``exchanges``: those of a round; none where no client was drawn.
    """

    name: str
    moved: int | None
    steps: int
    exchanges: tuple[Exchange, ...]


@final
@dataclass(frozen=True)
class Rehearsed:
    """What a method costs one client.

    ``down``, ``up``: the most bytes that a client was sent, and sent back, by round; counted.
    ``trained``: numbers that a client trains, in the first round and in the last. ``step_seconds``:
    measured, of a step of a client alone in each round that was timed, over all of its exchanges,
    in ascending order; ``timed_steps``: how many steps these are together. ``peak_memory``:
    measured bytes of this process while that client trained, model and libraries included; 0 where
    the system does not tell.
    """

    down: tuple[int, ...]
    up: tuple[int, ...]
    groups: tuple[Group, ...]
    trained: tuple[int, int]
    step_seconds: tuple[float, ...]
    timed_steps: int
    peak_memory: int

    @property
    def step(self) -> float:
        """Return the median seconds of a step."""
        return median(self.step_seconds)


def shortened(config: Config) -> Config:
    """Return the settings of the rehearsal: no more than ``ROUNDS`` rounds, otherwise the same.

    A schedule's length that is written out is shortened as much.
    """
    rounds = min(ROUNDS, config.federation.rounds)
    method = dict(config.method)
    if "rounds" in method:
        kept = rounds / config.federation.rounds
        method["rounds"] = max(1, round(int(method["rounds"]) * kept))
    federation = replace(config.federation, rounds=rounds)
    return replace(config, federation=federation, method=method)


def rehearse(federation: Federation) -> Rehearsed:
    """Return what the method of ``federation``, built from ``shortened`` settings, costs a client.

    The rounds are real ones, with the cohorts of the run, so their messages are the run's: only the
    steps are few, clients train one by one, and all of them answer. BadInput where no reply of the
    last round is of use.
    """
    _give_back_memory()
    rows, most_steps = _play(federation)
    by_round = [list(group) for _, group in groupby(rows, attrgetter("round"))]
    if not by_round or all(row.lost for row in by_round[-1]):
        why = by_round[-1][-1].lost if by_round else "nobody was asked"
        raise BadInput(f"no reply could be used: {why}")

    # 1. Bytes, by client and round: those of all phases together.
    down: list[int] = []
    up: list[int] = []
    moved: dict[int, int] = {}  # client -> its most in a round, both ways
    moved_at_once: dict[tuple[int, int], int] = {}  # (client, phase) -> its most in that exchange
    for of_round in by_round:
        traffic = _traffic(of_round)
        down.append(max(sent for sent, _ in traffic.values()))
        up.append(max(replied for _, replied in traffic.values()))
        for client, (sent, replied) in traffic.items():
            moved[client] = max(moved.get(client, 0), sent + replied)
    for row in rows:
        exchange = row.client, row.phase
        moved_at_once[exchange] = max(moved_at_once.get(exchange, 0), row.down + row.up)

    # 2. Seconds and memory of the client that was timed. Its first round warms up.
    clients = federation.clients
    timed: list[list[ClientRow]] = []  # by round, the rows of all phases
    for of_round in by_round:
        largest = _largest([clients[row.client] for row in of_round])
        timed.append([row for row in of_round if row.client == largest.id])
    warm = timed[1:] or timed
    # Not as the client tells: one that hides the number of its steps replies 0.
    steps = sum(_capped(_timed_steps(federation.config), most) for most in most_steps.values())
    step_seconds: list[float] = []
    for phases in warm:
        step_seconds.append(sum(row.measured.seconds for row in phases) / steps)
    return Rehearsed(
        down=tuple(down),
        up=tuple(up),
        groups=tuple(_groups(federation, moved, moved_at_once, most_steps)),
        trained=(_trained(by_round[0]), _trained(by_round[-1])),
        step_seconds=tuple(sorted(step_seconds)),
        timed_steps=steps * len(warm),
        peak_memory=max(row.measured.peak_memory for phases in timed for row in phases),
    )


def _groups(
    federation: Federation,
    moved: Mapping[int, int],
    moved_at_once: Mapping[tuple[int, int], int],
    most_steps: Mapping[int, int | None],
) -> Iterator[Group]:
    """Yield the classes of clients.

    ``moved``: client -> its most bytes of a round. ``moved_at_once``: (client, phase) -> the same
    of an exchange. ``most_steps``: phase -> the most steps that the method takes in it.
    """
    data, fleet = federation.worker.client_data, federation.fleet
    planned = {
        k: num_steps(len(held.train), federation.config.training) for k, held in data.items()
    }
    planned |= fleet.planned
    for name, members in (fleet.members() or {"": list(data)}).items():
        steps = max(planned[client] for client in members)
        drawn_ones = [moved[client] for client in members if client in moved]
        exchanges: list[Exchange] = []
        for phase, most in sorted(most_steps.items()):
            there = [client for client in members if (client, phase) in moved_at_once]
            if there:
                largest = max(moved_at_once[client, phase] for client in there)
                exchanges.append(Exchange(largest, _capped(steps, most)))
        in_all = sum(_capped(steps, most) for most in most_steps.values())
        yield Group(name, max(drawn_ones, default=None), in_all, tuple(exchanges))


def _capped(steps: int, most: int | None) -> int:
    """Return ``steps``, but no more than ``most``, None for any number."""
    return steps if most is None else min(steps, most)


def _play(federation: Federation) -> tuple[list[ClientRow], Mapping[int, int | None]]:
    """Play the rounds; return the ledger's rows of all clients, and what ``_StepsNoted`` noted."""
    config, memories = federation.config, Memories()
    # Kept hidden states would make steps faster than those of a client that comes for the first
    # time, which has none.
    worker = replace(federation.worker, cache=ActivationCache(), step_alone=None, paces={})
    most_steps: dict[int, int | None] = {}
    worker = replace(worker, method=_StepsNoted(federation.method, most_steps))
    engine = _OneTimed(
        timed=LocalEngine(
            _brief(worker, _timed_steps(config), config.training.batch_size), memories
        ),
        others=LocalEngine(_brief(worker, steps=1, batch_size=1), memories),
    )
    rows: list[ClientRow] = []
    states = federate(
        federation.method,
        federation.first_state(),
        engine,
        partial(_cohort, drawn(federation, federation.trace)),
        range(config.federation.rounds),
        config=federation.agreed,
        min_replies=config.federation.min_replies,
        record=rows.append,
        largest_update=config.federation.largest_update,
    )
    for _ in states:  # a round is played when its state is asked for
        pass
    return rows, most_steps


def _cohort(cohort: Callable[[int, int], Sequence[Client]], round_number: int) -> Sequence[Client]:
    return cohort(round_number, 0)


def _brief(worker: Worker, steps: int, batch_size: int) -> Worker:
    """Return a worker whose clients take so many steps of so many texts."""
    return replace(worker, training=replace(worker.training, steps=steps, batch_size=batch_size))


def _timed_steps(config: Config) -> int:
    """Return the steps that are timed in a round: no more than the run has."""
    return min(STEPS, config.training.steps or STEPS)


@final
@dataclass(frozen=True)
class _StepsNoted:
    """The method ``inner``, which notes ``most_steps``: phase -> ``LocalTask.steps``.

    A reply would not do: it tells the few steps of the rehearsal, or none.
    """

    paper: ClassVar[str] = ""
    inner: Method
    most_steps: dict[int, int | None]

    def init(self, base: Base, seed: int) -> State:
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        return self.inner.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        with self.inner.mount(model, down, memory, context) as task:
            self.most_steps[context.phase] = task.steps
            yield task

    def expects(self, state: State, down: Payload) -> Payload:
        return self.inner.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        return self.inner.receive(state, updates)


@final
@dataclass(frozen=True)
class _OneTimed:
    """An engine whose largest client takes the steps that are timed, and all others a small one."""

    timed: LocalEngine
    others: LocalEngine

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Ask one client after another; see ``Engine.exchange``."""
        largest = _largest(clients).id if clients else None
        for client in clients:
            engine = self.timed if client.id == largest else self.others
            yield from engine.exchange([client], request)


def _largest(clients: Sequence[Client]) -> Client:
    """Return the client with the most examples, the first of several."""
    return max(clients, key=attrgetter("examples"))


def _traffic(rows: Sequence[ClientRow]) -> dict[int, tuple[int, int]]:
    """Return the bytes down and up of each client, summed over the phases of one round."""
    traffic: dict[int, tuple[int, int]] = {}
    for row in rows:
        down, up = traffic.get(row.client, (0, 0))
        traffic[row.client] = down + row.down, up + row.up
    return traffic


def _trained(rows: Sequence[ClientRow]) -> int:
    return max(row.measured.trained for row in rows)


def _give_back_memory() -> None:
    """Return freed memory to the system, so that the peak of one method is not the next one's."""
    # glibc keeps what was freed; other C libraries have no such function.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
