"""The local loop: K clients side by side on one frozen base, each with batches, clipping and optimizer state of its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.mounting import row_owners
from fedpeft.seeds import derive, generator
from fedpeft.tasks import Encoded, Task
from fedpeft.training.activation_cache import ActivationCache, entering
from fedpeft.training.bucketing import Buckets
from fedpeft.training.hardware import Hardware
from fedpeft.training.optimizer import Kind, Optimizer, clip
from fedpeft.training.threads import thread_map
from fedpeft.types import LocalTask, Payload


@dataclass(frozen=True)
class Training:
    """How a client trains in one round."""

    optimizer: Kind = "adamw"
    """AdamW, or SGD with `momentum`."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate."""
    head_lr: Annotated[float, Gt(0)] | None = None
    """Learning rate of the head, the task's output module; left out: `lr`."""
    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps of a client in a round; left out: `epochs` decides."""
    epochs: Annotated[int, Ge(1)] = 1
    """Passes over a client's texts in a round, where `steps` is left out."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Texts of a step."""
    warmup: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises linearly."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Largest norm of one client's gradient; longer ones are scaled down to it. Python's `None` clips
    nothing; TOML has no word for it, so write a large number there."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay: decoupled with AdamW, an L2 penalty with SGD."""
    momentum: Annotated[float, Ge(0)] = 0.0
    """Momentum of SGD."""
    keep_optimizer: bool = False
    """A client's moments and its count of steps, and so its warm-up, go on from round to round, in
    its memory; a tensor whose shape has changed begins anew. Otherwise every round begins with a
    new optimizer."""


@dataclass(frozen=True)
class Share:
    """One client's examples, the rows of each of its steps, and what is known of every example (see ``ActivationCache``)."""

    examples: Encoded
    steps: Sequence[Sequence[int]]
    states: Sequence[Tensor] | None = None


def plan(examples: int, training: Training, seed: int, client: int, number: int) -> list[list[int]]:
    """Return the rows of every step of one client in one round, in an order of its own; an epoch's last may be short."""
    size = training.batch_size
    rows: list[list[int]] = []
    for epoch in range(training.epochs if training.steps is None else training.steps):
        order = torch.randperm(
            examples, generator=generator(seed, "order", client, number, epoch)
        ).tolist()
        rows += [order[start : start + size] for start in range(0, examples, size)]
    return rows[: training.steps]


def fit(
    model: nn.Module,
    local: LocalTask,
    task: Task,
    shares: Sequence[Share],
    training: Training,
    head: frozenset[str],
    hardware: Hardware,
    cache: ActivationCache,
    optimizer: Optimizer | None = None,
) -> Tensor:
    """Train ``local`` on K clients' shares, longest first; return their mean losses, (K,) float64.

    ``optimizer``: what steps it, by default a new one (see ``optimizer_of``).
    """
    optimizer = optimizer or optimizer_of(local, training, head)
    device, trained = hardware.torch_device, list(local.trainable.values())
    losses = torch.zeros(len(shares), dtype=torch.float64, device=device)
    buckets, count = _cut(shares, hardware)

    def play(part: MicroBatch) -> tuple[MicroBatch, Tensor, Sequence[Tensor | None]]:
        owners = part.owners if isinstance(part.owners, slice) else part.owners.to(device)
        with entering(part.states), row_owners(owners, len(part.examples)), hardware.autocast():
            each = task.losses(
                model, task.collate(part.examples, device, buckets.pad_to_multiple_of)
            )
        weighted = each * part.weights.to(device)
        if not trained:
            return part, weighted.detach(), ()
        return (
            part,
            weighted.detach(),
            torch.autograd.grad(weighted.sum(), trained, allow_unused=True),
        )

    with (
        _training(model),
        hardware.computing(model),
        cache.reading(),
        thread_map(count, trained) as at_once,
    ):
        for step in range(len(shares[0].steps)):
            active = slice(0, sum(step < len(share.steps) for share in shares))
            for parameter in trained:
                parameter.grad = None
            batches = [(share, share.steps[step]) for share in shares[active]]
            for part, weighted, gradients in at_once(play, micro_batches(batches, buckets, count)):
                losses.index_add_(0, part.clients.to(device), weighted.to(losses.dtype))
                _add(trained, gradients)
            local.after_backward(active)
            if training.clip is not None:
                clip(local.trainable, active, training.clip)
            optimizer.step(active)
    return losses.cpu() / torch.tensor([len(share.steps) for share in shares])


