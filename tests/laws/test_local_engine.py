"""Clients in this process: who trains side by side, who alone, and that nothing depends on it but the last digits."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from torch import Tensor, nn

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import NotStackable, WireError
from fedpeft.experiment import stacking as stacks
from fedpeft.experiment.stacking import apart, sizes, widest
from fedpeft.federation.client import ClientData, MountedForm, Worker
from fedpeft.federation.memory import Memories
from fedpeft.ledger import Measured, Measurement
from fedpeft.mounting import describe
from fedpeft.tasks import Classification, Encoded
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training, fit
from fedpeft.types import NO_MEMORY, Client, LocalTask, Lost, Reply
from fedpeft.wire.messages import Kind, Request, Response, Status
from tests.contract.reference import unmeasured
from tests.families import FAMILIES, played
from tests.tiny import (
    CONFIG,
    CPU,
    SEED,
    SIZES,
    Tapped,
    TinyFederation,
    assert_same_state,
    base_of,
    bert,
    close,
    deberta,
    examples,
    small,
    worker,
)

TEN = dict.fromkeys(range(10), 8)


@dataclass
class Listening:
    """A worker that says whom it was asked to play together."""

    worker: Worker
    stacks: list[list[int]] = field(default_factory=list)
    refuses: type[WireError] | None = None

    def handle(
        self, clients: Sequence[int], requests: Sequence[bytes], memories: Sequence[bytes]
    ) -> Sequence[tuple[bytes, bytes]]:
        self.stacks.append(list(clients))
        if self.refuses and len(clients) > 1:
            raise self.refuses("no")
        return self.worker.handle(clients, requests, memories)


def listening(refuses: type[WireError] | None = None) -> Listening:
    return Listening(
        worker(small("lora"), bert(), Training(steps=1, batch_size=4), TEN), refuses=refuses
    )


def engine(playing: Listening, stack: int) -> LocalEngine:
    return LocalEngine(playing, Memories(), stack)  # type: ignore[arg-type]


def request(rank: int = 3) -> bytes:
    state = small("lora", rank=rank).init(base_of(bert()), SEED)
    return Request(Kind.TRAIN, 0, CONFIG, state.shared, NO_MEMORY).encode()


def test_stacks_are_as_large_as_asked_for_and_the_last_one_smaller() -> None:
    playing = listening()
    blob = request()
    found = list(engine(playing, 4).exchange([Client(k) for k in range(10)], lambda _: blob))
    assert playing.stacks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert sorted(reply.client.id for reply in found) == list(range(10))


def test_only_requests_of_one_form_meet_in_a_stack_and_the_answers_are_those_of_each_alone() -> (
    None
):
    playing = listening()
    blobs = {k: request(rank=3 if k % 3 else 2) for k in range(10)}
    found = {
        reply.client.id: reply
        for reply in engine(playing, 3).exchange([Client(k) for k in blobs], lambda c: blobs[c.id])
    }
    assert sorted(sorted(stack) for stack in playing.stacks) == [
        [0, 3, 6],
        [1, 2, 4],
        [5, 7, 8],
        [9],
    ]
    for client in (0, 1, 9):
        [(alone, _)] = playing.worker.handle([client], [blobs[client]], [b""])
        reply = found[client]
        assert isinstance(reply, Reply)
        close(Response.decode(reply.blob).payload, Response.decode(alone).payload, 2e-5)


def test_no_client_waits_for_its_like_past_two_stacks() -> None:
    """However rare its form is: the server would have to hold back the answers of all that come after it."""
    playing = listening()
    blobs = {k: request(rank=3 if k else 2) for k in range(10)}
    found = [
        reply.client.id
        for reply in engine(playing, 2).exchange([Client(k) for k in blobs], lambda c: blobs[c.id])
    ]
    assert found.index(0) <= 4


def test_what_cannot_be_kept_apart_is_tried_once_and_then_played_one_by_one() -> None:
    playing = listening(NotStackable)
    blob, clients = request(), [Client(k) for k in range(10)]
    whole = engine(playing, 4)
    for _ in range(2):
        assert all(isinstance(reply, Reply) for reply in whole.exchange(clients, lambda _: blob))
    assert [stack for stack in playing.stacks if len(stack) > 1] == [[0, 1, 2, 3]]
    assert [stack for stack in playing.stacks if len(stack) == 1] == [[k] for k in range(10)] * 2


def test_a_refused_request_costs_its_own_client_alone() -> None:
    playing = listening()
    good = request()
    blobs = dict.fromkeys(range(4), good) | {
        2: Request(Kind.TRAIN, 0, b"x" * 16, {}, NO_MEMORY).encode()
    }
    found = {
        reply.client.id: reply
        for reply in engine(playing, 4).exchange([Client(k) for k in blobs], lambda c: blobs[c.id])
    }
    assert [k for k, reply in found.items() if isinstance(reply, Lost)] == [2]
    damaged = {**blobs, 2: good[:-1] + bytes([good[-1] ^ 1])}
    again = {
        r.client.id: r
        for r in engine(playing, 4).exchange([Client(k) for k in damaged], lambda c: damaged[c.id])
    }
    assert [k for k, reply in again.items() if isinstance(reply, Lost)] == [2]


def test_seconds_are_shared_out_by_steps() -> None:
    playing = worker(small("lora"), bert(), Training(epochs=1, batch_size=2), {0: 2, 1: 8})
    blob = request()
    few, many = (
        Response.decode(answer) for answer, _ in playing.handle([0, 1], [blob, blob], [b"", b""])
    )
    assert (few.measured.steps, many.measured.steps) == (1, 4)
    assert many.measured.seconds == pytest.approx(4 * few.measured.seconds)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_keep_rows_apart_are_known(family: str) -> None:
    playing = played(family, small("lora"), {3: 5, 4: 6}, Training(steps=1))
    assert apart(playing, describe(playing.model, FAMILIES[family].head))


def test_a_model_with_rows_of_its_own_is_known() -> None:
    model = deberta()
    assert not apart(worker(small("lora"), model), base_of(model))


def test_the_size_is_one_of_those_that_deal_the_clients_evenly() -> None:
    assert [sizes(count) for count in (1, 2, 5, 8, 20)] == [
        [1],
        [1, 2],
        [1, 3, 5],
        [1, 2, 4, 8],
        [1, 2, 4, 10, 20],
    ]


@dataclass
class Timed:
    """A worker whose steps take what is written down for each size of a stack, on a clock of its own."""

    hardware: Hardware
    seconds: dict[int, float]
    memory: int = 0
    now: float = 0.0
    tried: list[int] = field(default_factory=list)

    def handle(
        self, clients: Sequence[int], requests: Sequence[bytes], memories: Sequence[bytes]
    ) -> list[tuple[bytes, bytes]]:
        if len(clients) not in self.seconds:
            raise NotStackable("no")
        self.tried.append(len(clients))
        self.now += self.seconds[len(clients)]
        figures = Measured(examples=1, peak_memory=self.memory)
        return [(Response(0, {}, figures).encode(), b"")] * len(clients)


@pytest.mark.parametrize(
    ("seconds", "memory", "due"),
    [
        ({1: 0.1, 2: 0.15, 4: 0.25, 8: 0.4}, 0, 8),
        ({1: 0.1, 2: 0.15, 4: 0.25, 8: 0.79}, 0, 4),
        ({1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8}, 0, 1),
        ({1: 1.0, 2: 1.2, 4: 1.5, 8: 2.0}, 0, 4),
        ({1: 0.1, 2: 0.15, 4: 0.25, 8: 0.4}, 300, 2),
        ({1: 0.1}, 0, 1),
    ],
    ids=[
        "all",
        "half gains",
        "none gains",
        "all would try one's patience",
        "all would fill the memory",
        "cannot",
    ],
)
def test_the_largest_stack_that_gains_is_chosen(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], memory: int, due: int
) -> None:
    trial = Timed(CPU, seconds, memory)
    monkeypatch.setattr(stacks, "_trial", lambda *_: (trial, b""))
    monkeypatch.setattr(stacks, "_memory", lambda _: 2 * 3 * 300)
    monkeypatch.setattr(stacks, "measured", lambda _: nullcontext(Measurement()))
    monkeypatch.setattr("time.perf_counter", lambda: trial.now)
    playing = listening().worker
    clients = [Client(k, examples=8) for k in TEN]
    assert widest(playing, base_of(playing.model), clients, 8) == due
    trial.tried.clear()
    assert widest(playing, base_of(playing.model), clients[:1], 8) == 1
    assert trial.tried == []


def stacked(name: str, step_alone: dict[MountedForm, float] | None) -> TinyFederation:
    """Return a federation whose three clients train side by side, hidden states kept."""
    playing = worker(small(name), bert())
    playing = replace(playing, cache=ActivationCache(SIZES), step_alone=step_alone)
    memories = Memories()
    engine = Tapped(LocalEngine(playing, memories, 3))
    return TinyFederation(playing.method, playing, memories, engine)


@pytest.mark.parametrize("name", ["lora", "bitfit", "federa", "fedara", "local_only", "slora"])
def test_timing_a_client_alone_changes_no_bit(name: str) -> None:
    timed, untimed = stacked(name, {}), stacked(name, None)
    last = timed.play(4)
    assert timed.worker.step_alone
    assert_same_state(last, untimed.play(4))
    for client, version in last.memories.items():
        assert timed.memories.get(client, version) == untimed.memories.get(client, version)
    assert unmeasured(timed.rows) == unmeasured(untimed.rows)


def test_a_client_alone_is_timed_by_one_step_once_for_what_is_mounted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FeDeRA's anchor is mounted from the message first, from memory later, which is the same."""
    fits: list[list[int]] = []

    def listening_fit(
        model: nn.Module,
        local: LocalTask,
        task: Classification,
        *rest: Any,
    ) -> Tensor:
        shares, *others = rest
        fits.append([len(share.steps) for share in shares])
        return fit(model, local, task, shares, *others)

    monkeypatch.setattr("fedpeft.federation.client.fit", listening_fit)
    for name in ("lora", "federa"):
        fits.clear()
        stacked(name, {}).play(3)
        assert fits == [[2, 2, 2], [1], [2, 2, 2], [2, 2, 2]], name


