"""Who is asked is drawn by round alone, replies are read in order and one at a time, and polling trains nothing."""

import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import BadInput
from fedpeft.federation.replies import in_order
from fedpeft.federation.server import federate, poll, sample
from fedpeft.ledger import ClientRow, Measured
from fedpeft.training.evaluation import mounted_state, score
from fedpeft.types import Client, Lost, Reply, State, Update
from fedpeft.wire.messages import Request, Response, decode, encode
from tests.tiny import (
    CONFIG,
    CPU,
    SEED,
    SGD,
    SIZES,
    TASK,
    assert_same_state,
    close,
    examples,
    federation,
    small,
)

CLIENTS = [Client(number, examples=number) for number in (4, 8, 15, 16, 23, 42)]


@given(st.integers(0, 6), st.integers(0, 2**62), st.integers(0, 10**6))
def test_a_cohort_is_drawn_without_replacement_in_the_order_of_the_clients(
    count: int, seed: int, number: int
) -> None:
    drawn = sample(CLIENTS, count, seed, number)
    assert len({client.id for client in drawn}) == len(drawn) == count
    assert drawn == [client for client in CLIENTS if client in drawn]
    assert drawn == sample(CLIENTS, count, seed, number), (
        "drawn again it is the same, whatever was drawn between"
    )


def test_every_round_has_a_cohort_of_its_own_and_everyone_has_a_turn() -> None:
    cohorts = [
        tuple(client.id for client in sample(CLIENTS, 2, SEED, number)) for number in range(300)
    ]
    assert len(set(cohorts)) == 15, "every pair of six comes"
    turns = [sum(client.id in cohort for cohort in cohorts) for client in CLIENTS]
    assert all(70 < turn < 130 for turn in turns), turns
    assert cohorts != [
        tuple(client.id for client in sample(CLIENTS, 2, SEED + 1, number)) for number in range(300)
    ]


@given(st.permutations(range(6)), st.integers(0, 6))
def test_outcomes_come_in_the_order_of_asking_and_who_never_answers_is_lost(
    order: list[int], silent: int
) -> None:
    """The last ``silent`` clients of ``order`` say nothing."""
    said = [Reply(CLIENTS[index], bytes([index])) for index in order[: 6 - silent]]
    found = list(in_order(CLIENTS, iter(said)))
    assert [outcome.client for outcome in found] == CLIENTS
    for index, outcome in enumerate(found):
        answered = index in order[: 6 - silent]
        assert outcome == (
            Reply(CLIENTS[index], bytes([index])) if answered else Lost(CLIENTS[index], "no answer")
        )


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

    def exchange(
        self, clients: Sequence[Client], request: Callable[[Client], bytes]
    ) -> Iterator[Reply | Lost]:
        for client in clients:
            self.asked.append(client.id)
            asked = Request.decode(request(client), CONFIG)
            payload = {name: tensor + client.id for name, tensor in asked.payload.items()}
            figures = Measured(examples=1, loss=0.0)
            yield Reply(client, Response(asked.round, payload, figures).encode())


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


@pytest.mark.parametrize("name", ["lora", "flora", "local_only"])
def test_clients_that_are_sent_the_same_tensors_get_one_and_the_same_request(name: str) -> None:
    """Encoded once: the payload may be a new one for every client, as FLoRA's is."""
    method = small(name)
    state = replace(federation(method).start, memories={2: 4})
    requests: list[bytes] = []

    class Silent:
        def exchange(
            self, clients: Sequence[Client], request: Callable[[Client], bytes]
        ) -> Iterator[Reply | Lost]:
            requests.extend(request(client) for client in clients)
            return iter(())

    clients = [Client(0, examples=3), Client(1, examples=9), Client(2, examples=9)]
    states = federate(
        method,
        state,
        Silent(),
        lambda _: clients,
        range(1),
        config=CONFIG,
        min_replies=1,
        record=lambda _: None,
    )
    next(states)
    assert requests[0] is requests[1]
    assert requests[2] != requests[0], "it assumes another memory"


