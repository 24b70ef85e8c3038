"""Seeded masks: which entries of a matrix a sparse method trains, known to both sides from the seed alone."""

import torch
from torch import Tensor

from fedpeft.seeds import generator


def positions(
    shape: torch.Size | tuple[int, ...], density: float, seed: int, module: str
) -> Tensor:
    """Return the sorted flat positions, int64 (n,), of the ``density`` share of entries that are trained; at least one.

    One random, data-independent draw without replacement per matrix (SLoRA, section 4: uniform density over layers).
    """
    size = shape[0] * shape[1]
    count = max(1, round(density * size))
    order = torch.randperm(size, generator=generator(seed, "mask", module))
    return order[:count].sort().values


def scatter(values: Tensor, where: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the (out, in) matrix that is ``values`` (n,) at flat positions ``where`` and 0 elsewhere; differentiable."""
    return values.new_zeros(shape[0] * shape[1]).scatter(0, where, values).view(shape[0], shape[1])
