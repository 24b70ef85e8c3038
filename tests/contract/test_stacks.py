"""K clients side by side give what they give one by one; what cannot carry K refuses."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedpeft.errors import WireError
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.hardware import Hardware
from fedpeft.training.loop import Training
from fedpeft.types import NO_MEMORY, Client, Payload, State
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests.contract.reference import BEGINS, SINGLE, core_rows, reference, rows
from tests.tiny import CONFIG, SOFTMAX_BLIND, assert_same, bert, close, small, worker

SIZES = {0: 6, 1: 11, 2: 9}
"""With batches of 4: 2, 3 and 3 steps, the last of which have 2, 3 and 1 rows."""

SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, weight_decay=0.1, batch_size=4, clip=0.3)
ADAMW = Training(lr=1e-3, weight_decay=0.1, batch_size=4, warmup=1, head_lr=3e-3)


def requests(name: str, state: State, memories: Memories) -> dict[int, tuple[bytes, bytes]]:
    """Return every client's request for training and the memory that it assumes."""
    asked = {}
    for client in (Client(k, memory=state.memories.get(k, NO_MEMORY)) for k in SIZES):
        down = small(name).send(state, client)
        blob = Request(Kind.TRAIN, state.round, CONFIG, down, client.memory).encode()
        asked[client.id] = (blob, memories.get(client.id, client.memory))
    return asked


def handled(
    playing: Worker, asked: dict[int, tuple[bytes, bytes]], stack: list[int]
) -> dict[int, tuple[bytes, bytes]]:
    """Return (answer, new memory) of the clients of one stack, who wrote to no message: its tensors are views of it."""
    found = playing.handle(stack, [asked[k][0] for k in stack], [asked[k][1] for k in stack])
    for blob in (blob for k in stack for blob in asked[k] if blob):
        decode(blob)  # would find it damaged
    return dict(zip(stack, found, strict=True))


def comparable(payload: Payload, training: Training) -> dict[str, Tensor]:
    """Return what can be compared: AdamW makes whole steps of gradients that are nothing but rounding."""
    blind = SOFTMAX_BLIND if training.optimizer == "adamw" else "nothing"
    return {name: tensor for name, tensor in payload.items() if not name.endswith(blind)}


@pytest.mark.parametrize(
    "training",
    [replace(SGD, steps=1), SGD, ADAMW],
    ids=["one step", "unequal steps of SGD", "unequal steps of AdamW"],
)
@pytest.mark.parametrize(("name", "begin"), rows(BEGINS, without=SINGLE))
def test_k_clients_at_once_equal_k_one_by_one(name: str, begin: int, training: Training) -> None:
    """Ragged batches, clipping, momentum, decay and memories included: who has stopped training does not move any more."""
    played = reference(name)
    playing = worker(small(name), bert(), training, SIZES)
    asked = requests(name, played.states[begin], played.memories[begin])
    together = handled(playing, asked, [0, 1, 2])
    for client in SIZES:
        (ours, kept), (theirs, their_kept) = (
            together[client],
            handled(playing, asked, [client])[client],
        )
        side_by_side, alone = Response.decode(ours), Response.decode(theirs)
        close(comparable(side_by_side.payload, training), comparable(alone.payload, training), 2e-5)
        close(decode(kept) if kept else {}, decode(their_kept) if their_kept else {}, 2e-5)
        ours_measured, theirs_measured = side_by_side.measured, alone.measured
        assert ours_measured.loss == pytest.approx(theirs_measured.loss, rel=1e-5)
        assert ours_measured.shared_by == 3
        assert (side_by_side.round, side_by_side.memory) == (alone.round, alone.memory)
        for part in ("examples", "steps", "trained"):
            assert getattr(ours_measured, part) == getattr(theirs_measured, part)
    if training.steps is None:
        assert [Response.decode(together[k][0]).measured.steps for k in (0, 1, 2)] == [2, 3, 3]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "begin"), core_rows(BEGINS))
