"""Mounting leaves no trace, changes nothing before training, and says beforehand what a reply will look like."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.errors import WireError
from fedpeft.mounting import mounted, replaced
from fedpeft.training.activation_cache import ActivationCache
from fedpeft.training.evaluation import mounted_state
from fedpeft.training.hardware import Hardware
from fedpeft.types import NO_MEMORY, Client, Context, LocalTask, Payload
from fedpeft.wire.messages import Kind, Request, Response, decode, encode
from tests.contract.reference import BEGINS, PERSONAL, ROUNDS, SINGLE, asked, core_rows, reference
from tests.tiny import (
    CONFIG,
    CPU,
    NAMES,
    SEED,
    SIZES,
    assert_same,
    base_of,
    bert,
    logits,
    small,
    worker,
)


def trace(model: nn.Module) -> dict[str, Any]:
    """Return everything that mounting might leave behind, by identity: attributes, parameters, hooks, flags."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            seen[f"{name}.{attribute}"] = id(value)
            if isinstance(value, dict):  # parameters, buffers, modules and hooks of every kind
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
@pytest.mark.parametrize("name", core_rows())
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


@dataclass
class Bomb:
    """A hook that raises when it is called for the ``left``-th time, and never with 0."""

    left: int = 0

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken


LANES = Hardware("cpu", "bf16", "eager", 2, tokens=40)


@pytest.mark.parametrize(
    "hardware",
    [CPU, pytest.param(LANES, marks=pytest.mark.slow)],
    ids=["float32", "bf16 in lanes"],
)
@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("name", core_rows())
def test_a_forward_pass_that_fails_leaves_no_trace(
    name: str, begin: int, clients: int, hardware: Hardware
) -> None:
    """Whichever it is: to learn how the model is built, to keep hidden states, or a step of training.

    What is trained afterwards comes out as though nothing had happened.
    """
    if clients == 2 and (name, begin) in SINGLE:
        pytest.skip("one client is as much as a model can carry")
    bomb, model = Bomb(), bert()
    model.get_submodule("bert.encoder.layer.1.attention.self.query").register_forward_hook(bomb)
    model.get_submodule("bert.encoder.layer.0").train()  # a mode of its own
    state, memories = reference(name).states[begin], reference(name).memories[begin]
    playing = replace(worker(small(name), model), hardware=hardware)
    known = [Client(k, memory=state.memories.get(k, NO_MEMORY)) for k in range(clients)]
    kind, number = Kind.TRAIN, state.round
    blobs = [
        Request(kind, number, CONFIG, small(name).send(state, client), client.memory).encode()
        for client in known
    ]
    held_before = [memories.get(client.id, client.memory) for client in known]
    before, threads = trace(model), torch.get_num_threads()
    answers, failures = None, 0
    for nth in count(1):
        bomb.left = nth
        fresh = replace(playing, cache=ActivationCache(SIZES))
        try:
            answers = fresh.handle(range(clients), blobs, held_before)
        except Broken:
            failures += 1
        assert trace(model) == before
        assert torch.get_num_threads() == threads
        if answers is not None:
            break
    assert failures >= 3
    bomb.left = 0
    again = replace(playing, cache=ActivationCache(SIZES)).handle(
        range(clients), blobs, held_before
    )
    for (one, _), (other, _) in zip(answers or [], again, strict=True):
        assert_same(Response.decode(one).payload, Response.decode(other).payload)


