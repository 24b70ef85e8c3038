"""An optimizer that goes on from round to round: as in one long round, in every engine, told to no method."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor, nn

from fedpeft.algebra.averaging import averaged
from fedpeft.federation import checkpoint
from fedpeft.federation.server import poll
from fedpeft.methods.fedara import FedARA
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.local_only import LocalOnly
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import detached, mounted, specs, trainable
from fedpeft.training.loop import Training
from fedpeft.types import (
    NO_MEMORY,
    Base,
    Client,
    Context,
    LocalTask,
    Lost,
    Method,
    Payload,
    Reply,
    State,
    Update,
)
from fedpeft.wire.messages import Kind, Request, Response, decode
from fedpeft.wrappers.staged import Staged
from tests.contract.reference import core_rows, unmeasured
from tests.tiny import (
    CONFIG,
    HEAD,
    SEED,
    TARGETS,
    TASK,
    TinyFederation,
    assert_same,
    assert_same_state,
    base_of,
    bert,
    close,
    federation,
    small,
    worker,
)

ADAMW = Training(lr=3e-3, weight_decay=0.1, batch_size=6, warmup=3, keep_optimizer=True)
SGD = replace(ADAMW, optimizer="sgd", lr=0.1, momentum=0.9)
PLAIN = replace(SGD, momentum=0.0, warmup=0)
TRAININGS = {"adamw": ADAMW, "sgd with momentum": SGD, "plain sgd": PLAIN}


@pytest.mark.parametrize("kind", TRAININGS)
def test_rounds_of_one_client_are_one_long_round(kind: str) -> None:
    """All its examples are in every batch, so 3 rounds of 2 steps and 1 round of 6 see the same."""
    whole = replace(TRAININGS[kind], batch_size=8)

    def played(rounds: int, **changes: Any) -> Payload:
        training = replace(whole, steps=6 // rounds, **changes)
        return federation(small("lora"), training=training, sizes={0: 8}).play(rounds).shared

    long = played(1)
    close(played(3), long, 1e-6)
    renewed = played(3, keep_optimizer=False)
    apart = max(float((renewed[name] - long[name]).abs().max()) for name in long)
    assert (apart > 1e-3) == (kind != "plain sgd"), "plain SGD has nothing to keep but its warm-up"


def test_the_warm_up_of_plain_sgd_goes_on_too() -> None:
    training = replace(PLAIN, batch_size=8, warmup=5)
    ends = [
        federation(small("lora"), training=replace(training, steps=steps), sizes={0: 8}).play(
            rounds
        )
        for rounds, steps in ((6, 1), (1, 6))
    ]
    close(ends[0].shared, ends[1].shared, 1e-6)


def changing(playing: TinyFederation) -> Callable[[int], list[Client]]:
    """Return cohorts by round: clients 0 and 1, then 1 and 2, then 2 and 0, and in every fourth all."""

    def cohort(number: int) -> list[Client]:
        absent = None if number % 4 == 3 else (number + 2) % 3
        return [client for client in playing.clients() if client.id != absent]

    return cohort


@pytest.mark.parametrize("name", core_rows())
def test_resuming_equals_going_on(name: str, tmp_path: Path) -> None:
    """To the bit, state and memories; SLoRA crosses its bridge and FedARA prunes on the way."""
    playing = federation(small(name), training=ADAMW)
    half = playing.play(2, cohort=changing(playing))
    checkpoint.save(tmp_path, half, deepcopy(playing.memories), 0, "c")
    last = playing.play(3, half, cohort=changing(playing))
    assert not [row.lost for row in playing.rows if row.lost]
    found = checkpoint.load(tmp_path, "c", pytest.fail)
    assert found is not None
    resumed = federation(small(name), training=ADAMW, memories=found.memories)
    assert_same_state(resumed.play(3, found.state, cohort=changing(resumed)), last)
    assert unmeasured(resumed.rows) == [row for row in unmeasured(playing.rows) if row.round >= 2]
    for client, version in last.memories.items():
        assert resumed.memories.get(client, version) == playing.memories.get(client, version)


SIZES = {0: 6, 1: 11, 2: 9}
"""With batches of 4: 2, 3 and 3 steps."""


@pytest.mark.parametrize(
    "training", [replace(ADAMW, batch_size=4), replace(SGD, batch_size=4)], ids=["adamw", "sgd"]
)
@pytest.mark.parametrize("name", ["bitfit", "lora", "federa", "fedara", "local_only"])
def test_k_clients_at_once_equal_k_one_by_one(name: str, training: Training) -> None:
    """With different numbers of steps behind them: 2 + 2, 3 + 3 and, as client 2 missed a round, 3."""
    playing = federation(small(name), training=training, sizes=SIZES)
    state = playing.play(2, cohort=lambda number: playing.clients()[: 2 + number])
    asked: list[tuple[bytes, bytes]] = []
    for client in playing.clients():
        known = replace(client, memory=state.memories[client.id])
        down = playing.method.send(state, replace(client, memory=0))
        blob = Request(Kind.TRAIN, state.round, CONFIG, down, known.memory).encode()
        asked.append((blob, playing.memories.get(client.id, known.memory)))
    steps = [int(decode(memory)["@steps"]) for _, memory in asked]
    assert steps == [4, 6, 3]
    requests, memories = [blob for blob, _ in asked], [memory for _, memory in asked]
    together = playing.worker.handle([0, 1, 2], requests, memories)
    for k in SIZES:
        [(alone, kept_alone)] = playing.worker.handle([k], [asked[k][0]], [asked[k][1]])
        blob, kept = together[k]
        blind = "key.bias" if training.optimizer == "adamw" else "nothing"  # see SOFTMAX_BLIND
        up, up_alone = Response.decode(blob).payload, Response.decode(alone).payload
        close(without(up, blind), without(up_alone, blind), 2e-5)
        close(without(decode(kept), blind), without(decode(kept_alone), blind), 2e-5)
        assert int(decode(kept)["@steps"]) == steps[k] + (2, 3, 3)[k]


def without(payload: Payload, part: str) -> dict[str, Tensor]:
    """Return what of ``payload`` has no ``part`` in its name."""
    return {name: tensor for name, tensor in payload.items() if part not in name}


def test_a_lost_reply_takes_the_optimizer_back_with_it() -> None:
    """The client has trained and stored its moments; to the server, and in the end, it was never asked."""

    def losing(number: int, outcome: Reply | Lost) -> Reply | Lost:
        return Lost(outcome.client, "silence") if (number, outcome.client.id) == (1, 0) else outcome

    losses, spared = (
        federation(small("lora"), losing, training=ADAMW),
        federation(small("lora"), training=ADAMW),
    )
    lost = losses.play(4)
    never_asked = spared.play(4, cohort=lambda number: spared.clients()[int(number == 1) :])
    assert_same_state(lost, never_asked)
    for client, version in lost.memories.items():
        assert losses.memories.get(client, version) == spared.memories.get(client, version)


def test_without_the_flag_nothing_is_kept() -> None:
    playing = federation(small("lora"), training=replace(ADAMW, keep_optimizer=False))
    assert playing.play(2).memories == {}
    assert not any(
        playing.memories.holds(client, number) for client in SIZES for number in range(2)
    )


def test_what_is_kept_is_two_moments_and_a_count_of_every_tensor_and_the_steps() -> None:
    playing = federation(small("lora"), training=ADAMW)
    last = playing.play(2)
    kept = decode(playing.memories.get(1, last.memories[1]))
    names = last.shared.keys()
    expected = {
        "@steps",
        *(f"{what}/{name}" for what in ("@moment0", "@moment1", "@moves") for name in names),
    }
    assert kept.keys() == expected
    assert {int(kept[name]) for name in kept if name == "@steps" or name.startswith("@moves/")} == {
        4
    }
    for name in names:
        assert (
            kept[f"@moment0/{name}"].shape
            == kept[f"@moment1/{name}"].shape
            == last.shared[name].shape
        )
    plain = federation(small("lora"), training=PLAIN)
    assert decode(plain.memories.get(1, plain.play(1).memories[1])).keys() == {"@steps"}


def moves(playing: TinyFederation, state: State, client: int = 0) -> dict[str, int]:
    """Return how many steps of ``client`` moved each tensor since its state began."""
    kept = decode(playing.memories.get(client, state.memories[client]))
    return {
        name.removeprefix("@moves/"): int(kept[name]) for name in kept if name.startswith("@moves/")
    }


def test_after_sloras_bridge_the_factors_start_anew_and_the_head_goes_on() -> None:
    playing = federation(
        small("slora"), training=ADAMW
    )  # 2 of 4 rounds are sparse; 2 steps a round
    found = moves(playing, playing.play(3))
    assert {found[name] for name in HEAD} == {6}
    assert {found[name] for name in found.keys() - HEAD} == {2}
    assert {name.partition(":")[2] for name in found.keys() - HEAD} == {"A", "B"}


def test_where_fedara_prunes_the_module_starts_anew_and_the_others_go_on() -> None:
    """Its moments are those of other ranks; which are left over the client cannot tell."""
    playing = federation(
        FedARA(4, TARGETS, 4, 2.0, kept=0.9, warmup=0.25, settled=0.25), training=ADAMW
    )
    before = playing.play(2)
    after = playing.play(1, before)
    found = moves(playing, after)
    pruned = {name.partition(":")[0] for name, mask in before.server.items() if not mask.all()}
    assert pruned
    assert pruned != {name.partition(":")[0] for name in before.server}
    for name, count in found.items():
        assert count == (2 if name.partition(":")[0] in pruned else 6), name


@final
@dataclass(frozen=True)
class Spy:
    """Notes which memory its method is told of by the server, and which it is shown by the client."""

    method: Method
    told: list[tuple[int, int, int]]
    shown: list[tuple[int, tuple[int, ...], dict[str, Tensor]]]
    paper: ClassVar[str] = "none"

    def init(self, base: Base, seed: int) -> State:
        return self.method.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        self.told.append((state.round, client.id, client.memory))
        return self.method.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        self.shown.append(
            (context.round, tuple(context.clients), {n: t.clone() for n, t in memory.items()})
        )
        with self.method.mount(model, down, memory, context) as task:
            yield task

    def expects(self, state: State, down: Payload) -> Payload:
        return self.method.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        return self.method.receive(state, updates)


@final
@dataclass(frozen=True)
class Seldom:
    """A method that keeps something in round 2 alone, and whose clients check that the server knows whether they do."""

    paper: ClassVar[str] = "none"

    def init(self, base: Base, seed: int) -> State:
        return State(0, base.heads())

    def send(self, state: State, client: Client) -> Payload:
        return {**state.shared, "believed": torch.tensor(client.memory)}

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        held = memory.get("round", torch.full((len(context.clients),), NO_MEMORY))
        assert torch.equal(held, down["believed"])
        trained = trainable(without(down, "believed"))
        number = torch.full((len(context.clients),), context.round)
        with mounted(model, trained):
            yield LocalTask(
                trained,
                lambda: (detached(trained), {"round": number} if context.round == 2 else {}),
            )

    def expects(self, state: State, down: Payload) -> Payload:
        return specs(without(down, "believed"))

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        return averaged(state, updates, "uniform")


def crossing(state: State) -> State:
    """Start FeDeRA afresh where the first stage ends."""
    begun = FeDeRA(TARGETS, 2).init(base_of(bert()), SEED)
    return State(state.round, begun.shared, begun.server, state.memories)


TOLD: Mapping[str, Method] = {
    **{name: small(name) for name in ("lora", "federa", "slora", "local_only")},
    "own models, then an anchor": Staged(LocalOnly(TARGETS, 2), FeDeRA(TARGETS, 2), crossing, 2),
    "nothing, then an anchor": Staged(LoRA(TARGETS, 2), FeDeRA(TARGETS, 2), crossing, 2),
    "something, seldom": Seldom(),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_method_is_told_and_shown_its_own_part_of_a_memory_as_ever(name: str) -> None:
    """Who has FeDeRA's anchor has it, whoever has not is sent it, and a memory stays of the stage that wrote it."""
    heard = []
    for training in (ADAMW, replace(ADAMW, keep_optimizer=False)):
        spy = Spy(TOLD[name], [], [])
        playing = federation(spy, training=training)
        last = playing.play(6, cohort=changing(playing))
        poll(spy, last, playing.engine, playing.clients(), config=CONFIG, task=TASK)
        assert not [row.lost for row in playing.rows if row.lost]
        heard.append((spy, playing))
    (spy, kept), (plain, renewed) = heard
    assert spy.told == plain.told
    assert [one[:2] for one in spy.shown] == [one[:2] for one in plain.shown]
    assert [one[2].keys() for one in spy.shown] == [one[2].keys() for one in plain.shown]
    for ours, theirs in zip(kept.engine.talks, renewed.engine.talks, strict=True):
        for client in ours:
            assert len(ours[client][0]) == len(theirs[client][0]), "no byte more or less travels"
            assert len(ours[client][1]) == len(theirs[client][1])


