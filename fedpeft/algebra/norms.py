"""Norms of many tensors together."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def l2_norm(tensors: Iterable[Tensor]) -> float:
    """Return the L2 norm of all numbers of ``tensors`` together, as if they were one vector.

    In float64, as the square of a large float32 is none any more. Infinite, or no number, where
    any of them is.

    >>> l2_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]), l2_norm([])
    (5.0, 0.0)
    """
    squares: list[float] = []
    for tensor in tensors:
        squares.append(float(tensor.to(torch.float64).square().sum()))
    # Not ``math.fsum``, which raises where the sum of finite squares is infinite.
    return math.sqrt(sum(squares))