@final
@dataclass(frozen=True)
class MicroBatch:
    """Some rows of one step of a stack, which go through the model together.

    ``clients``: whose each row is, (n,); ``owners``: the same for ``row_owners``; ``weights``: of each row in its client's
    mean loss, (n,). ``states``: what is known of each row, or None where it is not known of all.
    """

    examples: Encoded
    states: Sequence[Tensor] | None
    clients: Tensor
    owners: slice | Tensor
    weights: Tensor


def micro_batches(
    batches: Sequence[tuple[Share, Sequence[int]]], buckets: Buckets, count: int
) -> Iterator[MicroBatch]:
    """Yield the batches of k clients in parts, formed by length, whoever's they are, for ``count`` lanes.

    Gradients are per client whatever the grouping. Within a part the rows of a client stay together.
    """
    everything = [(k, row) for k, (_, own) in enumerate(batches) for row in own]
    known = all(share.states is not None for share, _ in batches)
    lengths = [len(batches[k][0].examples.ids[row]) for k, row in everything]
    for together in buckets.dealt(lengths, count):
        mine = [
            (batches[k][0], k, row)
            for k, row in sorted((everything[i] for i in together), key=itemgetter(0))
        ]
        ids = [share.examples.ids[row] for share, _, row in mine]
        labels = [share.examples.labels[row] for share, _, row in mine]
        clients = torch.tensor([k for _, k, _ in mine])
        weights = torch.tensor([1.0 / len(batches[k][1]) for _, k, _ in mine])
        states = (
            [share.states[row] for share, _, row in mine if share.states is not None]
            if known
            else None
        )
        yield MicroBatch(Encoded(ids, labels), states, clients, _owners(clients), weights)


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add to ``.grad`` of each parameter the gradient of one part, None where the part did not use it.

    Contiguous, as fused optimizers take for granted: the gradient of what is used transposed comes transposed. And in
    memory of its own, as it is changed in place: of two parameters that enter as a sum, both gradients are one tensor.
    """
    taken: set[int] = set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
            continue
        own = gradient.contiguous()
        if (memory := own.untyped_storage().data_ptr()) in taken:
            own = own.clone()
        taken.add(memory)
        parameter.grad = own


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into training mode for the length of a ``with``, and each module back into its own."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _cut(shares: Sequence[Share], hardware: Hardware) -> tuple[Buckets, int]:
    """Return how steps are cut into parts, and how many of these are computed at once.

    A client alone may have whole weights, whose gradients are dear to add up and which stand in for
    the model's, of which there is one set: its parts are few, one after another.
    """
    if len(shares) == 1:
        return replace(hardware.buckets, overhead_tokens=hardware.tokens), 1
    return hardware.buckets, _num_parallel(shares, hardware, hardware.buckets)


def _num_parallel(shares: Sequence[Share], hardware: Hardware, buckets: Buckets) -> int:
    """Return how many parts of a step are computed at once: all, as far as there are threads."""
    lengths = [len(share.examples.ids[row]) for share in shares for row in share.steps[0]]
    return min(hardware.threads, len(buckets.cheapest(lengths)))


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


def optimizer_of(
    local: LocalTask,
    training: Training,
    head: frozenset[str],
    kept: Payload | None = None,
) -> Optimizer:
    """Return what steps ``local`` at its own rates, going on from the state ``kept``, if any."""
    head_lr = training.lr if training.head_lr is None else training.head_lr
    rates = {
        name: local.rate * (head_lr if name in head else training.lr) for name in local.trainable
    }
    return Optimizer(
        training.optimizer,
        local.trainable,
        rates,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        warmup=training.warmup,
        kept=kept,
    )