def test_seconds_alone_are_steps_times_a_step_alone_and_of_a_client_alone_its_own() -> None:
    training = Training(epochs=1, batch_size=2)
    playing = worker(small("lora"), bert(), training, {0: 2, 1: 8})
    blob = request()

    def handled(clients: list[int]) -> list[Measured]:
        memories = [b""] * len(clients)
        answers = playing.handle(clients, [blob] * len(clients), memories)
        return [Response.decode(answer).measured for answer, _ in answers]

    handled([0, 1])
    assert playing.step_alone is not None
    [form] = playing.step_alone
    playing.step_alone[form] = 2.5
    assert [own.seconds_alone for own in handled([0, 1])] == [2.5, 4 * 2.5]
    [own] = handled([1])
    assert own.seconds_alone == own.seconds
    assert own.seconds > 0


def test_trials_of_the_hardware_time_nobody_alone() -> None:
    playing = listening().worker
    apart(playing, base_of(playing.model))
    assert playing.step_alone == {}


def test_an_error_that_is_no_refusal_names_client_and_round_and_keeps_its_traceback() -> None:
    """Of client 1 the labels are beyond those of the model."""
    playing = worker(small("lora"), bert())
    whole = examples(7)
    beyond = [replace(example, labels=example.labels + 9) for example in whole]
    broken = ClientData(Encoded(beyond), whole)
    playing = replace(playing, client_data={**playing.client_data, 1: broken})
    blob = request()
    for stack, named in ((1, "client 1"), (3, "client 0, 1, 2")):
        clients = [Client(number) for number in range(3)]
        with pytest.raises(IndexError) as caught:
            list(LocalEngine(playing, Memories(), stack).exchange(clients, lambda _: blob))
        assert caught.value.__notes__ == [f"raised by the work of {named} in round 0"]
        assert caught.traceback[-1].name == "cross_entropy"