@pytest.mark.parametrize("breaks", ["after_backward", "reply"])
@pytest.mark.parametrize("name", ["fedara", "full"])
def test_a_method_that_fails_leaves_no_trace(
    name: str, breaks: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bursting(*_: object) -> None:
        raise Broken

    def changed(task: Any, *args: Any, **kwargs: Any) -> None:
        made(task, *args, **kwargs)
        object.__setattr__(task, breaks, bursting)

    made = LocalTask.__init__
    monkeypatch.setattr(LocalTask, "__init__", changed)
    down = small(name).send(reference(name).states[0], Client(0))
    blob = Request(Kind.TRAIN, 0, CONFIG, down).encode()
    before = trace(model)
    with pytest.raises(Broken):
        worker(small(name), model).handle([0], [blob], [b""])
    assert trace(model) == before


@pytest.mark.parametrize("nth", [1, 2], ids=["when it is mounted", "in a pass"])
def test_a_maker_that_fails_leaves_no_trace(nth: int, model: nn.Module) -> None:
    """Of the parameters before it either."""
    bomb, before = Bomb(nth), trace(model)

    def make(parameter: Tensor) -> Tensor:
        bomb()
        return parameter + 1

    makers = {"classifier.bias": lambda bias: bias + 1, "classifier.weight": make}
    with pytest.raises(Broken), replaced(model, makers):
        logits(model)
    assert trace(model) == before


QUERY = "bert.encoder.layer.0.attention.self.query"
BRANCHES: dict[str, Payload] = {
    "factors": {f"{QUERY}:A": torch.ones(2, 1, 32), f"{QUERY}:B": torch.ones(2, 32, 1)},
    "dense": {f"{QUERY}:dense": torch.ones(2, 32, 32)},
    "everyone's": {f"{QUERY}:dense": torch.ones(32, 32), f"{QUERY}.bias": torch.ones(2, 32)},
    "parameters": {f"{QUERY}.bias": torch.ones(2, 32), "classifier.bias": torch.ones(2, 3)},
    "of one client": {f"{QUERY}.bias": torch.ones(1, 32), f"{QUERY}:dense": torch.ones(1, 32, 32)},
}


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_and_parameters_leave_no_trace(kind: str, breaks: bool, model: nn.Module) -> None:
    before, said = trace(model), logits(model)
    outcome = pytest.raises(Broken) if breaks else nullcontext()
    with outcome, mounted(model, BRANCHES[kind]):
        assert (logits(model) - said).abs().max() > 1e-3
        assert trace(model) != before
        if breaks:
            raise Broken
    assert trace(model) == before
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_starts_unchanged(name: str, model: nn.Module) -> None:
    """To 1e-5 in float32, for every one of them: FeDeRA's components are taken out of the base by its anchor."""
    method, said = small(name), logits(model)
    with mounted_state(method, method.init(base_of(model), SEED), model, CPU, SEED):
        torch.testing.assert_close(logits(model), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_another_once_trained(name: str, model: nn.Module) -> None:
    """The mirror of the law above, without which a mount that does nothing would pass it."""
    method, said = small(name), logits(model)
    start, state = (reference(name).states[n] for n in (0, ROUNDS))
    memory = decode(reference(name).memories[ROUNDS].get(0, 3)) if name in PERSONAL else {}
    client = Client(0, memory=3) if memory else Client(NO_MEMORY)
    with mounted_state(method, state, model, CPU, SEED, client, memory):
        assert (logits(model) - said).abs().max() > 1e-2
    headless = {
        **state.shared,
        **{part: tensor for part, tensor in start.shared.items() if part.startswith("classifier")},
    }
    if name not in PERSONAL:
        with mounted_state(method, replace(state, shared=headless), model, CPU, SEED):
            assert (logits(model) - said).abs().max() > 1e-3, "the adapter itself does something"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_expected_of_a_reply_is_what_an_honest_one_has(name: str) -> None:
    played = reference(name)
    for exchange, state in enumerate(played.begins):
        for client, answer in played.playing.answers(exchange).items():
            down = small(name).send(
                state, Client(client, memory=state.memories.get(client, NO_MEMORY))
            )
            assert_same(asked(played.playing, exchange, client), down)
            assert small(name).expects(state, down).keys() == answer.payload.keys()
    assert all(row.lost is None for row in played.playing.rows)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_and_answered_comes_through_the_wire_to_the_bit(name: str) -> None:
    for talk in reference(name).playing.engine.talks:
        for request, reply in talk.values():
            down, up = Request.decode(request, CONFIG), Response.decode(reply)
            assert_same(decode(encode(down.payload)), down.payload)
            assert_same(decode(encode(up.payload)), up.payload)
            assert (down.encode(), up.encode()) == (request, reply)
