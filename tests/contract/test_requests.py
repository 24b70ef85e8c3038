"""A request that is whole but holds something else than the method sends costs its client, and nobody else."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from fedpeft.engines.local import LocalEngine
from fedpeft.errors import WireError
from fedpeft.federation.client import Worker
from fedpeft.federation.memory import Memories
from fedpeft.mounting import mounted
from fedpeft.training.loop import Training
from fedpeft.types import NO_MEMORY, Client, Lost, Payload, Reply
from fedpeft.wire.messages import Kind, Request, Response
from tests.contract.reference import core_rows
from tests.tiny import CONFIG, SEED, assert_same, base_of, bert, small, worker

VICTIM = 1
CLIENTS = [Client(0), Client(VICTIM), Client(2)]


def without_last_axis(tensor: Tensor) -> Tensor:
    if tensor.ndim == 0:
        return tensor
    return tensor[..., 0] if tensor.numel() else tensor.new_zeros(tensor.shape[:-1])


Damage = Callable[[str, Tensor], Mapping[str, Tensor]]
DAMAGES: Mapping[str, Damage] = {
    "missing": lambda name, tensor: {},
    "renamed": lambda name, tensor: {f"{name}x": tensor},
    "of one more row": lambda name, tensor: (
        {name: torch.cat([tensor, tensor[:1]])}
        if tensor.ndim
        else {name: torch.stack([tensor, tensor])}
    ),
    "without its last axis": lambda name, tensor: {name: without_last_axis(tensor)},
    "empty": lambda name, tensor: {name: tensor.flatten()[:0]},
    "in float64": lambda name, tensor: {name: tensor.double()},
    "in whole numbers": lambda name, tensor: {name: tensor.long()},
    "in truth values": lambda name, tensor: {name: tensor.bool()},
    "not a number": lambda name, tensor: {
        name: tensor * torch.nan if tensor.is_floating_point() else tensor
    },
    "beside an unknown one": lambda name, tensor: {name: tensor, "nobody:A": tensor},
}


def made(name: str) -> tuple[Worker, Payload]:
    """Return a worker, and what its method sends to clients that it does not know yet."""
    method = small(name)
    playing = worker(method, bert(), Training(steps=1, batch_size=4))
    return playing, method.send(method.init(base_of(playing.model), SEED), Client(0))


def asking(payload: Payload, kind: Kind = Kind.TRAIN) -> bytes:
    return Request(kind, 0, CONFIG, payload, NO_MEMORY).encode()


def one_of_each(payload: Payload) -> list[str]:
    """Return a name for each kind of tensor: a part of a branch, a parameter, a number."""
    kinds: dict[str, str] = {}
    for name in payload:
        module, mark, part = name.rpartition(":")
        kinds.setdefault(f"{mark}{part}" if module else name.rpartition(".")[2], name)
    return list(kinds.values())


@pytest.mark.parametrize(("name", "damage"), core_rows(DAMAGES))
def test_it_is_refused_as_a_message_or_worked_on(name: str, damage: str) -> None:
    """Whether it trains or scores; the next request is worked on as if nothing had been."""
    playing, payload = made(name)
    before = playing.handle([0], [asking(payload)], [b""])[0][0]
    for tensor_name in one_of_each(payload):
        changed = dict(payload)
        changed |= DAMAGES[damage](tensor_name, changed.pop(tensor_name))
        for kind in Kind:
            with suppress(WireError):
                playing.handle([0], [asking(changed, kind)], [b""])
    after = playing.handle([0], [asking(payload)], [b""])[0][0]
    assert_same(Response.decode(before).payload, Response.decode(after).payload)


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("name", ["bitfit", "lora", "federa", "fedara"])
def test_its_neighbours_reply_as_ever(name: str, stack: int) -> None:
    playing, payload = made(name)
    head = "classifier.weight"
    wrong = {**payload, head: payload[head][:, :5]}

    def replies(sent: Payload) -> Sequence[Reply | Lost]:
        blobs = {0: asking(payload), VICTIM: asking(sent), 2: asking(payload)}
        engine = LocalEngine(playing, Memories(), stack)
        outcomes = engine.exchange(CLIENTS, lambda client: blobs[client.id])
        return sorted(outcomes, key=lambda outcome: outcome.client.id)

    sound = replies(payload)
    for one, other in zip(sound, replies(wrong), strict=True):
        if one.client.id == VICTIM:
            assert isinstance(other, Lost)
            assert "classifier.weight" in other.reason
        else:
            assert isinstance(other, Reply)


def test_a_missing_tensor_is_named() -> None:
    playing, payload = made("fedara")
    without = {name: tensor for name, tensor in payload.items() if name != "budget"}
    with pytest.raises(WireError, match="none that FedARA can mount: KeyError: 'budget'"):
        playing.handle([0], [asking(without)], [b""])


def test_a_parameter_of_another_shape_or_dtype_is_not_mounted() -> None:
    model = bert()
    with (
        pytest.raises(WireError, match=r"classifier\.bias is \(1, 4\); \(3,\) after a client axis"),
        mounted(model, {"classifier.bias": torch.ones(1, 4)}),
    ):
        pass
    with (
        pytest.raises(WireError, match=r"classifier\.bias is of torch\.float64"),
        mounted(model, {"classifier.bias": torch.ones(1, 3, dtype=torch.float64)}),
    ):
        pass
