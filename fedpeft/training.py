"""The local loop: K clients side by side on one frozen base, each with batches, clipping and optimizer state of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.hardware import Hardware
from fedpeft.mounting import rows_of
from fedpeft.optimizer import Kind, Optimizer, clip
from fedpeft.seeds import derive, generator
from fedpeft.tasks import Classification, Encoded
from fedpeft.types import LocalTask


@dataclass(frozen=True)
class Training:
    """How a client trains in one round.

    ``optimizer``: ``adamw`` or ``sgd``. ``lr``: its rate. ``head_lr``: the rate of the head, ``lr`` where None.
    ``steps``: optimizer steps, or None for ``epochs`` passes over the client's data. ``batch_size``: examples a step.
    ``warmup``: steps over which the rate rises linearly. ``clip``: largest norm of one client's gradient, or None.
    ``momentum``: of SGD.
    """

    optimizer: Kind = "adamw"
    lr: Annotated[float, Gt(0)] = 1e-3
    head_lr: Annotated[float, Gt(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    epochs: Annotated[int, Ge(1)] = 1
    batch_size: Annotated[int, Ge(1)] = 16
    warmup: Annotated[int, Ge(0)] = 0
    clip: Annotated[float, Gt(0)] | None = 1.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    momentum: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True)
class Share:
    """One client's examples and the rows of each of its steps."""

    examples: Encoded
    steps: Sequence[Sequence[int]]


def plan(examples: int, training: Training, seed: int, client: int, number: int) -> list[list[int]]:
    """Return the rows of every step of one client in one round, in an order of its own; an epoch's last may be short."""
    size = training.batch_size
    rows: list[list[int]] = []
    for epoch in range(training.epochs if training.steps is None else training.steps):
        order = torch.randperm(examples, generator=generator(seed, "order", client, number, epoch)).tolist()
        rows += [order[start : start + size] for start in range(0, examples, size)]
    return rows[: training.steps]


def fit(
    model: nn.Module,
    local: LocalTask,
    task: Classification,
    shares: Sequence[Share],
    training: Training,
    head: frozenset[str],
    hardware: Hardware,
) -> Tensor:
    """Train ``local`` on K clients' shares, longest first, and return each one's mean loss over its steps, (K,) float64."""
    rates = {name: local.rate * _rate(training, name in head) for name in local.trainable}
    optimizer = Optimizer(
        training.optimizer, local.trainable, rates, weight_decay=training.weight_decay, momentum=training.momentum
    )
    losses = torch.zeros(len(shares), dtype=torch.float64)
    model.train()
    for step in range(len(shares[0].steps)):
        active = slice(0, sum(step < len(share.steps) for share in shares))
        examples, weights = side_by_side([(share.examples, share.steps[step]) for share in shares[active]])
        with rows_of(active, weights.numel()), hardware.autocast():
            each = task.losses(model, task.collate(examples, hardware.torch_device))
        mean = (each.view(weights.shape) * weights.to(each)).sum(1)
        for parameter in local.trainable.values():
            parameter.grad = None
        torch.autograd.backward(mean.sum())
        local.after_backward(active)
        if training.clip is not None:
            clip(local.trainable, active, training.clip)
        optimizer.step(active, min(1.0, (step + 1) / (training.warmup + 1)))
        losses[active] += mean.detach().to(losses)
    return losses / torch.tensor([len(share.steps) for share in shares])


def side_by_side(parts: Sequence[tuple[Encoded, Sequence[int]]]) -> tuple[Encoded, Tensor]:
    """Return one batch of k clients with b rows each, and the weight of every row in its client's mean loss, (k, b).

    A client with fewer rows than the others repeats its first one at weight 0.
    """
    size = max(len(rows) for _, rows in parts)
    weights = torch.zeros(len(parts), size)
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for client, (examples, rows) in enumerate(parts):
        weights[client, : len(rows)] = 1.0 / len(rows)
        mine = examples.take([*rows, *[rows[0]] * (size - len(rows))])
        ids += mine.ids
        labels.append(mine.labels)
    return Encoded(ids, torch.cat(labels)), weights


@contextmanager
def own_randomness(seed: int, client: int, number: int) -> Iterator[None]:
    """Give the code in the ``with``, dropout above all, a random stream of this client and round, and restore torch's."""
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "client", client, number))
        yield


def _rate(training: Training, in_head: bool) -> float:
    return training.head_lr if in_head and training.head_lr is not None else training.lr
