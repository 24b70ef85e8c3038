"""The server's loop, a generator of states: ask a cohort, check what comes back, merge, go on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from fedpeft.algebra.norms import l2_norm
from fedpeft.errors import Forgotten, WireError
from fedpeft.federation.replies import in_order
from fedpeft.ledger import ClientRow, Measured
from fedpeft.seeds import generator
from fedpeft.tasks import Counts, Task, examples_in
from fedpeft.types import NO_MEMORY, Client, Engine, Lost, Method, Payload, Reply, State, Update
from fedpeft.wire.messages import Kind, Request, Response, check
from fedpeft.wire.versions import as_told


def sample(clients: Sequence[Client], count: int, seed: int, round_number: int) -> list[Client]:
    """Return the cohort of a round: ``count`` of the ``clients``, in their order.

    They are drawn without replacement, anew in every round.

    >>> clients = [Client(k) for k in range(5)]
    >>> cohort = sample(clients, 2, seed=0, round_number=7)
    >>> len(cohort), cohort == sample(clients, 2, seed=0, round_number=7)
    (2, True)
    """
    # A generator of its own for every round: a resumed run draws the same cohorts.
    random = generator(seed, "cohort", round_number)
    chosen = torch.randperm(len(clients), generator=random)[:count]
    return [clients[index] for index in sorted(chosen.tolist())]


def federate(
    method: Method,
    state: State,
    engine: Engine,
    cohort: Callable[[int], Sequence[Client]],
    rounds: range,
    *,
    config: bytes,
    min_replies: int,
    record: Callable[[ClientRow], None],
    largest_update: float | None = None,
) -> Iterator[State]:
    """Yield the state after each of ``rounds``.

    ``config``: digest of what server and clients must agree on. A reply that cannot be used is
    recorded with the reason and left out. With fewer than ``min_replies`` usable ones the round is
    silent: it merges nothing. ``record`` gets one row per client. All clients of a cohort are
    asked, also where ``receive`` leaves some of their updates unread. ``largest_update``: largest
    norm of an update that is used (see ``update_norm``); None for any finite one.

    Where the method's rounds have several phases, each is an exchange with the clients that have
    answered in the one before, and a phase with too few replies makes the whole round silent. So
    does one of whose replies ``receive`` can make nothing.
    """
    for round_number in rounds:
        before, clients = state, cohort(round_number)
        while state.round == round_number:  # once, or once a phase
            # 1. Ask the clients; `receive` pulls the updates one by one, so that few are in memory.
            exchange = _Exchange(method, state, engine, config, largest_update)
            updates = exchange.updates(_with_memories(clients, state))
            useless = ""
            try:
                merged = method.receive(state, updates)
            except WireError as error:
                useless = str(error)
            for _ in updates:  # a client is asked when the stream comes to it
                pass
            rows, known = exchange.rows, {**state.memories, **exchange.memories}
            # 2. With too few replies, merge again without any: their rows are lost, too.
            if len(exchange.answered) < min_replies:
                useless = f"only {len(exchange.answered)} usable replies, {min_replies} needed"
            if useless:
                merged, known = method.receive(before, ()), dict(before.memories)
                rows = _all_lost(rows, useless)
            # 3. Write the rows down before the state is given away, and take note of new memories.
            for row in rows:
                record(row)
            for client in exchange.forgetful:
                known.pop(client, None)  # the next request assumes no memory
            _check_next(method, state, merged)
            state, clients = replace(merged, memories=known), exchange.answered
        yield state


def update_norm(down: Payload, up: Payload) -> float:
    """Return the L2 norm of an update: of all that came up, less what of it was sent down.

    What was not sent, or in another shape, counts as a difference to zero. Whole numbers, such as
    votes, do not count.

    >>> update_norm({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 4.0]), "new": torch.tensor(4.0)})
    5.0
    """
    return l2_norm(_differences(down, up))


def _differences(down: Payload, up: Payload) -> Iterator[Tensor]:
    """Yield the real numbers of ``up`` less what of them was sent down, in float64."""
    for name, tensor in up.items():
        if not tensor.is_floating_point():
            continue
        difference = tensor.to(torch.float64)
        sent = down.get(name)
        if sent is not None and sent.shape == tensor.shape:
            difference = difference - sent.to(difference)
        yield difference


def _check_norm(down: Payload, up: Payload, largest: float | None) -> None:
    """Raise WireError where the update is larger than ``largest``; None for no limit."""
    if largest is None:
        return
    norm = update_norm(down, up)
    if norm > largest:
        raise WireError(
            f"its update has norm {norm:.3g}, and federation.largest_update is {largest:g}"
        )


def _check_next(method: Method, before: State, after: State) -> None:
    """Raise ValueError unless ``after`` is of the next round, or of this one's next phase."""
    if (after.round, after.phase) in {(before.round + 1, 0), (before.round, before.phase + 1)}:
        return
    raise ValueError(
        f"{type(method).__name__}.receive gave a state of round {after.round}, phase "
        f"{after.phase}, after round {before.round}, phase {before.phase}"
    )


def _all_lost(rows: Sequence[ClientRow], why: str) -> list[ClientRow]:
    """Return the rows of a round as lost; those that were lost already keep their reason."""
    lost: list[ClientRow] = []
    for row in rows:
        lost.append(row if row.lost else replace(row, lost=why))
    return lost


