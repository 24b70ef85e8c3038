"""Bounds on what one client, or one example, adds to a sum; and how a bound follows a quantile."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_SLACK = 1e-6
"""Clipping aims so much below the bound that rounding to float32 cannot lead beyond it."""


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all numbers together, in float64.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
    5.0
    """
    squares = [float(tensor.to(torch.float64).square().sum()) for tensor in tensors.values()]
    return math.sqrt(math.fsum(squares))


def clipped(tensors: Mapping[str, Tensor], bound: float) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors scaled down to a norm of ``bound`` at most, and whether they were within.

    All in float64. Where any value is infinite or no number, all are 0, and not within.

    >>> shorter, within = clipped({"w": torch.tensor([3.0, 4.0])}, bound=1.0)
    >>> shorter["w"].round(decimals=3), within
    (tensor([0.6000, 0.8000], dtype=torch.float64), False)
    """
    length = norm(tensors)
    if not math.isfinite(length):
        nothing: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            nothing[name] = torch.zeros_like(tensor, dtype=torch.float64)
        return nothing, False
    within = length <= bound
    factor = 1.0 if within else bound * (1 - _SLACK) / length
    return {name: factor * tensor.to(torch.float64) for name, tensor in tensors.items()}, within


def next_bound(bound: float, share: float, quantile: float, rate: float) -> float:
    """Return the bound of the next round: C exp(-rate (share - quantile)).

    ``share``: of the updates that were within the bound. Andrew et al. 2021, equation (3).

    >>> next_bound(1.0, share=0.5, quantile=0.5, rate=0.2)
    1.0
    """
    return bound * math.exp(-rate * (share - quantile))
