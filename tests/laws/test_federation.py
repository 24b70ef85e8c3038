"""Who is asked is drawn by round alone, replies are read in order and one at a time, and polling trains nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.evaluation import held, score
from fedpeft.federation import federate, poll, sample
from fedpeft.ledger import ClientRow, Measured
from fedpeft.replies import in_order
from fedpeft.types import Client, Lost, Reply, State, Update
from fedpeft.wire import Answer, Request, decode, encode
from tests.tiny import CONFIG, CPU, SEED, TASK, assert_same_state, examples, federation, small

CLIENTS = [Client(number, examples=number) for number in (4, 8, 15, 16, 23, 42)]


@given(st.integers(0, 6), st.integers(0, 2**62), st.integers(0, 10**6))
def test_a_cohort_is_drawn_without_replacement_in_the_order_of_the_clients(count: int, seed: int, number: int) -> None:
    drawn = sample(CLIENTS, count, seed, number)
    assert len({client.id for client in drawn}) == len(drawn) == count
    assert drawn == [client for client in CLIENTS if client in drawn]
    assert drawn == sample(CLIENTS, count, seed, number), "drawn again it is the same, whatever was drawn between"


def test_every_round_has_a_cohort_of_its_own_and_everyone_has_a_turn() -> None:
    cohorts = [tuple(client.id for client in sample(CLIENTS, 2, SEED, number)) for number in range(300)]
    assert len(set(cohorts)) == 15, "every pair of six comes"
    turns = [sum(client.id in cohort for cohort in cohorts) for client in CLIENTS]
    assert all(70 < turn < 130 for turn in turns), turns
    assert cohorts != [tuple(client.id for client in sample(CLIENTS, 2, SEED + 1, number)) for number in range(300)]


@given(st.permutations(range(6)), st.integers(0, 6))
def test_outcomes_come_in_the_order_of_asking_and_who_never_answers_is_lost(order: list[int], silent: int) -> None:
    """The last ``silent`` clients of ``order`` say nothing."""
    said = [Reply(CLIENTS[index], bytes([index])) for index in order[: 6 - silent]]
    found = list(in_order(CLIENTS, iter(said)))
    assert [outcome.client for outcome in found] == CLIENTS
    for index, outcome in enumerate(found):
        answered = index in order[: 6 - silent]
        assert outcome == (Reply(CLIENTS[index], bytes([index])) if answered else Lost(CLIENTS[index], "no answer"))


def test_an_outcome_whose_turn_has_come_is_not_held_back() -> None:
    passed: list[int] = []

    def stream() -> Iterator[Reply]:
        for index in (1, 0, 2, 5, 3, 4):
            passed.append(index)
            yield Reply(CLIENTS[index], b"")

    seen = [(CLIENTS.index(outcome.client), len(passed)) for outcome in in_order(CLIENTS, stream())]
    assert seen == [(0, 2), (1, 2), (2, 3), (3, 5), (4, 6), (5, 6)]


@dataclass
class Echo:
    """An engine whose clients send back what they were sent, plus their number."""

    asked: list[int] = field(default_factory=list)

    def exchange(self, clients: Sequence[Client], request: Callable[[Client], bytes]) -> Iterator[Reply | Lost]:
        for client in clients:
            self.asked.append(client.id)
            asked = Request.decode(request(client), CONFIG)
            payload = {name: tensor + client.id for name, tensor in asked.payload.items()}
            figures = Measured(examples=1, loss=0.0)
            yield Reply(client, Answer(asked.round, payload, figures).encode())


@dataclass(frozen=True)
class Adding:
    """A method whose state is the mean of what came back, and which notes how many had been asked at each update."""

    engine: Echo
    read: list[int] = field(default_factory=list)

    def send(self, state: State, client: Client) -> dict[str, torch.Tensor]:
        return dict(state.shared)

    def expects(self, state: State, down: dict[str, torch.Tensor]) -> object:
        return small("lora").expects(state, down)

    def receive(self, state: State, updates: Iterator[Update]) -> State:
        found = []
        for update in updates:
            self.read.append(len(self.engine.asked))
            found.append(update.payload["x"])
        shared = {"x": torch.stack(found).mean(0)} if found else state.shared
        return replace(state, round=state.round + 1, shared=shared)


def test_a_round_streams_one_reply_at_a_time_and_rounds_are_played_when_asked_for() -> None:
    """Worked by hand: clients 4, 8 and 15 send x + 4, x + 8, x + 15, so every round adds 9 to x."""
    engine = Echo()
    method = Adding(engine)
    rows: list[ClientRow] = []
    states = federate(
        method,  # type: ignore[arg-type]
        State(3, {"x": torch.zeros(2)}),
        engine,
        lambda _: CLIENTS[:3],
        range(3, 5),
        config=CONFIG,
        min_replies=1,
        record=rows.append,
    )
    assert engine.asked == [], "nothing happens before the first state is asked for"
    first = next(states)
    assert (first.round, first.shared["x"].tolist()) == (4, [9.0, 9.0])
    assert (method.read, engine.asked, len(rows)) == ([1, 2, 3], [4, 8, 15], 3)
    assert next(states).shared["x"].tolist() == [18.0, 18.0]
    with pytest.raises(StopIteration):
        next(states)


@pytest.mark.parametrize("name", ["lora", "federa", "local_only", "slora", "fedara"])
def test_polling_scores_every_client_as_it_holds_the_state_and_changes_nothing(name: str) -> None:
    playing = federation(small(name))
    state = playing.play(2)
    found = poll(playing.method, state, playing.engine, playing.clients(), config=CONFIG, labels=3)
    assert_same_state(state, federation(small(name)).play(2))
    for client in playing.clients():
        known = replace(client, memory=state.memories.get(client.id, -1))
        memory = playing.memories.get(client.id, known.memory)
        with held(playing.method, state, playing.worker.model, CPU, SEED, known, decode(memory) if memory else None):
            expected = score(playing.worker.model, TASK, playing.worker.holdings[client.id].test, CPU)
        assert torch.equal(found[client.id].counts, expected.counts)
        assert found[client.id].loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)


def test_polling_leaves_out_who_is_lost_or_has_nothing_to_score() -> None:
    def change(_: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "silence") if outcome.client.id == 0 else outcome

    playing = federation(small("lora"), change)
    idle = replace(playing.worker.holdings[1], test=examples(4).take([]))
    playing.worker.holdings[1] = idle  # type: ignore[index]
    found = poll(playing.method, playing.start, playing.engine, playing.clients(), config=CONFIG, labels=3)
    assert found.keys() == {2}


@pytest.mark.parametrize("blob", [b"", encode({"x": torch.ones(1)})], ids=["damaged", "no answer"])
def test_polling_goes_on_where_one_client_sends_rubbish(blob: bytes) -> None:
    def change(_: int, outcome: Reply | Lost) -> Reply | Lost:
        return Reply(outcome.client, blob) if outcome.client.id == 1 else outcome

    playing = federation(small("lora"), change)
    found = poll(playing.method, playing.start, playing.engine, playing.clients(), config=CONFIG, labels=3)
    assert found.keys() == {0, 2}
