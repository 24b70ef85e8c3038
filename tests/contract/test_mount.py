"""Mounting leaves no trace, changes nothing before training, and says beforehand what a reply will look like."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.errors import WireError
from fedpeft.methods import METHODS
from fedpeft.training.evaluation import mounted_state
from fedpeft.types import NO_MEMORY, Client, Context, Payload
from fedpeft.wire.messages import Request, Response, decode, encode
from tests.contract.reference import BEGINS, ROUNDS, SINGLE, asked, reference
from tests.tiny import CONFIG, CPU, SEED, assert_same, base_of, logits, small

TENSORS = ("_parameters", "_buffers", "_modules")
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
)


def trace(model: nn.Module) -> dict[str, Any]:
    """Return everything that mounting might leave behind, by identity: attributes, parameters, hooks, flags."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            seen[f"{name}.{attribute}"] = id(value)
            if attribute in TENSORS + HOOKS:
                seen |= {f"{name}.{attribute}.{key}": id(item) for key, item in value.items()}
    for name, parameter in model.named_parameters():
        seen[f"{name} as a tensor"] = (
            parameter.requires_grad,
            parameter.grad,
            parameter._version,
            parameter.data_ptr(),
        )
    return seen


def stacked(payload: Payload, clients: int) -> dict[str, Tensor]:
    """Return K copies of a payload on a client axis."""
    return {name: torch.stack([tensor] * clients) for name, tensor in payload.items()}


class Broken(Exception):
    """What goes wrong in the middle of training."""


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("name", METHODS)
def test_mounting_leaves_no_trace(
    name: str, begin: int, clients: int, breaks: bool, model: nn.Module
) -> None:
    """Also where the body raises, and where mounting itself refuses to carry two clients."""
    state, memories = reference(name).states[begin], reference(name).memories[begin]
    client = Client(0, memory=state.memories.get(0, NO_MEMORY))
    blob = memories.get(0, client.memory)
    down, memory = (
        stacked(payload, clients)
        for payload in (small(name).send(state, client), decode(blob) if blob else {})
    )
    before, said = trace(model), logits(model)
    inside: list[str] = []
    refuses = clients == 2 and (name, begin) in SINGLE
    outcome = (
        pytest.raises(WireError if refuses else Broken) if refuses or breaks else nullcontext()
    )
    with (
        outcome,
        small(name).mount(model, down, memory, Context([0] * clients, begin, SEED)) as local,
    ):
        logits(model)
        inside = [key for key, value in trace(model).items() if before.get(key) != value]
        if breaks:
            raise Broken
        local.reply()
    assert bool(inside) != refuses, "while it lasts, a mount shows"
    assert trace(model) == before
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_starts_unchanged(name: str, model: nn.Module) -> None:
    """To 1e-5 in float32, for every one of them: FeDeRA's components are taken out of the base by its anchor."""
    method, said = small(name), logits(model)
    with mounted_state(method, method.init(base_of(model), SEED), model, CPU, SEED):
        torch.testing.assert_close(logits(model), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_another_once_trained(name: str, model: nn.Module) -> None:
    """The mirror of the law above, without which a mount that does nothing would pass it."""
    method, said = small(name), logits(model)
    start, state = (reference(name).states[n] for n in (0, ROUNDS))
    memory = decode(reference(name).memories[ROUNDS].get(0, 3)) if name == "local_only" else {}
    client = Client(0, memory=3) if memory else Client(NO_MEMORY)
    with mounted_state(method, state, model, CPU, SEED, client, memory):
        assert (logits(model) - said).abs().max() > 1e-2
    headless = {
        **state.shared,
        **{part: tensor for part, tensor in start.shared.items() if part.startswith("classifier")},
    }
    if name != "local_only":
        with mounted_state(method, replace(state, shared=headless), model, CPU, SEED):
            assert (logits(model) - said).abs().max() > 1e-3, "the adapter itself does something"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_expected_of_a_reply_is_what_an_honest_one_has(name: str) -> None:
    played = reference(name)
    for exchange in range(ROUNDS):
        state = played.states[exchange]
        for client, answer in played.playing.answers(exchange).items():
            down = small(name).send(
                state, Client(client, memory=state.memories.get(client, NO_MEMORY))
            )
            assert_same(asked(played.playing, exchange, client), down)
            assert small(name).expects(state, down).keys() == answer.payload.keys()
    assert all(row.lost is None for row in played.playing.rows)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_sent_and_answered_comes_through_the_wire_to_the_bit(name: str) -> None:
    played = reference(name)
    for exchange in range(ROUNDS):
        for request, reply in played.playing.engine.talks[exchange].values():
            down, up = Request.decode(request, CONFIG), Response.decode(reply)
            assert_same(decode(encode(down.payload)), down.payload)
            assert_same(decode(encode(up.payload)), up.payload)
            assert (down.encode(), up.encode()) == (request, reply)
