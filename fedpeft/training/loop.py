"""The local loop: K clients side by side on one frozen base.

Each has batches, gradient clipping and optimizer state of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.errors import NotStackable
from fedpeft.mounting import Copies, row_owners
from fedpeft.privacy.noise import secret_seed
from fedpeft.seeds import derive, generator
from fedpeft.tasks import Task
from fedpeft.training import private
from fedpeft.training.activation_cache import ActivationCache, entering
from fedpeft.training.bucketing import Buckets
from fedpeft.training.hardware import Hardware
from fedpeft.training.micro_batches import (
    Batch,
    MicroBatch,
    Share,
    grouping,
    micro_batches,
    row_batches,
)
from fedpeft.training.optimizer import Kind, Optimizer, clip
from fedpeft.training.threads import thread_map
from fedpeft.types import LocalTask, Payload


@dataclass(frozen=True)
class Training:
    """How a client trains in one round."""

    optimizer: Kind = "adamw"
    """AdamW, or SGD with `momentum`."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Learning rate; left out, the one that sweeps propose for the method, see docs/methods.md, and
    0.001 where there is none."""
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
    """Largest norm of one client's gradient; longer ones are scaled down to it. Python's `None`
    clips nothing; TOML has no word for it, so write a large number there. Not with the wrapper
    `dpsgd`, which bounds the gradient of every row."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay: decoupled with AdamW, an L2 penalty with SGD."""
    momentum: Annotated[float, Ge(0)] = 0.0
    """Momentum of SGD."""
    keep_optimizer: bool = False
    """A client's moments and its count of steps, and so its warm-up, go on from round to round, in
    its memory; a tensor whose shape has changed begins anew. Otherwise every round begins with a
    new optimizer."""


def plan(
    examples: int, training: Training, seed: int, client: int, round_number: int
) -> list[list[int]]:
    """Return the rows of every step of one client in one round.

    Each pass over the ``examples`` has a random order of its own; its last step may be short.

    >>> steps = plan(5, Training(batch_size=2), seed=0, client=3, round_number=0)
    >>> [len(rows) for rows in steps], sorted(sum(steps, []))
    ([2, 2, 1], [0, 1, 2, 3, 4])
    """
    size, count = training.batch_size, num_steps(examples, training)
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < count:
        random = generator(seed, "order", client, round_number, epoch)
        order = torch.randperm(examples, generator=random).tolist()
        for start in range(0, examples, size)[: count - len(steps)]:
            steps.append(order[start : start + size])
        epoch += 1
    return steps


def paced(steps: int, pace: float) -> int:
    """Return the share ``pace`` of a number of steps, rounded up; at least one of them, if any.

    >>> paced(10, 0.25), paced(10, 0.7), paced(3, 1.0)
    (3, 7, 3)
    """
    return max(min(steps, 1), ceil(steps * pace - 1e-9))  # 0.1 * 30 is a little more than 3


def num_steps(examples: int, training: Training) -> int:
    """Return how many steps ``plan`` has for so many examples.

    >>> num_steps(5, Training(batch_size=2)), num_steps(5, Training(batch_size=2, steps=7))
    (3, 7)
    """
    if training.steps is not None:
        return training.steps if examples else 0
    return training.epochs * ceil(examples / training.batch_size)


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
    """Train ``local`` on K clients' shares; return their mean losses over all steps, (K,) float64.

    ``shares``: the one with most steps first. ``optimizer``: by default a new one (see
    ``optimizer_of``).
    """
    optimizer = optimizer or optimizer_of(local, training, head)
    device = hardware.torch_device
    trained = list(local.trainable.values())
    losses = torch.zeros(len(shares), dtype=torch.float64, device=device)
    buckets, num_parallel = grouping(shares, hardware)
    most_rows = private.most_rows(local)

    def forward_and_backward(micro_batch: MicroBatch) -> _Gradients:
        """Return the weighted losses of the rows and their gradients; it runs in any thread."""
        owners, rows = micro_batch.owners, len(micro_batch.examples)
        if isinstance(owners, Tensor):
            owners = owners.to(device)
        copies = _copies(trained, micro_batch)
        with entering(micro_batch.states), row_owners(owners, rows, copies), hardware.autocast():
            batch = task.collate(micro_batch.examples, device, buckets.pad_to_multiple_of)
            row_losses = task.losses(model, batch)  # (n,)
        # Weights are 1 / rows of the client's batch: added up, these are each client's mean loss.
        weighted = row_losses * micro_batch.weights.to(device)
        if not trained:  # a method may send nothing that is trained
            return _Gradients(micro_batch, weighted.detach(), ())
        # The sum over rows of several clients mixes nothing: a row depends on the parameters of its
        # own client alone, or on its own copies. ``grad``, not ``backward``: threads must not add
        # into one ``.grad``.
        loss = weighted.sum()
        gradients: Sequence[Tensor | None]
        if copies is None:
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        else:
            gradients = private.gradients_of_rows(loss, trained, copies)
        return _Gradients(micro_batch, weighted.detach(), gradients)

    with (
        _training(model),
        hardware.computing(model),
        cache.reading(),
        # Dropout that follows from a seed that others know would tell of rows: one more or less
        # shifts the masks of all others.
        nullcontext() if local.rows is None else randomness(secret_seed()),
        thread_map(num_parallel, trained) as parallel_map,
    ):
        for step in range(len(shares[0].steps)):
            # The clients that still train are the first so many, as the longest share comes first.
            active = slice(0, _num_active(shares, step))
            # 1. Gradients of the clients' mean losses, added up over micro-batches.
            for parameter in trained:
                parameter.grad = None
            batches = [(share, share.steps[step]) for share in shares[active]]
            if local.rows is not None:
                compute = partial(parallel_map, forward_and_backward)
                most_rows = _add_rows(local, batches, hardware.buckets, most_rows, compute)
                private.add_noise(local.trainable, active, local.rows, training.batch_size)
            else:
                stream = micro_batches(batches, buckets, num_parallel)
                # In the order of the micro-batches, whichever thread is faster: the same bits come
                # out.
                for done in parallel_map(forward_and_backward, stream):
                    clients = done.micro_batch.clients.to(device)
                    losses.index_add_(0, clients, done.losses.to(losses.dtype))
                    _add(trained, done.gradients)
            # 2. What the method wants to see of the gradients, before they are scaled down.
            local.after_backward(active)
            # 3. Clip each client's gradient by itself, and step.
            if training.clip is not None and local.rows is None:
                clip(local.trainable, active, training.clip)
            optimizer.step(active)
    num_steps = [len(share.steps) for share in shares]
    return losses.cpu() / torch.tensor(num_steps)