@pytest.mark.parametrize("name", ["lora", "federa", "local_only", "slora", "fedara"])
def test_polling_scores_every_client_as_it_holds_the_state_and_changes_nothing(name: str) -> None:
    playing = federation(small(name))
    state = playing.play(2)
    found = poll(playing.method, state, playing.engine, playing.clients(), config=CONFIG, task=TASK)
    assert_same_state(state, federation(small(name)).play(2))
    for client in playing.clients():
        known = replace(client, memory=state.memories.get(client.id, -1))
        memory = playing.memories.get(client.id, known.memory)
        with mounted_state(
            playing.method,
            state,
            playing.worker.model,
            CPU,
            SEED,
            known,
            decode(memory) if memory else None,
        ):
            expected = score(
                playing.worker.model, TASK, playing.worker.client_data[client.id].test, CPU
            )
        close(found[client.id], expected, 1e-6)


def test_polling_leaves_out_who_is_lost_or_has_nothing_to_score() -> None:
    def change(_: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "silence") if outcome.client.id == 0 else outcome

    playing = federation(small("lora"), change)
    idle = replace(playing.worker.client_data[1], test=examples(4).take([]))
    playing.worker.client_data[1] = idle  # type: ignore[index]
    found = poll(
        playing.method, playing.start, playing.engine, playing.clients(), config=CONFIG, task=TASK
    )
    assert found.keys() == {2}


@pytest.mark.parametrize("blob", [b"", encode({"x": torch.ones(1)})], ids=["damaged", "no answer"])
def test_polling_goes_on_where_one_client_sends_rubbish(blob: bytes) -> None:
    def change(_: int, outcome: Reply | Lost) -> Reply | Lost:
        return Reply(outcome.client, blob) if outcome.client.id == 1 else outcome

    playing = federation(small("lora"), change)
    found = poll(
        playing.method, playing.start, playing.engine, playing.clients(), config=CONFIG, task=TASK
    )
    assert found.keys() == {0, 2}


@given(st.permutations(range(6)), st.integers(1, 12))
def test_replies_are_the_same_from_memory_and_from_the_file(order: list[int], most: int) -> None:
    """Each says its number as often as that is; ``most`` of all the 15 bytes may be in memory."""
    said = [Reply(CLIENTS[index], bytes([index]) * index) for index in order]
    found = list(in_order(CLIENTS, iter(said), most))
    assert found == [Reply(client, bytes([k]) * k) for k, client in enumerate(CLIENTS)]


def peak_of_a_thousand_backwards(most: int) -> int:
    """Return the most memory that 1,000 replies of 4 KB take while the first asked answers last."""
    asked = [Client(number) for number in range(1000)]
    outcomes = (Reply(client, bytes([client.id % 256]) * 4096) for client in reversed(asked))
    tracemalloc.start()
    try:
        for client, outcome in zip(asked, in_order(asked, outcomes, most), strict=True):
            assert (outcome.client, outcome.blob[-1]) == (client, client.id % 256)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_is_held_back_is_bounded_in_memory_whatever_the_order() -> None:
    assert peak_of_a_thousand_backwards(most=2**15) < 10**6
    assert peak_of_a_thousand_backwards(most=2**30) > 4 * 10**6


def test_a_second_answer_and_one_that_nobody_asked_for_are_passed_over() -> None:
    said = [
        Reply(CLIENTS[1], b"first"),
        Reply(CLIENTS[1], b"again"),
        Reply(Client(99), b"unasked"),
        Reply(CLIENTS[0], b"zero"),
        Reply(CLIENTS[0], b"again"),
    ]
    found = list(in_order(CLIENTS[:2], iter(said)))
    assert found == [Reply(CLIENTS[0], b"zero"), Reply(CLIENTS[1], b"first")]


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full)
    said = [Reply(CLIENTS[1], b"early"), Reply(CLIENTS[0], b"zero")]
    with pytest.raises(BadInput, match="no room for replies .*No space left.*TMPDIR"):
        list(in_order(CLIENTS[:2], iter(said)))