def test_an_anchor_is_carried_along_as_it_was() -> None:
    playing = federation(small("federa"), training=ADAMW)
    last = playing.play(4, cohort=changing(playing))
    for client in SIZES:
        memory = decode(playing.memories.get(client, last.memories[client]))
        assert_same(without(memory, "@"), last.server)
        assert int(memory["@steps"]) == 2 * 3, "client by client, 3 rounds of 2 steps"


def test_a_client_that_has_nothing_to_train_keeps_nothing() -> None:
    """The base as it is, scored by what it loses on the clients' texts."""

    @final
    @dataclass(frozen=True)
    class AsItIs:
        paper: ClassVar[str] = "none"

        @contextmanager
        def mount(
            self, model: nn.Module, down: Payload, memory: Payload, context: Context
        ) -> Iterator[LocalTask]:
            yield LocalTask({}, lambda: ({}, {}))

    blob = Request(Kind.TRAIN, 0, CONFIG, {}).encode()

    def answers(clients: Sequence[int]) -> list[Response]:
        method: Any = AsItIs()
        found = worker(method, bert(), ADAMW).handle(
            clients, [blob] * len(clients), [b""] * len(clients)
        )
        assert [kept for _, kept in found] == [b""] * len(clients)
        return [Response.decode(answer) for answer, _ in found]

    together, alone = answers([0, 1, 2]), [answers([client])[0] for client in SIZES]
    assert [answer.measured.trained for answer in together] == [0, 0, 0]
    assert [answer.measured.loss for answer in together] == pytest.approx(
        [answer.measured.loss for answer in alone], rel=1e-5
    )
