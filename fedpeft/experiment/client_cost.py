"""What a method costs a client: bytes, steps, seconds of a step and memory, from a rehearsal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import final

from fedpeft.experiment.build import Federation
from fedpeft.experiment.rehearsal import Rehearsal, rehearse
from fedpeft.experiment.timing import give_back_memory, timing
from fedpeft.experiment.transfers import Transfers
from fedpeft.ledger import ClientRow
from fedpeft.training.loop import num_steps


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
class ClientCost:
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


def cost_of_client(federation: Federation) -> ClientCost:
    """Return what the method of ``federation``, built from ``shortened`` settings, costs a client.

    It is rehearsed; see ``rehearse`` for how, and for what raises BadInput.
    """
    give_back_memory()
    rehearsal = rehearse(federation)
    transfers, measured = Transfers(rehearsal.rows), timing(rehearsal, federation)
    rounds = rehearsal.rounds
    return ClientCost(
        down=transfers.down,
        up=transfers.up,
        groups=tuple(_groups(federation, rehearsal, transfers)),
        trained=(_trained(rounds[0]), _trained(rounds[-1])),
        step_seconds=measured.step_seconds,
        timed_steps=measured.timed_steps,
        peak_memory=measured.peak_memory,
    )


def _groups(federation: Federation, rehearsal: Rehearsal, transfers: Transfers) -> Iterator[Group]:
    """Yield the classes of clients."""
    planned = _planned_steps(federation)
    classes = federation.fleet.members() or {"": list(planned)}
    for name, members in classes.items():
        moved = transfers.of(set(members))
        steps = rehearsal.steps(max(planned[client] for client in members))
        exchanges: list[Exchange] = []
        for phase, steps_there in steps.items():
            most = moved.in_phase(phase).most
            if most is not None:
                exchanges.append(Exchange(most, steps_there))
        yield Group(name, moved.most, sum(steps.values()), tuple(exchanges))


def _planned_steps(federation: Federation) -> dict[int, int]:
    """Return the local steps that each client is to take in a round of the run."""
    training = federation.config.training
    steps: dict[int, int] = {}
    for client, data in federation.worker.client_data.items():
        steps[client] = num_steps(len(data.train), training)
    return {**steps, **federation.fleet.planned}


def _trained(rows: Sequence[ClientRow]) -> int:
    return max(row.measured.trained for row in rows)
