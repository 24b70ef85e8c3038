"""The server's loop as a generator of states: ask a cohort, check and count what comes back, merge, go on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import final

import torch

from fedpeft.errors import Forgotten, WireError
from fedpeft.federation.replies import in_order
from fedpeft.ledger import ClientRow, Measured
from fedpeft.seeds import generator
from fedpeft.tasks import Counts, Task, examples_in
from fedpeft.types import NO_MEMORY, Client, Engine, Lost, Method, Payload, Reply, State, Update
from fedpeft.wire.messages import Kind, Request, Response, check
from fedpeft.wire.versions import as_told


def sample(clients: Sequence[Client], count: int, seed: int, number: int) -> list[Client]:
    """Return the ``count`` clients of round ``number``, drawn without replacement, in the order of ``clients``."""
    chosen = torch.randperm(len(clients), generator=generator(seed, "cohort", number))[:count]
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
) -> Iterator[State]:
    """Yield the state after each of ``rounds``.

    ``config``: digest of what server and clients must agree on. A reply that cannot be used is recorded with the reason
    and left out; with fewer than ``min_replies`` usable ones the round is silent. ``record`` gets one row per client.
    Everyone of a cohort is asked, also where ``receive`` leaves some of their updates unread.
    """
    for number in rounds:
        asked = [
            replace(client, memory=state.memories.get(client.id, NO_MEMORY))
            for client in cohort(number)
        ]
        exchange = _Exchange(method, state, engine, config, number)
        updates = exchange.updates(asked)
        merged = method.receive(state, updates)
        for _ in updates:  # a client is asked when the stream comes to it
            pass
        rows, memories = exchange.rows, exchange.memories
        if exchange.count < min_replies:
            merged, memories = method.receive(state, ()), {}
            why = f"only {exchange.count} usable replies, {min_replies} needed"
            rows = [row if row.lost else replace(row, lost=why) for row in rows]
        for row in rows:
            record(row)
        if merged.round != number + 1:
            raise ValueError(
                f"{type(method).__name__}.receive gave a state of round {merged.round} after round {number}"
            )
        known = {**state.memories, **memories}
        state = replace(merged, memories=_without(known, exchange.forgetful))
        yield state


def _without(memories: Mapping[int, int], forgetful: set[int]) -> dict[int, int]:
    """Return the known memories but those of clients that have forgotten them."""
    return {client: version for client, version in memories.items() if client not in forgetful}


def poll(
    method: Method,
    state: State,
    engine: Engine,
    clients: Sequence[Client],
    *,
    config: bytes,
    task: Task,
) -> dict[int, Counts]:
    """Return what each client counted of ``state`` on its own test examples.

    Clients without any, or lost, are left out.
    """
    asked = [replace(client, memory=state.memories.get(client.id, NO_MEMORY)) for client in clients]

    def request(client: Client) -> bytes:
        down = method.send(state, as_told(client))
        return Request(Kind.EVALUATE, state.round, config, down, client.memory).encode()

    found: dict[int, Counts] = {}
    for outcome in engine.exchange(asked, request):
        match outcome:
            case Reply(client, blob):
                with suppress(WireError):
                    response = Response.decode(blob)
                    found[client.id] = _counts(response, client, state.round, task)
            case Lost():
                pass
    return found


def _counts(response: Response, client: Client, round_number: int, task: Task) -> Counts:
    """Return the counts in a response after some rounds; WireError where they cannot be."""
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
class _Pending:
    """A request: what goes ``down``, the version of the ``memory`` it assumes, both as bytes, and what is ``due`` in return."""

    down: Payload
    memory: int
    blob: bytes
    due: Payload


@final
@dataclass
class _Exchange:
    """One round's exchange: what was sent to whom, what came back, and what the ledger is to say of it."""

    method: Method
    state: State
    engine: Engine
    config: bytes
    number: int
    rows: list[ClientRow] = field(default_factory=list)
    memories: dict[int, int] = field(default_factory=dict)
    forgetful: set[int] = field(default_factory=set)  # who lacks what its request assumed
    count: int = 0
    _under_way: dict[int, tuple[int, Payload]] = field(
        default_factory=dict
    )  # bytes down, what is due
    _last: _Pending | None = None

    def updates(self, asked: Sequence[Client]) -> Iterator[Update]:
        """Yield the usable replies of ``asked``, in their order, and take down every client's row."""
        for outcome in in_order(asked, self.engine.exchange(asked, self._request)):
            client = outcome.client
            down, expected = self._under_way.pop(client.id, (0, {}))
            measured, lost, answer = Measured(), None, None
            try:
                answer = _answer(outcome)
                measured = self._believed(answer, client)
                check(answer, self.number, expected, memory=client.memory, examples=client.examples)
            except Forgotten as error:
                self.forgetful.add(client.id)
                lost = str(error)
            except WireError as error:
                lost = str(error)
            row = ClientRow(
                round=self.number,
                client=client.id,
                down=down,
                up=len(outcome.blob),
                measured=measured,
                lost=lost,
            )
            self.rows.append(row)
            if answer is None or lost is not None:
                continue
            self.count += 1
            if answer.memory != NO_MEMORY:
                self.memories[client.id] = answer.memory
            yield Update(client, measured.examples, answer.payload)

    def _believed(self, answer: Response, client: Client) -> Measured:
        """Return what an answer says of this round as far as it can be true, of another nothing."""
        if answer.round != self.number:
            return Measured()
        return answer.measured.sound(client.examples)

    def _request(self, client: Client) -> bytes:
        down = self.method.send(self.state, as_told(client))
        last = self._last
        if (
            last is None or last.down is not down or last.memory != client.memory
        ):  # many get the very same
            blob = Request(Kind.TRAIN, self.number, self.config, down, client.memory).encode()
            self._last = last = _Pending(
                down, client.memory, blob, self.method.expects(self.state, down)
            )
        self._under_way[client.id] = len(last.blob), last.due
        return last.blob


def _answer(outcome: Reply | Lost) -> Response:
    """Return what came back, before any check; of a lost client WireError says why."""
    match outcome:
        case Lost(_, reason):
            raise WireError(reason)
        case Reply(_, blob):
            return Response.decode(blob)
