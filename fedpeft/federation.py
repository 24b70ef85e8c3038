"""The server's loop as a generator of states: ask a cohort, check and count what comes back, merge, go on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import final

import torch

from fedpeft.ledger import ClientRow
from fedpeft.memory import as_told
from fedpeft.seeds import generator
from fedpeft.tasks import Scores
from fedpeft.types import NEVER, Client, Engine, Lost, Method, Payload, Reply, State, Update, WireError
from fedpeft.wire import Answer, Kind, Request, check


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
    """
    for number in rounds:
        asked = [replace(client, memory=state.memories.get(client.id, NEVER)) for client in cohort(number)]
        talk = _Talk(method, state, engine, config, number)
        merged = method.receive(state, talk.updates(asked))
        rows, memories = talk.rows, talk.memories
        if talk.count < min_replies:
            merged, memories = method.receive(state, ()), {}
            why = f"only {talk.count} usable replies, {min_replies} needed"
            rows = [row if row.lost else replace(row, lost=why) for row in rows]
        for row in rows:
            record(row)
        if merged.round != number + 1:
            raise ValueError(f"{type(method).__name__}.receive gave a state of round {merged.round} after round {number}")
        state = replace(merged, memories={**state.memories, **memories})
        yield state


def poll(
    method: Method, state: State, engine: Engine, clients: Sequence[Client], *, config: bytes, labels: int
) -> dict[int, Scores]:
    """Return the scores of ``state`` on each client's own test examples; clients without any, or lost, are left out."""
    asked = [replace(client, memory=state.memories.get(client.id, NEVER)) for client in clients]

    def request(client: Client) -> bytes:
        down = method.send(state, as_told(client))
        return Request(Kind.EVALUATE, state.round, config, down, client.memory).encode()

    found: dict[int, Scores] = {}
    for outcome in engine.exchange(asked, request):
        match outcome:
            case Reply(client, blob):
                with suppress(WireError):
                    answer = Answer.decode(blob)
                    check(answer, state.round, {"counts": torch.empty(3, labels, dtype=torch.int64, device="meta")})
                    found[client.id] = Scores(answer.payload["counts"], answer.loss)
            case Lost():
                pass
    return found


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
    count: int = 0
    _under_way: dict[int, tuple[int, Payload]] = field(default_factory=dict)  # bytes down, what is due
    _last: _Sent | None = None

    def updates(self, asked: Sequence[Client]) -> Iterator[Update]:
        """Yield the usable replies of ``asked``, in their order, and take down every client's row."""
        for outcome in in_order(asked, self.engine.exchange(asked, self._request)):
            client = outcome.client
            down, expected = self._under_way.pop(client.id, (0, {}))
            try:
                answer = self._usable(outcome, expected)
            except WireError as error:
                self.rows.append(ClientRow(self.number, client.id, down, len(outcome.blob), lost=str(error)))
                continue
            self.rows.append(
                ClientRow(
                    self.number,
                    client.id,
                    down,
                    len(outcome.blob),
                    answer.examples,
                    answer.steps,
                    answer.trained,
                    answer.loss,
                    answer.seconds,
                    answer.peak_memory,
                    answer.shared_by,
                )
            )
            self.count += 1
            if answer.memory != NEVER:
                self.memories[client.id] = answer.memory
            yield Update(client, answer.examples, answer.payload)

    def _usable(self, outcome: Reply | Lost, expected: Payload) -> Answer:
        match outcome:
            case Lost(_, reason):
                raise WireError(reason)
            case Reply(_, blob):
                answer = Answer.decode(blob)
                check(answer, self.number, expected)
                return answer

    def _request(self, client: Client) -> bytes:
        down = self.method.send(self.state, as_told(client))
        last = self._last
        if last is None or last.down is not down or last.memory != client.memory:  # many get the very same
            blob = Request(Kind.TRAIN, self.number, self.config, down, client.memory).encode()
            self._last = last = _Sent(down, client.memory, blob, self.method.expects(self.state, down))
        self._under_way[client.id] = len(last.blob), last.due
        return last.blob


def in_order(asked: Sequence[Client], outcomes: Iterable[Reply | Lost]) -> Iterator[Reply | Lost]:
    """Yield ``outcomes`` in the order of ``asked``, holding back those that come early; a client that never answers is lost."""
    early: dict[int, Reply | Lost] = {}
    waiting = list(asked)
    for outcome in outcomes:
        early[outcome.client.id] = outcome
        while waiting and waiting[0].id in early:
            yield early.pop(waiting.pop(0).id)
    for client in waiting:
        yield early.pop(client.id, Lost(client, "no answer"))
