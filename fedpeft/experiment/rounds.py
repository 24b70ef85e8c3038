"""The rounds of a run: play them, evaluate, and put ledger and checkpoint on the disk."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, final

from fedpeft.experiment.privacy import Accounts, drawn_in_secret, draws_in_secret
from fedpeft.experiment.recorder import OnProgress, Recorder
from fedpeft.experiment.scoring import evaluation_row
from fedpeft.experiment.server_side import ServerSide
from fedpeft.federation.checkpoint import Checkpoint
from fedpeft.federation.cohort import SAMPLERS, Trace
from fedpeft.federation.fleet import Fleet, Outing
from fedpeft.federation.server import federate
from fedpeft.ledger import FILE, ClientRow, Row, stream
from fedpeft.types import Client, Engine, State

ALIKE: Final = Fleet()
"""Clients of which none is slow, weak or away."""

Cohort = Callable[[int, int], Sequence[Client]]
"""Returns the clients of a round, told its number and how often it was tried before."""


def drawn(side: ServerSide, trace: Trace | None = None) -> Cohort:
    """Return the cohorts of clients that are there: drawn from the seed and the round.

    So a resumed run draws the same, unless nobody may know who takes part. ``trace``: who is there
    when; None where all always are.
    """
    clients, plan, seed = side.clients, side.config.federation, side.config.seed
    draw = SAMPLERS[plan.sampling]
    in_secret = draws_in_secret(side.config)

    def cohort(round_number: int, _tries: int) -> Sequence[Client]:
        there = clients if trace is None else trace.there(clients, round_number)
        if in_secret:
            return drawn_in_secret(there, plan.clients_per_round)
        return draw(there, plan.clients_per_round, seed, round_number)

    return cohort


def run_rounds(
    side: ServerSide,
    engine: Engine,
    folder: Path,
    begin: Checkpoint,
    on_progress: OnProgress,
    cohort: Cohort,
    *,
    tries: int = 1,
    until: int | None = None,
    fleet: Fleet = ALIKE,
) -> State:
    """Run the rounds that are left and return the last state.

    ``tries``: how often a round is played before one with too few replies is left silent.
    ``until``: the round after which to stop, where that is not the last one; the run can be resumed
    from there.
    ``fleet``: the devices of simulated clients. Evaluations are answered whatever device one has.
    """
    plan, choice = side.config.federation, side.config.evaluation
    state = begin.state  # what is returned where no round is left
    if draws_in_secret(side.config):
        tries = 1  # a round that nobody was drawn for is one like others
    with Recorder(side, folder, begin, on_progress) as recorder:
        accounts = Accounts.of(side, stream(folder / FILE))

        def record(row: Row) -> None:
            recorder.record(row)
            accounts.add(row)

        def counted(round_number: int, attempt: int) -> Sequence[Client]:
            clients = cohort(round_number, attempt)
            accounts.drawn_from(len(side.clients))  # as they were when these were drawn
            return clients

        def evaluate(state: State) -> None:
            row = evaluation_row(side, state, engine, begin.memories)
            if row is not None:
                recorder.record(row)

        if choice.start and begin.state.round == 0:
            evaluate(begin.state)
        last = plan.rounds if until is None else until
        for state in _played(side, begin.state, engine, counted, record, tries, last, fleet):
            for told in accounts.rows(state):
                record(told)
            # The row comes before the checkpoint: a resumed run cuts off what comes after.
            if state.round % choice.every == 0 or state.round == plan.rounds:
                evaluate(state)
            recorder.save(state)
    return state


def _played(
    side: ServerSide,
    state: State,
    engine: Engine,
    cohort: Cohort,
    record: Callable[[ClientRow], None],
    tries: int,
    last: int,
    fleet: Fleet,
) -> Iterator[State]:
    """Yield the state after each round that is left up to the ``last`` one."""
    while state.round < last:
        # A round that got too few replies is played again by a fresh cohort. The state is the one
        # before it, but for what is known of the clients' memories.
        for attempt in range(tries):
            counted = _Counted(record)
            asked = partial(_of, cohort, attempt)
            after = _one_round(side, state, engine, asked, counted, fleet)
            if counted.usable >= side.config.federation.min_replies:
                break
            state = replace(state, memories=after.memories)
        state = after
        yield state


def _of(cohort: Cohort, attempt: int, round_number: int) -> Sequence[Client]:
    return cohort(round_number, attempt)


def _one_round(
    side: ServerSide,
    state: State,
    engine: Engine,
    cohort: Callable[[int], Sequence[Client]],
    record: Callable[[ClientRow], None],
    fleet: Fleet,
) -> State:
    """Return the state after one round."""
    if fleet.devices:
        outing = Outing(engine, fleet, state.round)
        engine, record = outing, outing.noting(record)
    [after] = federate(
        side.method,
        state,
        engine,
        cohort,
        range(state.round, state.round + 1),
        config=side.agreed,
        min_replies=side.config.federation.min_replies,
        record=record,
        largest_update=side.config.federation.largest_update,
    )
    return after


@final
@dataclass
class _Counted:
    """Passes rows on, and counts the replies of the latest phase that were of use."""

    record: Callable[[ClientRow], None]
    usable: int = 0
    phase: int = 0

    def __call__(self, row: ClientRow) -> None:
        """Record ``row``."""
        if row.phase != self.phase:
            self.phase, self.usable = row.phase, 0
        self.usable += row.lost is None
        self.record(row)