def _num_active(shares: Sequence[Share], step: int) -> int:
    """Return how many clients have not finished their steps before ``step``."""
    active = [share for share in shares if step < len(share.steps)]
    return len(active)


class _Gradients(NamedTuple):
    """The results of a micro-batch: weighted losses of its rows, (n,), and a gradient a parameter.

    A gradient, (K, ...), is 0 for clients without rows here, and None if the parameter is not used.
    With copies it is (R, ...), of each row of the data.
    """

    micro_batch: MicroBatch
    losses: Tensor
    gradients: Sequence[Tensor | None]


def _add_rows(
    local: LocalTask,
    batches: Sequence[Batch],
    buckets: Buckets,
    most_rows: int,
    compute: Callable[[Iterable[MicroBatch]], Iterator[_Gradients]],
) -> int:
    """Let ``.grad`` be the sums of the bounded gradients of all rows of the data in one step.

    ``compute``: what gives micro-batches' gradients. Returns how many rows may go together in the
    next step: ``most_rows``, or 1 if it was found out here that the model does not keep them apart.
    """
    if most_rows > 1:
        try:
            _add_passes(local, row_batches(batches, buckets, most_rows), compute)
            return most_rows
        except NotStackable:
            pass  # anew below: in here the error keeps the pass that failed in memory
    _add_passes(local, row_batches(batches, buckets, 1), compute)
    return 1


def _add_passes(
    local: LocalTask,
    stream: Iterable[MicroBatch],
    compute: Callable[[Iterable[MicroBatch]], Iterator[_Gradients]],
) -> None:
    """Let ``.grad`` be the sums of the bounded gradients of all rows of the data in ``stream``."""
    assert local.rows is not None
    private.begin(local.trainable)
    for done in compute(stream):
        client = int(done.micro_batch.clients[0])
        gradients = done.gradients
        if done.micro_batch.copies is None:  # (K, ...), of one row
            gradients = [g if g is None else g[client : client + 1] for g in gradients]
        private.add_bounded(local.trainable, gradients, client, local.rows.clip)


def _copies(trained: Sequence[nn.Parameter], micro_batch: MicroBatch) -> Copies | None:
    """Return the copies of what is trained that the rows of a micro-batch have, if any."""
    if micro_batch.copies is None:
        return None
    return private.copied(trained, int(micro_batch.clients[0]), micro_batch.copies)


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add the gradients of one micro-batch to ``.grad`` of the ``parameters``.

    A gradient is None where the micro-batch did not use the parameter.
    """
    # A new ``.grad`` has to be
    # - contiguous, as fused optimizers take for granted: a parameter that is used transposed has a
    #   gradient that is transposed;
    # - in memory of its own, as it is changed in place: two parameters that are used as a sum have
    #   one tensor as the gradient of both.
    taken: set[int] = set()  # addresses of memory that is some parameter's .grad already
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is not None:
            parameter.grad.add_(gradient)
            continue
        first = gradient.contiguous()
        address = first.untyped_storage().data_ptr()
        if address in taken:
            first = first.clone()
        taken.add(address)
        parameter.grad = first


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into training mode for a ``with``; then give each module its own mode back."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def own_randomness(seed: int, client: int, round_number: int) -> Iterator[None]:
    """Give a ``with`` a random stream of this client and round, and restore torch's after it.

    It is mainly dropout that draws from it.
    """
    with randomness(derive(seed, "client", client, round_number)):
        yield


@contextmanager
def randomness(seed: int) -> Iterator[None]:
    """Give a ``with`` a random stream that begins at ``seed``, and restore torch's after it."""
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:
            # The same stream, without a note for every accelerator that may still appear.
            torch.default_generator.manual_seed(seed)
        yield


def optimizer_of(
    local: LocalTask,
    training: Training,
    head: frozenset[str],
    kept: Payload | None = None,
) -> Optimizer:
    """Return the optimizer of ``local`` at its own rates.

    ``head``: names of the head's parameters, which have a rate of their own. ``kept``: the state of
    an earlier optimizer, from which this one goes on.
    """
    head_lr = training.lr if training.head_lr is None else training.head_lr
    rates: dict[str, float] = {}
    for name in local.trainable:
        rates[name] = local.rate * (head_lr if name in head else training.lr)
    return Optimizer(
        training.optimizer,
        local.trainable,
        rates,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        warmup=training.warmup,
        kept=kept,
    )