def test_a_client_without_examples_is_lost_and_no_other() -> None:
    playing = worker(small("lora"), bert())
    empty = ClientData(examples(4).take([]), examples(4))
    playing = replace(playing, client_data={**playing.client_data, 1: empty})
    blob, clients = request(), [Client(number) for number in range(3)]
    for stack in (1, 3):
        engine = LocalEngine(playing, Memories(), stack)
        found = {outcome.client.id: outcome for outcome in engine.exchange(clients, lambda _: blob)}
        assert found[1] == Lost(clients[1], "client 1 holds no examples to train on")
        assert isinstance(found[0], Reply)
        assert isinstance(found[2], Reply)


def test_a_client_that_lacks_the_memory_it_is_asked_for_says_so() -> None:
    playing = worker(small("federa"), bert())
    down = small("federa").init(base_of(playing.model), SEED).shared
    knowing = Client(1, memory=4)
    blob = Request(Kind.TRAIN, 6, CONFIG, down, memory=4).encode()
    [outcome] = LocalEngine(playing, Memories(), 3).exchange([knowing], lambda _: blob)
    assert isinstance(outcome, Reply)
    assert Response.decode(outcome.blob) == Response(6, {}, status=Status.FORGOTTEN)
    stranger = Request(Kind.TRAIN, 6, b"x" * 16, down, memory=4).encode()
    [outcome] = LocalEngine(playing, Memories(), 3).exchange([knowing], lambda _: stranger)
    assert isinstance(outcome, Lost)
