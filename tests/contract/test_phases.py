"""A round may be several exchanges: the ledger counts all, memories go from one to the next, and a round is whole or silent."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import nn

from fedpeft.algebra.averaging import averaged
from fedpeft.engines.local import LocalEngine
from fedpeft.errors import WireError
from fedpeft.federation import checkpoint
from fedpeft.mounting import detached, mounted, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Lost, Payload, Reply, State, Update
from fedpeft.wire.messages import Response, decode
from fedpeft.wire.versions import stamp
from tests.contract.reference import unmeasured
from tests.tiny import assert_same_state, close, federation

COUNT = "classifier.count"


@final
@dataclass(frozen=True)
class AskFirst:
    """Ask every client for a number first, then train the head where the sum of the numbers is told.

    A client writes down, in its memory, every phase that it has seen; the server counts the numbers
    that it has heard in all rounds.
    """

    paper: ClassVar[str] = "a toy"

    def init(self, base: Base, seed: int) -> State:
        return State(0, base.heads())

    def send(self, state: State, client: Client) -> Payload:
        if state.phase == 0:
            return {"ask": torch.zeros(2)}
        return {**state.shared, "sum": state.server["sum"]}

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        clients = len(context.clients)
        seen = memory.get("seen", torch.zeros(clients, 0, dtype=torch.int64))
        now = torch.full((clients, 1), 10 * context.round + context.phase)
        stays = {"seen": torch.cat([seen, now], dim=1)}
        if context.phase == 0:
            numbers = torch.tensor(context.clients, dtype=torch.float64)
            yield LocalTask({}, lambda: ({"number": numbers}, stays), steps=0)
            return
        trained = trainable({name: down[name] for name in down if name != "sum"})
        with mounted(model, trained):
            yield LocalTask(trained, lambda: (detached(trained), stays), steps=1)

    def expects(self, state: State, down: Payload) -> Mapping[str, Any]:
        if state.phase == 0:
            return {"number": torch.empty((), dtype=torch.float64, device="meta")}
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in down.items()}
        del meta["sum"]
        return meta

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        if state.phase == 0:
            numbers = [float(update.payload["number"]) for update in updates]
            if numbers:
                heard = state.server.get("heard", torch.tensor(0)) + len(numbers)
                told = {"sum": torch.tensor(sum(numbers)), "heard": heard}
                return replace(state, phase=1, server=told)
        kept = {name: tensor for name, tensor in state.server.items() if name != "sum"}
        return replace(averaged(state, updates, "uniform"), phase=0, server=kept)


def losing(phase: int, clients: set[int]) -> Callable[[int, Reply | Lost], Reply | Lost]:
    """Return what loses the replies of ``clients`` in one phase of the second round."""

    def change(exchange: int, outcome: Reply | Lost) -> Reply | Lost:
        lost = exchange == 2 + phase and outcome.client.id in clients
        return Lost(outcome.client, "gone") if lost else outcome

    return change


def test_every_exchange_of_a_round_has_its_rows_its_bytes_and_its_memory() -> None:
    playing = federation(AskFirst())
    last = playing.play(2)
    assert [(row.round, row.phase) for row in playing.rows] == [
        *[(0, 0)] * 3,
        *[(0, 1)] * 3,
        *[(1, 0)] * 3,
        *[(1, 1)] * 3,
    ]
    for row, talk in zip(
        playing.rows, [t for t in playing.engine.talks for _ in range(3)], strict=True
    ):
        request, reply = talk[row.client]
        assert (row.down, row.up) == (len(request), len(reply))
        assert row.measured.steps == row.phase
        assert row.lost is None
    assert float(decode(playing.engine.talks[1][0][0])["sum"]) == 0 + 1 + 2
    assert (last.round, last.phase) == (2, 0)
    for client in range(3):
        version = last.memories[client]
        assert version == stamp(1, phase=1)
        assert decode(playing.memories.get(client, version))["seen"].tolist() == [0, 1, 10, 11]


def test_clients_side_by_side_exchange_as_clients_one_by_one() -> None:
    alone, beside = federation(AskFirst()), federation(AskFirst())
    beside.engine.engine = LocalEngine(beside.worker, beside.memories, stack=3)
    last = alone.play(2)
    together = beside.play(2)
    close(together.shared, last.shared, 1e-6)
    assert together.memories == last.memories
    assert [row.measured.shared_by for row in beside.rows] == [3] * 12
    assert [row.measured.steps for row in beside.rows] == [row.measured.steps for row in alone.rows]


def test_a_client_lost_in_one_phase_is_not_asked_in_the_next() -> None:
    playing = federation(AskFirst(), losing(phase=0, clients={1}))
    playing.play(2)
    assert [sorted(talk) for talk in playing.engine.talks] == [
        [0, 1, 2],
        [0, 1, 2],
        [0, 1, 2],
        [0, 2],
    ]
    assert float(decode(playing.engine.talks[3][0][0])["sum"]) == 0 + 2


@pytest.mark.parametrize("phase", [0, 1])
def test_a_phase_with_too_few_replies_makes_its_whole_round_silent(phase: int) -> None:
    """The state is that of before, and so is what the clients are taken to remember, which they still hold."""
    playing = federation(AskFirst(), losing(phase, clients={0, 2}))
    first = playing.play(1, min_replies=2)
    second = playing.play(1, first, min_replies=2)
    assert_same_state(second, replace(first, round=2))
    assert {row.lost for row in playing.rows if (row.round, row.phase) == (1, phase)} == {
        "gone",
        "only 1 usable replies, 2 needed",
    }
    third = playing.play(1, second, min_replies=2)
    assert not [row for row in playing.rows if row.round == 2 and row.lost]
    seen = decode(playing.memories.get(1, third.memories[1]))["seen"].tolist()
    assert seen == [0, 1, 20, 21], "as if round 1 had never been"


def test_a_run_resumed_between_rounds_ends_as_one_that_went_on(tmp_path: Path) -> None:
    playing = federation(AskFirst())
    half = playing.play(1)
    checkpoint.save(tmp_path, half, deepcopy(playing.memories), 0, "c")
    last = playing.play(2, half)
    found = checkpoint.load(tmp_path, ["c"], pytest.fail)
    assert found is not None
    resumed = federation(AskFirst(), memories=found.memories)
    assert_same_state(resumed.play(2, found.state), last)
    assert unmeasured(resumed.rows) == unmeasured(playing.rows[6:])


def test_a_reply_to_another_phase_is_stale() -> None:
    first: dict[int, bytes] = {}

    def change(exchange: int, outcome: Reply | Lost) -> Reply | Lost:
        if exchange == 0:
            first[outcome.client.id] = outcome.blob
            return outcome
        return Reply(outcome.client, first[outcome.client.id])

    playing = federation(AskFirst(), change)
    playing.play(1)
    assert {row.lost for row in playing.rows[3:]} == {
        "stale: the reply is for phase 0, this is phase 1"
    }
    assert Response.decode(first[0]).phase == 0


def test_a_method_that_skips_a_phase_is_told_so() -> None:
    @dataclass(frozen=True)
    class Skipping:
        def send(self, state: State, client: Client) -> Payload:
            return {}

        def expects(self, state: State, down: Payload) -> Payload:
            return {}

        def receive(self, state: State, updates: Iterable[Update]) -> State:
            return replace(state, phase=state.phase + 2)

    playing = federation(AskFirst())
    playing.method = Skipping()  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match="gave a state of round 0, phase 2, after round 0, phase 0"
    ):
        playing.play(1, State(0, {}))


@pytest.mark.parametrize("phase", [0, 1])
def test_a_round_whose_replies_are_of_no_use_is_silent_and_the_ledger_says_why(phase: int) -> None:
    @dataclass(frozen=True)
    class Choosy:
        """A method whose server finds fault with the second round."""

        inner: AskFirst

        def send(self, state: State, client: Client) -> Payload:
            return self.inner.send(state, client)

        def expects(self, state: State, down: Payload) -> Payload:
            return self.inner.expects(state, down)

        def receive(self, state: State, updates: Iterable[Update]) -> State:
            seen = list(updates)
            if seen and (state.round, state.phase) == (1, phase):
                raise WireError("they do not fit together")
            return self.inner.receive(state, seen)

    playing = federation(AskFirst())
    begin = playing.start
    playing.method = Choosy(AskFirst())  # type: ignore[assignment]
    first = playing.play(1, begin)
    assert_same_state(playing.play(1, first), replace(first, round=2))
    lost = {row.lost for row in playing.rows if (row.round, row.phase) == (1, phase)}
    assert lost == {"they do not fit together"}