def test_which_lane_is_faster_changes_no_bit(
    name: str, begin: int, precision: Literal["fp32", "bf16"]
) -> None:
    """Of what is trained side by side, with hidden states kept or not, and of what is scored."""
    played = reference(name)
    hardware = Hardware("cpu", precision, "eager", 3, tokens=24, pad_to_multiple_of=2)
    asked = requests(name, played.states[begin], played.memories[begin])
    stacks = [[0, 1, 2]] if (name, begin) not in SINGLE else [[0], [1], [2]]
    scoring = {k: (_to_score(blob), memory) for k, (blob, memory) in asked.items()}
    for kept in (ActivationCache(), ActivationCache(SIZES)):
        lanes = replace(worker(small(name), bert(), SGD, SIZES), cache=kept, hardware=hardware)
        alone = replace(lanes, hardware=replace(hardware, threads=1))
        for stack in stacks:
            first, again = (handled(lanes, asked, stack) for _ in range(2))
            for client in stack:
                for blob, due in zip(first[client], again[client], strict=True):
                    assert_same(_bits(blob), _bits(due))
            counted, due_counts = handled(lanes, scoring, stack), handled(alone, scoring, stack)
            for client in stack:
                assert_same(_bits(counted[client][0]), _bits(due_counts[client][0]))


def _to_score(blob: bytes) -> bytes:
    return replace(Request.decode(blob, CONFIG), kind=Kind.EVALUATE).encode()


def _bits(blob: bytes) -> Payload:
    """Return what a message says, the measures of time and memory apart."""
    return (
        {
            name: tensor
            for name, tensor in decode(blob).items()
            if name not in {"@measures", "@counts"}
        }
        if blob
        else {}
    )


@pytest.mark.parametrize("name", ["lora", "fedara"])
def test_the_order_of_a_stack_does_not_matter(name: str) -> None:
    played = reference(name)
    playing = worker(small(name), bert(), SGD, SIZES)
    asked = requests(name, played.states[3], played.memories[3])
    forwards, backwards = (handled(playing, asked, stack) for stack in ([0, 1, 2], [2, 1, 0]))
    for client in SIZES:
        close(
            Response.decode(forwards[client][0]).payload,
            Response.decode(backwards[client][0]).payload,
            2e-5,
        )


@pytest.mark.parametrize(("name", "begin"), sorted(SINGLE))
def test_what_cannot_carry_k_clients_refuses_instead_of_broadcasting(name: str, begin: int) -> None:
    played = reference(name)
    playing = worker(small(name), bert(), SGD, SIZES)
    asked = requests(name, played.states[begin], played.memories[begin])
    with pytest.raises(WireError, match="use a stack of 1"):
        handled(playing, asked, [0, 1, 2])
    assert Response.decode(handled(playing, asked, [1])[1][0]).measured.examples == 11


def test_a_stack_whose_messages_differ_is_refused() -> None:
    """In kind, round, names or shapes; and a client that nobody holds."""
    state = reference("lora").states[0]
    playing = worker(small("lora"), bert(), SGD, SIZES)
    down = dict(small("lora").send(state, Client(0)))

    def blob(kind: Kind = Kind.TRAIN, number: int = 0, changes: Payload | None = None) -> bytes:
        return Request(kind, number, CONFIG, {**down, **(changes or {})}).encode()

    tensors = {"an extra": torch.ones(2)}, {"classifier.bias": torch.ones(4)}
    for other in (
        blob(Kind.EVALUATE),
        blob(number=1),
        *(blob(changes=changed) for changed in tensors),
    ):
        with pytest.raises(WireError, match="differ"):
            playing.handle([0, 1], [blob(), other], [b"", b""])
    with pytest.raises(WireError, match="client 9 is not held here"):
        playing.handle([9], [blob()], [b""])
    with pytest.raises(WireError, match="damaged"):
        playing.handle([0], [blob()], [b"x" * 20])