@dataclass(frozen=True)
class Reluctant:
    """A method that merges the first ``reads`` replies and leaves the others unread."""

    reads: int

    def send(self, state: State, client: Client) -> dict[str, torch.Tensor]:
        return dict(state.shared)

    def expects(self, state: State, down: dict[str, torch.Tensor]) -> object:
        return small("lora").expects(state, down)

    def receive(self, state: State, updates: Iterator[Update]) -> State:
        read = [update.payload["x"] for update in islice(updates, self.reads)]
        shared = {"x": read[-1]} if read else state.shared
        return replace(state, round=state.round + 1, shared=shared)


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_every_client_is_asked_and_recorded_whatever_the_method_reads(reads: int) -> None:
    """Worked by hand: client 4 sends x + 4, client 8 sends x + 8; the last that is read stays."""
    engine = Echo()
    rows: list[ClientRow] = []
    states = federate(
        Reluctant(reads),  # type: ignore[arg-type]
        State(0, {"x": torch.zeros(2)}),
        engine,
        lambda _: CLIENTS[:3],
        range(2),
        config=CONFIG,
        min_replies=3,
        record=rows.append,
    )
    last = list(states)[-1]
    assert engine.asked == [4, 8, 15] * 2
    assert [(row.round, row.client, row.lost) for row in rows] == [
        (number, client, None) for number in (0, 1) for client in (4, 8, 15)
    ]
    assert last.shared["x"].tolist() == [2.0 * (0, 4, 8)[reads]] * 2


def test_a_client_that_diverges_has_no_loss_and_keeps_what_else_it_measured() -> None:
    """At such a rate the first step leaves the number format; the row says how long it took."""
    wild = replace(SGD, lr=1e38, clip=None)
    playing = federation(small("lora"), training=wild)
    state = playing.play(1)
    assert_same_state(state, replace(playing.start, round=1))
    for row in playing.rows:
        assert row.lost is not None
        assert row.lost.startswith("diverged")
        assert row.measured.loss is None
        assert row.measured.steps == 2
        assert row.measured.examples == SIZES[row.client]
        assert row.measured.seconds > 0


@pytest.mark.parametrize("min_replies", [1, 3])
def test_a_client_that_has_lost_its_memory_is_sent_everything_again(min_replies: int) -> None:
    """FeDeRA's anchor goes down once; it goes again to the client that lacks it, and to no other.

    With ``min_replies`` = 3 the round in which it says so is silent; it is known all the same.
    """
    playing = federation(small("federa"))
    state = playing.play(2)
    assert state.memories == {0: 0, 1: 0, 2: 0}
    playing.memories.put(1, 99, b"of another federation")  # and with it the other versions are gone
    state = playing.play(1, state, min_replies=min_replies)
    assert state.memories == {0: 0, 2: 0}
    [row] = [row for row in playing.rows if (row.round, row.client) == (2, 1)]
    assert row.lost is not None
    assert row.up > 0
    assert "no memory of round 0" in row.lost
    state = playing.play(1, state)
    assert state.memories == {0: 0, 1: 3, 2: 0}
    assert [row.lost for row in playing.rows if row.round == 3] == [None] * 3
    for client in (0, 1, 2):
        request, _ = playing.engine.talks[3][client]
        anchored = any(name.endswith(":A0") for name in decode(request))
        assert anchored == (client == 1)


IMPOSSIBLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fewer than none": lambda counts: counts - 5,
    "more than there are": lambda counts: counts + 2**61,
    "more right than said": lambda counts: counts[[1, 0, 2]] + torch.tensor([[1], [0], [0]]),
    "other examples than measured": lambda counts: counts * 2,
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_polling_leaves_out_scores_that_cannot_be(kind: str) -> None:
    def change(_: int, outcome: Reply | Lost) -> Reply | Lost:
        if outcome.client.id != 1:
            return outcome
        answer = Response.decode(outcome.blob)
        counts = IMPOSSIBLE[kind](answer.payload["labels"])
        payload = {**answer.payload, "labels": counts}
        return Reply(outcome.client, replace(answer, payload=payload).encode())

    playing = federation(small("lora"), change)
    found = poll(
        playing.method,
        playing.start,
        playing.engine,
        playing.clients(),
        config=CONFIG,
        task=TASK,
    )
    assert found.keys() == {0, 2}
