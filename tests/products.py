"""What clients' products B A and their means are, worked out densely: what merges are compared with."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedpeft.training.evaluation import FULL_CLIENT, mounted_state
from fedpeft.training.loop import Training
from fedpeft.types import Client, Payload, State
from fedpeft.wire.messages import Response
from tests.tiny import CPU, SEED, SIZES, TinyFederation, bert

LAYERS = [
    f"bert.encoder.layer.{layer}.attention.self.{part}"
    for layer in (0, 1)
    for part in ("query", "value")
]
SCALE = 2.0

STRONG = Training(lr=3e-2, batch_size=6)
"""AdamW, whose steps are large enough that clients' products differ in more than their length."""


def product(payload: Payload, module: str) -> Tensor:
    """Return the B A of one client, (out, in) in float64."""
    return payload[f"{module}:B"].double() @ payload[f"{module}:A"].double()


def shares(answers: Iterable[Response]) -> list[float]:
    """Return p_k of every client, by examples."""
    examples = [float(answer.measured.examples) for answer in answers]
    return [count / sum(examples) for count in examples]


def mean_product(answers: Sequence[Response], module: str) -> Tensor:
    """Return sum p_k B_k A_k, (out, in) in float64."""
    total = torch.zeros(32, 32, dtype=torch.float64)
    for share, answer in zip(shares(answers), answers, strict=True):
        total += share * product(answer.payload, module)
    return total


def added(
    playing: TinyFederation,
    state: State,
    client: Client = FULL_CLIENT,
    memory: Payload | None = None,
) -> dict[str, Tensor]:
    """Return what a state adds to each W_0 as a client holds it, (out, in) in float64."""
    with mounted_state(playing.method, state, bert(), CPU, SEED, client, memory) as local:
        return {name: delta.dense()[0].double() for name, delta in local.deltas().items()}


def total(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors."""
    return torch.stack(list(tensors)).sum(0)


def off(found: Tensor, exact: Tensor) -> float:
    """Return the relative distance of two matrices."""
    return float((found - exact).norm() / exact.norm())


def fleet(capacities: Mapping[int, float]) -> list[Client]:
    """Return clients of unequal capacities."""
    return [
        Client(client, capacity=capacity, examples=SIZES[client])
        for client, capacity in capacities.items()
    ]


def numbers(payload: Payload) -> int:
    """Return how many numbers a payload holds, without the fields of the message."""
    return sum(tensor.numel() for name, tensor in payload.items() if not name.startswith("@"))
