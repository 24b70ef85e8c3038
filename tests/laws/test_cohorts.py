"""Side by side equals one by one in every family that is promised to work, whatever the parts a step is cut into."""

from dataclasses import replace

import pytest
import torch

from fedpeft.federation.client import Worker
from fedpeft.methods import METHODS
from fedpeft.mounting import describe
from fedpeft.training.evaluation import predictions
from fedpeft.training.loop import Training
from fedpeft.types import NO_MEMORY, Base, Client, Method, Payload, State
from fedpeft.wire.messages import Kind, Request, Response
from tests.families import FAMILIES, played
from tests.tiny import CONFIG, CPU, SEED, TASK, close

SIZES = {0: 6, 1: 11, 2: 9}
"""With batches of 4: 2, 3 and 3 steps, the last of which have 2, 3 and 1 rows."""

SGD = Training(optimizer="sgd", lr=0.2, momentum=0.9, weight_decay=0.1, batch_size=4, clip=0.3)

SETTINGS = {
    "bitfit": {},
    "lora": {"targets": "all-linear", "rank": 2},
    "ffa_lora": {"targets": "attention", "rank": 2},
    "federa": {"targets": "attention", "rank": 2},
    "slora": {"targets": "attention", "rank": 2, "rounds": 1, "stage1": 0.0},
    "fedara": {"targets": "all-linear", "rank": 2, "deviation": 0.5},
}
"""SLoRA in its second stage."""

PAIRS = [
    (family, name)
    for family in FAMILIES
    for name in SETTINGS
    if (family, name) != ("llama", "bitfit")
]
"""Llama has no biases for BitFit to train."""


def requests(method: Method, base: Base) -> tuple[bytes, State]:
    state = method.init(base, SEED)
    return Request(Kind.TRAIN, 0, CONFIG, method.send(state, Client(0)), NO_MEMORY).encode(), state


def answers(playing: Worker, stack: list[int], blob: bytes) -> dict[int, Response]:
    found = playing.handle(stack, [blob] * len(stack), [b""] * len(stack))
    return {
        client: Response.decode(answer) for client, (answer, _) in zip(stack, found, strict=True)
    }


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_k_clients_at_once_equal_k_one_by_one_in_every_family(family: str, name: str) -> None:
    """Unequal steps, ragged batches, and parts of a few tokens in which clients mix unevenly, one or two at once."""
    method: Method = METHODS[name](**SETTINGS[name])
    playing = played(family, method, SIZES, SGD)
    blob, state = requests(method, describe(playing.model, FAMILIES[family].head))
    alone = {client: answers(playing, [client], blob)[client] for client in SIZES}
    assert max(_moved(state, answer.payload) for answer in alone.values()) > 0.01
    for hardware in (
        CPU,
        replace(CPU, tokens=40),
        replace(CPU, tokens=60, threads=2, pad_to_multiple_of=4),
    ):
        together = answers(replace(playing, hardware=hardware), [0, 1, 2], blob)
        for client in SIZES:
            close(together[client].payload, alone[client].payload, 2e-5)
            ours, theirs = together[client].measured, alone[client].measured
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.steps == theirs.steps


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_what_is_scored_together(family: str) -> None:
    """Nor on padding: in parts of a few tokens, two at once, in grains."""
    playing = played(family, METHODS["bitfit"](), {0: 23}, SGD)
    texts = playing.client_data[0].test
    alone = [
        predictions(playing.model, TASK, texts.take([row]), CPU)[0] for row in range(len(texts))
    ]
    for hardware in (CPU, replace(CPU, tokens=60, threads=2, pad_to_multiple_of=4)):
        together = predictions(playing.model, TASK, texts, hardware)
        for ours, theirs in zip(together, alone, strict=True):
            close(ours, theirs, 1e-5)


def test_a_client_that_diverges_takes_nobody_along() -> None:
    """Its numbers leave the number format; its neighbours' stay to the last digit that rows side by side allow."""
    method: Method = METHODS["lora"](**SETTINGS["lora"])
    playing = played("bert", method, SIZES, SGD)
    blob, state = requests(method, describe(playing.model, FAMILIES["bert"].head))
    spoilt = {name: torch.full_like(tensor, torch.inf) for name, tensor in state.shared.items()}
    bad = Request(Kind.TRAIN, 0, CONFIG, spoilt, NO_MEMORY).encode()
    alone = {client: answers(playing, [client], blob)[client] for client in (0, 2)}
    for tokens in (1024, 40):
        mixed = replace(playing, hardware=replace(CPU, tokens=tokens))
        found = mixed.handle([0, 1, 2], [blob, bad, blob], [b""] * 3)
        assert not _finite(Response.decode(found[1][0]).payload)
        for client in (0, 2):
            close(Response.decode(found[client][0]).payload, alone[client].payload, 2e-5)


def _moved(state: State, payload: Payload) -> float:
    return max(
        float((payload[name] - tensor).abs().max())
        for name, tensor in state.shared.items()
        if name in payload
    )


def _finite(payload: Payload) -> bool:
    return all(
        bool(torch.isfinite(tensor).all())
        for tensor in payload.values()
        if tensor.is_floating_point()
    )
