"""Under bf16 autocast every method trains what it trains in float32, and its messages stay float32."""

from dataclasses import replace

import pytest
import torch

from fedpeft.training.hardware import GRAIN, Hardware
from fedpeft.types import NO_MEMORY, Client
from fedpeft.wire.messages import Kind, Request, Response, decode
from tests.contract.reference import (
    BEGINS,
    PHASES,
    SINGLE,
    asked,
    exchanges,
    reference,
    rows,
)
from tests.tiny import CONFIG, bert, small, worker

BF16 = Hardware("cpu", "bf16", "eager", 1, pad_to_multiple_of=GRAIN)


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("stack", [[0], [0, 1]], ids=["alone", "side by side"])
@pytest.mark.parametrize("name", rows())
def test_training_in_bf16_is_near_training_in_float32(
    name: str, begin: int, stack: list[int]
) -> None:
    played = reference(name)
    state, memories = played.states[begin], played.memories[begin]
    if len(stack) > 1 and (name, begin) in SINGLE:
        return
    clients = [Client(k, memory=state.memories.get(k, NO_MEMORY)) for k in stack]
    blobs = [
        Request(Kind.TRAIN, begin, CONFIG, small(name).send(state, client), client.memory).encode()
        for client in clients
    ]
    playing = replace(worker(small(name), bert()), hardware=BF16)
    found = playing.handle(
        stack, blobs, [memories.get(client.id, client.memory) for client in clients]
    )
    for client, (blob, kept) in zip(stack, found, strict=True):
        first = exchanges(name, begin)[0]
        answer, exact = Response.decode(blob), played.playing.answers(first)[client]
        assert answer.measured.loss == pytest.approx(exact.measured.loss, rel=0.02)
        if name in PHASES:
            return  # it ends in a choice, and near losses need not make equal ones
        ours = answer.payload or decode(kept)
        theirs = exact.payload or decode(played.memories[begin + 1].get(client, exact.memory))
        start = asked(played.playing, begin, client) or decode(
            memories.get(client, clients[stack.index(client)].memory)
        )
        assert {part: tensor.dtype for part, tensor in ours.items()} == {
            part: t.dtype for part, t in theirs.items()
        }
        moved = torch.cat(
            [(theirs[part] - start[part]).flatten() for part in theirs if part in start]
        )
        off = torch.cat([(ours[part] - theirs[part]).flatten() for part in theirs if part in start])
        assert float(off.norm()) < 0.1 * float(moved.norm())