def _with_memories(clients: Sequence[Client], state: State) -> list[Client]:
    """Return ``clients`` with the versions of their memories that ``state`` knows of."""
    informed: list[Client] = []
    for client in clients:
        version = state.memories.get(client.id, NO_MEMORY)
        informed.append(replace(client, memory=version))
    return informed


def poll(
    method: Method,
    state: State,
    engine: Engine,
    clients: Sequence[Client],
    *,
    config: bytes,
    task: Task,
) -> dict[int, Counts]:
    """Return what each client counted when it scored ``state`` on its own test examples.

    Clients without test examples and lost clients are left out.
    """

    def request(client: Client) -> bytes:
        down = method.send(state, as_told(client))
        return Request(Kind.EVALUATE, state.round, config, down, client.memory).encode()

    counts_of: dict[int, Counts] = {}
    for outcome in engine.exchange(_with_memories(clients, state), request):
        match outcome:
            case Reply(client, blob):
                with suppress(WireError):  # what cannot be read is left out, like a lost client
                    response = Response.decode(blob)
                    counts_of[client.id] = _counts(response, client, state.round, task)
            case Lost():
                pass
    return counts_of


def _counts(response: Response, client: Client, round_number: int, task: Task) -> Counts:
    """Return the counts in a response after some rounds; WireError for impossible ones."""
    check(response, round_number, task.no_counts(), memory=client.memory)
    counts = response.payload
    if examples_in(counts) != response.measured.examples:
        said = f"{examples_in(counts)} examples are counted, {response.measured.examples} measured"
        raise WireError(said)
    if why := task.fault(counts):
        raise WireError(why)
    return counts


@final
@dataclass(frozen=True)
class _Sent:
    """A request as it was sent.

    ``down``: its payload. ``memory``: the version that it assumes. ``blob``: the whole as bytes.
    ``expected``: names, shapes and dtypes of a valid reply.
    """

    down: Payload
    memory: int
    blob: bytes
    expected: Payload


@final
@dataclass
class _Exchange:
    """One exchange with a cohort: a round, or a phase of it.

    ``rows``: the ledger's row of each client. ``memories``: client -> the version that it now has.
    ``forgetful``: clients that lack what their request assumed. ``answered``: those whose replies
    can be used.
    """

    method: Method
    state: State
    engine: Engine
    config: bytes
    largest_update: float | None = None
    rows: list[ClientRow] = field(default_factory=list)
    memories: dict[int, int] = field(default_factory=dict)
    forgetful: set[int] = field(default_factory=set)
    answered: list[Client] = field(default_factory=list)
    # Client -> bytes of its request, its payload, and what a valid reply to it looks like. Not the
    # request itself, which may be another one for every client.
    _under_way: dict[int, tuple[int, Payload, Payload]] = field(default_factory=dict)
    _last: _Sent | None = None  # encoded once for all clients that are sent the same

    def updates(self, cohort: Sequence[Client]) -> Iterator[Update]:
        """Yield the usable replies of ``cohort``, in its order, and note every client's row."""
        for outcome in in_order(cohort, self.engine.exchange(cohort, self._request)):
            client = outcome.client
            # An engine that cannot reach a client never encodes its request: 0 bytes down.
            size, down, expected = self._under_way.pop(client.id, (0, {}, {}))
            measured, lost, response = Measured(), None, None
            try:
                response = _response(outcome)
                measured = self._believed(response, client)
                check(
                    response,
                    self.state.round,
                    expected,
                    memory=client.memory,
                    examples=client.examples,
                    phase=self.state.phase,
                )
                _check_norm(down, response.payload, self.largest_update)
            except Forgotten as error:
                self.forgetful.add(client.id)
                lost = str(error)
            except WireError as error:
                lost = str(error)
            row = ClientRow(
                round=self.state.round,
                phase=self.state.phase,
                client=client.id,
                down=size,
                up=len(outcome.blob),
                measured=measured,
                lost=lost,
            )
            self.rows.append(row)
            if response is None or lost is not None:
                continue
            self.answered.append(client)
            if response.memory != NO_MEMORY:
                self.memories[client.id] = response.memory
            yield Update(client, measured.examples, response.payload)

    def _believed(self, response: Response, client: Client) -> Measured:
        """Return what ``client`` measured, without impossible values and other exchanges'."""
        if (response.round, response.phase) != (self.state.round, self.state.phase):
            return Measured()
        return response.measured.sound(client.examples)

    def _request(self, client: Client) -> bytes:
        """Return the request to ``client``; many clients get the very same bytes."""
        down = self.method.send(self.state, as_told(client))
        sent = self._last
        if sent is None or sent.memory != client.memory or not _same_tensors(sent.down, down):
            state, memory = self.state, client.memory
            request = Request(Kind.TRAIN, state.round, self.config, down, memory, state.phase)
            expected = self.method.expects(state, down)
            self._last = sent = _Sent(down, memory, request.encode(), expected)
        self._under_way[client.id] = len(sent.blob), sent.down, sent.expected
        return sent.blob


def _same_tensors(one: Payload, other: Payload) -> bool:
    """Return whether two payloads hold the very same tensors: cheap, as no number is looked at."""
    if one is other:
        return True
    return one.keys() == other.keys() and all(other[name] is tensor for name, tensor in one.items())


def _response(outcome: Reply | Lost) -> Response:
    """Return what came back, before any check; WireError with the reason for a lost client."""
    match outcome:
        case Lost(_, reason):
            raise WireError(reason)
        case Reply(_, blob):
            return Response.decode(blob)
