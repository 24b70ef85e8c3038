"""Seeded masks: which entries of a matrix a sparse method trains; both sides know the seed."""

from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from fedpeft.seeds import generator


@lru_cache(maxsize=1024)
def positions(
    shape: torch.Size | tuple[int, ...], density: float, seed: int, module: str
) -> Tensor:
    """Return the sorted flat positions, (n,) int64, of the entries that are trained; at least one.

    ``density``: their share. One random, data-independent draw without replacement per matrix
    (SLoRA, section 4: uniform density over layers). It is drawn once and kept for the rounds to
    come: nobody may write into it.

    >>> len(positions((4, 5), density=0.1, seed=0, module="query"))
    2
    """
    # Every party draws the same mask from the seed, so positions never travel.
    size = shape[0] * shape[1]
    count = max(1, round(density * size))
    # Whoever asks first, training needs it to be no inference tensor.
    with torch.inference_mode(mode=False):
        order = torch.randperm(size, generator=generator(seed, "mask", module))
        return order[:count].sort().values


def scatter(values: Tensor, where: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the (out, in) matrix of ``values``, (n,), at flat positions ``where``, else 0.

    It is differentiable with respect to ``values``.

    >>> scatter(torch.tensor([7.0]), torch.tensor([4]), (2, 3))
    tensor([[0., 0., 0.],
            [0., 7., 0.]])
    """
    # The out-of-place scatter passes the gradient on to ``values``.
    flat = values.new_zeros(shape[0] * shape[1])
    return flat.scatter(0, where, values).view(shape[0], shape[1])


@final
@dataclass(frozen=True)
class Masked:
    """The difference of one layer to W_0, 0 but for its trained entries.

    ``values``: (1, n), of a stack of one client. ``where``: their flat positions, (n,), in a matrix
    of ``shape`` (out, in).
    """

    values: Tensor
    where: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the difference, (1, out, in)."""
        return scatter(self.values.squeeze(0), self.where, self.shape).unsqueeze(0)

    def factors(self) -> None:
        """Return None: a sparse difference has no factors of low rank."""
        return
