"""A fleet as it is: weak clients, slow ones, and some that do not answer.

What becomes of a client follows from the run's seed, its number and the round, never from the order
in which clients are asked: so a resumed run and every engine have the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from typing import Annotated, final

from annotated_types import Ge, Gt, Le

from fedpeft.errors import BadInput, WireError
from fedpeft.ledger import DROPPED, LATE, ClientRow
from fedpeft.seeds import derive, uniform
from fedpeft.types import Client, Engine, Lost, Reply
from fedpeft.wire.messages import Response, Status


@final
@dataclass(frozen=True)
class Device:
    """A class of devices of a simulated fleet; NAME is yours to choose.

    Which clients have one is drawn from the seed. Time is modelled, not measured: a client takes
    `step_seconds` for each of its steps, and its bytes at `bandwidth`.
    """

    share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the clients that have such a device; those of all classes add to 1."""
    capacity: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the adapters' ranks that it can train, in methods with unequal ranks."""
    steps: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the local steps that it takes, rounded up."""
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability that it does not answer a request."""
    straggling: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability that it is slow in a round."""
    slowdown: Annotated[float, Ge(1)] = 10.0
    """How many times as long a slow one takes."""
    step_seconds: Annotated[float, Ge(0)] = 1.0
    """Modelled seconds of a local step."""
    bandwidth: Annotated[float, Gt(0)] | None = None
    """Bytes per second, down and up, of its link; left out: transfers take no modelled time."""


@final
@dataclass(frozen=True)
class Fleet:
    """The device of each client, and how it fares; empty where all clients are alike.

    ``devices``: the classes by name. ``device_of``: client -> the name of its class. ``planned``:
    client -> the local steps that it takes in a round. ``deadline``: modelled seconds that a reply
    may take; None for any.

    >>> fleet = Fleet({"phone": Device(1.0, straggling=1.0, slowdown=3.0)}, {7: "phone"}, seed=0)
    >>> fleet.seconds(7, round_number=0, steps=4, moved=10**6)
    12.0
    """

    devices: Mapping[str, Device] = field(default_factory=dict)
    device_of: Mapping[int, str] = field(default_factory=dict)
    planned: Mapping[int, int] = field(default_factory=dict)
    seed: int = 0
    deadline: float | None = None

    def of(self, client: int) -> Device:
        """Return the device of a client."""
        return self.devices[self.device_of[client]]

    def capacity(self, client: int) -> float:
        """Return the share of the ranks that a client can train."""
        return self.of(client).capacity if self.devices else 1.0

    def paces(self) -> dict[int, float]:
        """Return the share of the local steps that each client takes; those with all are missing.

        >>> Fleet({"phone": Device(1.0, steps=0.5)}, {3: "phone"}).paces()
        {3: 0.5}
        """
        paces: dict[int, float] = {}
        for client in self.device_of:
            if self.of(client).steps < 1:
                paces[client] = self.of(client).steps
        return paces

    def members(self) -> dict[str, list[int]]:
        """Return the clients of each class, ascending."""
        members: dict[str, list[int]] = {name: [] for name in self.devices}
        for client, name in sorted(self.device_of.items()):
            members[name].append(client)
        return members

    def drops_out(self, client: int, round_number: int, phase: int = 0) -> bool:
        """Return whether a client leaves a request unanswered."""
        draw = uniform(self.seed, "dropout", client, round_number, phase)
        return draw < self.of(client).dropout

    def straggles(self, client: int, round_number: int) -> bool:
        """Return whether a client is slow in a round."""
        return uniform(self.seed, "straggling", client, round_number) < self.of(client).straggling

    def seconds(self, client: int, round_number: int, steps: int, moved: int) -> float:
        """Return the modelled seconds of a client that takes ``steps`` and moves so many bytes."""
        device = self.of(client)
        seconds = steps * device.step_seconds
        if device.bandwidth is not None:
            seconds += moved / device.bandwidth
        return seconds * device.slowdown if self.straggles(client, round_number) else seconds


def dealt(devices: Mapping[str, Device], clients: Sequence[int], seed: int) -> dict[int, str]:
    """Return the class of each client, drawn so that every class has its share of them.

    Counts are rounded by largest remainders. Neither the order of the clients nor that of the
    classes matters. BadInput for a class that gets no client.

    >>> classes = {"phone": Device(0.75), "desk": Device(0.25)}
    >>> sorted(dealt(classes, range(4), seed=0).values())
    ['desk', 'phone', 'phone', 'phone']
    """
    names, total = sorted(devices), len(clients)
    # 1. How many of each: the whole parts of share * clients, then one more by remainder.
    quotas = {name: devices[name].share * total for name in names}
    counts = {name: floor(quotas[name] + 1e-9) for name in names}  # 0.7 * 10 is less than 7
    by_remainder = sorted(names, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name in names:
        if not counts[name]:
            raise BadInput(
                f"federation.fleet.{name}.share = {devices[name].share:g}: is less than one of "
                f"{total} clients, so none has such a device; choose at least {1 / total:.3g}"
            )
    # 2. Who: the clients in an order drawn by their numbers.
    order = sorted(clients, key=lambda client: (derive(seed, "device", client), client))
    device_of: dict[int, str] = {}
    for name in names:
        for client in order[: counts[name]]:
            device_of[client] = name
        order = order[counts[name] :]
    return device_of


@final
@dataclass
class Outing:
    """The engine of one round of a fleet: some clients do not answer, some answer too late.

    A client that drops out is sent its request, whose bytes count, and does nothing: it moves no
    bytes up, and keeps the memory that it had. A client that is late trains and answers as any
    other, and its bytes count both ways, but the reply is lost.
    ``seconds``: the modelled time of each client that answered in the last exchange.
    """

    engine: Engine
    fleet: Fleet
    round: int
    exchanges: int = 0
    seconds: dict[int, float] = field(default_factory=dict)

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        """Ask the clients that answer, and yield the others as lost; see ``Engine.exchange``."""
        phase, self.exchanges = self.exchanges, self.exchanges + 1
        self.seconds.clear()
        down: dict[int, int] = {}  # bytes of each request

        def counted(client: Client) -> bytes:
            blob = request(client)
            down[client.id] = len(blob)
            return blob

        answering: list[Client] = []
        for client in clients:
            if self.fleet.drops_out(client.id, self.round, phase):
                request(client)  # its bytes are on their way
                yield Lost(client, DROPPED)
            else:
                answering.append(client)
        for outcome in self.engine.exchange(answering, counted):
            yield self._in_time(outcome, down.get(outcome.client.id, 0), phase)

    def noting(self, record: Callable[[ClientRow], None]) -> Callable[[ClientRow], None]:
        """Return ``record`` for rows to which device and modelled time are added first."""

        def note(row: ClientRow) -> None:
            device, seconds = self.fleet.device_of[row.client], self.seconds.get(row.client)
            record(replace(row, device=device, modelled=seconds))

        return note

    def _in_time(self, outcome: Reply | Lost, down: int, phase: int) -> Reply | Lost:
        """Return ``outcome``, or the same as lost where it comes after the deadline."""
        match outcome:
            case Lost():
                return outcome
            case Reply(client, blob):
                steps, moved = self._steps(client.id, blob, phase), down + len(blob)
                seconds = self.fleet.seconds(client.id, self.round, steps, moved)
                self.seconds[client.id] = seconds
                deadline = self.fleet.deadline
                if deadline is not None and seconds > deadline:
                    return Lost(client, f"{LATE} {deadline:g} s of modelled time", blob)
                return outcome

    def _steps(self, client: int, reply: bytes, phase: int) -> int:
        """Return the local steps behind a reply."""
        try:
            response = Response.decode(reply)
        except WireError:  # the server's loop says what is wrong with it
            return 0
        # A discreet reply may tell no loss alone, as under DP-SGD; under secure aggregation and DP,
        # whose rounds train in their first exchange alone, it tells neither examples nor steps.
        if response.status is Status.DISCREET and not response.measured.examples:
            return 0 if phase else self.fleet.planned[client]
        return response.measured.steps
