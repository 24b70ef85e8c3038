"""A run in miniature: a few rounds of few steps, whose messages are those of the run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
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
class Rehearsal:
    """What was played.

    ``rows``: of the ledger, round by round. ``most_steps``: phase -> the most local steps that the
    method takes in it; None for all that are planned.
    """

    rows: Sequence[ClientRow]
    most_steps: Mapping[int, int | None]

    @property
    def rounds(self) -> list[list[ClientRow]]:
        """Return the rows of each round in which anybody was asked, all of its exchanges."""
        return [list(rows) for _, rows in groupby(self.rows, attrgetter("round"))]

    def steps(self, planned: int) -> dict[int, int]:
        """Return the local steps, by phase, of a client that would take ``planned`` in each.

        >>> Rehearsal([], {0: 5, 1: None, 2: 0}).steps(8)
        {0: 5, 1: 8, 2: 0}
        """
        steps: dict[int, int] = {}
        for phase, most in sorted(self.most_steps.items()):
            steps[phase] = planned if most is None else min(planned, most)
        return steps


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


def rehearse(federation: Federation) -> Rehearsal:
    """Play the rounds of ``federation``, which is built from ``shortened`` settings.

    They are real ones, with the cohorts of the run, so their messages are the run's: only the steps
    are few, clients train one by one, and all of them answer. BadInput where no reply of the last
    round is of use.
    """
    config, memories = federation.config, Memories()
    most_steps: dict[int, int | None] = {}
    worker = replace(
        federation.worker,
        method=_StepsNoted(federation.method, most_steps),
        # Kept hidden states would make steps faster than those of a client that comes for the
        # first time, which has none.
        cache=ActivationCache(),
        step_alone=None,
        paces={},
    )
    timed = _brief(worker, timed_steps(config), config.training.batch_size)
    others = _brief(worker, steps=1, batch_size=1)
    cohort = drawn(federation, federation.trace)
    rows: list[ClientRow] = []
    states = federate(
        federation.method,
        federation.first_state(),
        _OneTimed(LocalEngine(timed, memories), LocalEngine(others, memories)),
        lambda round_number: cohort(round_number, 0),
        range(config.federation.rounds),
        config=federation.agreed,
        min_replies=config.federation.min_replies,
        record=rows.append,
        largest_update=config.federation.largest_update,
    )
    for _ in states:  # a round is played when its state is asked for
        pass
    _check_answered(rows)
    return Rehearsal(rows, most_steps)


def timed_steps(config: Config) -> int:
    """Return the steps that are timed in an exchange: no more than the run has."""
    return min(STEPS, config.training.steps or STEPS)


def timed_client(clients: Sequence[Client]) -> Client:
    """Return the one that is timed: with the most examples, the first of several."""
    return max(clients, key=attrgetter("examples"))


def _brief(worker: Worker, steps: int, batch_size: int) -> Worker:
    """Return a worker whose clients take so many steps of so many texts."""
    return replace(worker, training=replace(worker.training, steps=steps, batch_size=batch_size))


def _check_answered(rows: Sequence[ClientRow]) -> None:
    """Raise BadInput where nobody was asked, or no reply of the last round is of use."""
    if not rows:
        raise BadInput("no reply could be used: nobody was asked")
    last = rows[-1]
    if all(row.lost for row in rows if row.round == last.round):
        raise BadInput(f"no reply could be used: {last.lost}")


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
    """An engine in which ``timed`` asks the client that is timed, and ``others`` all others."""

    timed: LocalEngine
    others: LocalEngine

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Ask one client after another; see ``Engine.exchange``."""
        if not clients:
            return
        chosen = timed_client(clients).id
        for client in clients:
            engine = self.timed if client.id == chosen else self.others
            yield from engine.exchange([client], request)
