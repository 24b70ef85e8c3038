"""The local loop: K clients side by side on one frozen base, each with batches, clipping and optimizer state of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.activations import Activations
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
    """One client's examples, the rows of each of its steps, and what is known of every example (see ``Activations``)."""

    examples: Encoded
    steps: Sequence[Sequence[int]]
    states: Sequence[Tensor] | None = None


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
    activations: Activations,
) -> Tensor:
    """Train ``local`` on K clients' shares, longest first, and return each one's mean loss over its steps, (K,) float64."""
    rates = {name: local.rate * _rate(training, name in head) for name in local.trainable}
    optimizer = Optimizer(
        training.optimizer, local.trainable, rates, weight_decay=training.weight_decay, momentum=training.momentum
    )
    device = hardware.torch_device
    losses = torch.zeros(len(shares), dtype=torch.float64, device=device)
    model.train()
    with hardware.computing(model):
        for step in range(len(shares[0].steps)):
            active = slice(0, sum(step < len(share.steps) for share in shares))
            for parameter in local.trainable.values():
                parameter.grad = None
            for part in parts([(share, share.steps[step]) for share in shares[active]], hardware.tokens):
                owners = part.owners if isinstance(part.owners, slice) else part.owners.to(device)
                with activations.begun(part.states), rows_of(owners, len(part.examples)), hardware.autocast():
                    each = task.losses(model, task.collate(part.examples, device))
                weighted = each * part.weights.to(device)
                torch.autograd.backward(weighted.sum())
                losses.index_add_(0, part.clients.to(device), weighted.detach().to(losses.dtype))
            local.after_backward(active)
            if training.clip is not None:
                clip(local.trainable, active, training.clip)
            optimizer.step(active, min(1.0, (step + 1) / (training.warmup + 1)))
    return losses.cpu() / torch.tensor([len(share.steps) for share in shares])


Row = tuple[int, int, int]
"""The length of a text, whose it is, and its number there."""


@final
@dataclass(frozen=True)
class Part:
    """Some rows of one step of a cohort, which go through the model together.

    ``clients``: whose each row is, (n,); ``owners``: the same for ``rows_of``; ``weights``: of each row in its client's
    mean loss, (n,). ``states``: what is known of each row, or None where it is not known of all.
    """

    examples: Encoded
    states: Sequence[Tensor] | None
    clients: Tensor
    owners: slice | Tensor
    weights: Tensor


def parts(batches: Sequence[tuple[Share, Sequence[int]]], tokens: int) -> Iterator[Part]:
    """Yield the batches of k clients in parts of at most ``tokens`` padded tokens, formed by length, whoever's they are.

    Gradients are per client whatever the grouping, and rows of like length need little padding. Within a part the rows
    of a client stay together.
    """
    everything = [(len(share.examples.ids[row]), k, row) for k, (share, own) in enumerate(batches) for row in own]
    everything.sort(key=itemgetter(0))
    known = all(share.states is not None for share, _ in batches)
    for together in _cut(everything, tokens):
        mine = [(batches[k][0], k, row) for _, k, row in sorted(together, key=itemgetter(1))]
        ids = [share.examples.ids[row] for share, _, row in mine]
        labels = torch.stack([share.examples.labels[row] for share, _, row in mine])
        clients = torch.tensor([k for _, k, _ in mine])
        weights = torch.tensor([1.0 / len(batches[k][1]) for _, k, _ in mine])
        states = [share.states[row] for share, _, row in mine if share.states] if known else None
        yield Part(Encoded(ids, labels), states, clients, _owners(clients), weights)


def _cut(rows: Sequence[Row], tokens: int) -> Iterator[Sequence[Row]]:
    """Cut ascending ``rows`` into runs that take at most ``tokens`` once padded; a row that is longer stands alone."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or (stop + 1 - start) * rows[stop][0] > tokens:
            yield rows[start:stop]
            start = stop


def _owners(clients: Tensor) -> slice | Tensor:
    """Return a slice where ascending ``clients``, (n,), are some in a row, with equally many rows each."""
    present, counts = torch.unique_consecutive(clients, return_counts=True)
    first, last = int(present[0]), int(present[-1])
    even = last - first + 1 == len(present) and bool((counts == counts[0]).all())
    return slice(first, last + 1) if even else clients


@contextmanager
def own_randomness(seed: int, client: int, number: int) -> Iterator[None]:
    """Give the code in the ``with``, dropout above all, a random stream of this client and round, and restore torch's."""
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "client", client, number))
        yield


def _rate(training: Training, in_head: bool) -> float:
    return training.head_lr if in_head and training.head_lr is not None else training.lr
