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
from fedpeft.tasks import Scores
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
        talk = _Talk(method, state, engine, config, number)
        updates = talk.updates(asked)
        merged = method.receive(state, updates)
        for _ in updates:  # a client is asked when the stream comes to it
            pass
        rows, memories = talk.rows, talk.memories
        if talk.count < min_replies:
            merged, memories = method.receive(state, ()), {}
            why = f"only {talk.count} usable replies, {min_replies} needed"
            rows = [row if row.lost else replace(row, lost=why) for row in rows]
        for row in rows:
            record(row)
        if merged.round != number + 1:
            raise ValueError(
                f"{type(method).__name__}.receive gave a state of round {merged.round} after round {number}"
            )
        known = {**state.memories, **memories}
        state = replace(merged, memories=_without(known, talk.forgetful))
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
    labels: int,
) -> dict[int, Scores]:
    """Return the scores of ``state`` on each client's own test examples; clients without any, or lost, are left out."""
    asked = [replace(client, memory=state.memories.get(client.id, NO_MEMORY)) for client in clients]

    def request(client: Client) -> bytes:
        down = method.send(state, as_told(client))
        return Request(Kind.EVALUATE, state.round, config, down, client.memory).encode()

    found: dict[int, Scores] = {}
    for outcome in engine.exchange(asked, request):
        match outcome:
            case Reply(client, blob):
                with suppress(WireError):
                    found[client.id] = _scores(Response.decode(blob), client, state.round, labels)
            case Lost():
                pass
    return found


def _scores(answer: Response, client: Client, number: int, labels: int) -> Scores:
    """Return the scores in an answer after ``number`` rounds; WireError where they cannot be."""
    due = {"counts": torch.empty(3, labels, dtype=torch.int64, device="meta")}
    check(answer, number, due, memory=client.memory)
    counts, examples = answer.payload["counts"], answer.measured.examples
    right, said, there = counts
    possible = ((counts >= 0) & (counts <= examples)).all() and (right <= said.minimum(there)).all()
    if not possible or int(said.sum()) != examples or int(there.sum()) != examples:
        raise WireError(f"counts = {counts.tolist()}: are no scores of {examples} examples")
    assert answer.measured.loss is not None  # as checked
    return Scores(counts, answer.measured.loss)


@final
@dataclass(frozen=True)
class _Sent:
    """A request: what goes ``down``, the version of the ``memory`` it assumes, both as bytes, and what is ``due`` in return."""

    down: Payload
    memory: int
    blob: bytes
    due: Payload


@final
@dataclass
class _Talk:
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
    _last: _Sent | None = None

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
            self._last = last = _Sent(
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
