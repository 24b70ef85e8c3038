"""Steps that are differentially private for the rows of a client: DP-SGD (Abadi et al. 2016).

A row is a record of the client's data, with all the examples that a task makes of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.errors import NotStackable
from fedpeft.mounting import Copies
from fedpeft.privacy.clipping import factor_to
from fedpeft.privacy.noise import gaussian, uniform
from fedpeft.tasks import Encoded
from fedpeft.training.bucketing import Buckets
from fedpeft.types import LocalTask, RowNoise

NUMBERS: Final = 1 << 25
"""Numbers in the gradients of all rows of one pass, at most: 128 MB. Passes of several threads have
that many each."""


def drawn(examples: Encoded, steps: int, batch_size: int) -> list[list[int]]:
    """Return the indices of the examples in each of so many ``steps``.

    Every row is in every step by itself, with probability ``batch_size`` / rows, drawn from the
    operating system's randomness (Poisson sampling); a step may be empty.
    """
    rows = by_row(examples, range(len(examples)))
    probability = min(1.0, batch_size / len(rows))
    found: list[list[int]] = []
    for _ in range(steps):
        step: list[int] = []
        for row in np.flatnonzero(uniform(len(rows)) < probability):
            step += rows[row]
        found.append(step)
    return found


def by_row(examples: Encoded, indices: Iterable[int]) -> list[list[int]]:
    """Return the ``indices`` of examples, those from one row of the data together."""
    rows: dict[int, list[int]] = {}
    for index in indices:
        rows.setdefault(examples[index].row, []).append(index)
    return list(rows.values())


def alike(
    examples: Encoded, indices: Sequence[int], buckets: Buckets, most_rows: int
) -> Iterator[list[list[int]]]:
    """Yield rows of the data, each as its indices of examples: those of one micro-batch together.

    They have like lengths and equally many examples, and are no more than ``most_rows``.
    """
    by_count: dict[int, list[list[int]]] = {}  # number of examples -> rows of so many
    for of_row in by_row(examples, indices):
        by_count.setdefault(len(of_row), []).append(of_row)
    for count, rows in by_count.items():
        lengths = [max(examples.lengths[index] for index in of_row) for of_row in rows]
        of_rows = replace(
            buckets,
            max_tokens=buckets.max_tokens // count,
            overhead_tokens=buckets.overhead_tokens // count,
        )
        for bucket in of_rows.cheapest(lengths):
            for start in range(0, len(bucket), most_rows):
                group = bucket[start : start + most_rows]
                # Layers refuse a pass with as many rows as tokens, as they cannot tell (length,
                # rows) from (rows, length). The last row is the longest and so stays.
                longest = lengths[group[-1]]
                padded = range(longest, buckets.padded(longest) + 1)
                while len(group) > 1 and len(group) * count in padded:
                    yield [rows[group.pop(0)]]
                yield [rows[row] for row in group]


def begin(trained: Mapping[str, nn.Parameter]) -> None:
    """Begin the sums of a step's gradients with zeros, as a step may have no row at all."""
    for parameter in trained.values():
        parameter.grad = parameter.new_zeros(parameter.shape)


def most_rows(local: LocalTask) -> int:
    """Return how many rows may go through the model together, each with a gradient of its own."""
    if not local.copies:
        return 1
    numbers = sum(parameter[0].numel() for parameter in local.trainable.values())
    return max(1, NUMBERS // max(1, numbers))


def copied(trained: Sequence[nn.Parameter], client: int, rows: int) -> Copies:
    """Return copies of what ``client`` trains, one for each of so many ``rows`` of its data.

    ``trained``: (K, ...) each. The copies are views, and take no memory.
    """
    copies: dict[Tensor, Tensor] = {}
    for parameter in trained:
        of_client = parameter.detach()[client]
        copies[parameter] = of_client.expand(rows, *of_client.shape).requires_grad_()
    return Copies(rows, copies)


def gradients_of_rows(
    loss: Tensor, trained: Sequence[nn.Parameter], copies: Copies
) -> Sequence[Tensor | None]:
    """Return the gradients of the sum of the rows' losses by the copies, (R, ...) of each tensor.

    None where one is not used. One that the model has used without its copies raises NotStackable:
    what it adds to each row's gradient is not known then.
    """
    leaves = [*copies.of.values(), *trained]
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, leaves, allow_unused=True)
    by_copies, without = found[: len(trained)], found[len(trained) :]
    if any(gradient is not None for gradient in without):
        raise NotStackable("a trained tensor was used without its copies")
    return by_copies


def add_bounded(
    trained: Mapping[str, nn.Parameter],
    gradients: Sequence[Tensor | None],
    client: int,
    bound: float,
) -> None:
    """Add gradients of a client's rows to its ``.grad``, each scaled down to ``bound`` at most.

    ``gradients``: of all ``trained``, (R, ...), in their order; None where one is not used. A row
    with what is infinite or no number is left out.
    """
    used: dict[str, Tensor] = {}
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            used[name] = gradient
    kept, factors = _factors(used.values(), bound)
    for name, gradient in used.items():
        total = trained[name].grad
        assert total is not None  # see ``begin``
        weights = torch.tensor(factors).to(gradient).view(-1, *[1] * (gradient.ndim - 1))
        # Not a product of matrices, which some GPUs round to fewer digits.
        total[client].add_((gradient[kept] * weights).sum(0))


def _factors(gradients: Iterable[Tensor], bound: float) -> tuple[list[int], list[float]]:
    """Return the rows that count and what the gradient of each is multiplied by.

    ``gradients``: (R, ...) each.
    """
    squares: list[Tensor] = []
    for gradient in gradients:
        # In float64, as the square of a large float32 is none any more.
        flat = gradient.unsqueeze(-1).flatten(1)  # a number's gradient has no axis but the rows'
        squares.append(flat.to(torch.float64).square().sum(1))
    if not squares:
        return [], []
    kept: list[int] = []
    factors: list[float] = []
    for row, length in enumerate(torch.stack(squares).sum(0).sqrt().tolist()):
        factor = factor_to(bound, length)
        if factor > 0:  # a product of 0 and what is no number is no number
            kept.append(row)
            factors.append(factor)
    return kept, factors


def add_noise(
    trained: Mapping[str, nn.Parameter], active: slice, noise: RowNoise, batch_size: int
) -> None:
    """Add noise to the ``active`` clients' sums of gradients; divide them by ``batch_size``.

    That number is the one that was expected: how many rows there were must not be told.
    """
    for parameter in trained.values():
        assert parameter.grad is not None  # see ``begin``
        sums = parameter.grad[active]
        added = gaussian(sums.shape, noise.noise * noise.clip).to(sums)
        parameter.grad[active] = (sums + added) / batch_size
