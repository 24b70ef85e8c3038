"""Steps that are differentially private for the rows of a client: DP-SGD (Abadi et al. 2016).

A row is a record of the client's data, with all the examples that a task makes of it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from fedpeft.algebra.norms import l2_norm
from fedpeft.privacy.clipping import factor_to
from fedpeft.privacy.noise import gaussian, uniform
from fedpeft.tasks import Encoded
from fedpeft.types import RowNoise


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


def begin(trained: Mapping[str, nn.Parameter]) -> None:
    """Begin the sums of a step's gradients with zeros, as a step may have no row at all."""
    for parameter in trained.values():
        parameter.grad = parameter.new_zeros(parameter.shape)


def add_bounded(
    trained: Mapping[str, nn.Parameter],
    gradients: Sequence[Tensor | None],
    client: int,
    bound: float,
) -> None:
    """Add a row's gradient, scaled down to a norm of ``bound`` at most, to its client's ``.grad``.

    ``gradients``: of all ``trained``, (K, ...), in their order; None where one is not used. What is
    infinite or no number is left out.
    """
    of_client: dict[str, Tensor] = {}
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            of_client[name] = gradient[client]
    factor = factor_to(bound, l2_norm(of_client.values()))
    if factor == 0:
        return
    for name, gradient in of_client.items():
        total = trained[name].grad
        assert total is not None  # see ``begin``
        total[client].add_(gradient, alpha=factor)


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
