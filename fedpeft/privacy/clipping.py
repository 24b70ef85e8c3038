"""Bounds on what one client, or one example, adds to a sum; and how a bound follows a quantile."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.algebra.norms import l2_norm

_SLACK = 1e-6
"""Clipping aims so much below the bound that rounding to float32 cannot lead beyond it."""


def clipped(tensors: Mapping[str, Tensor], bound: float) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors scaled down to a norm of ``bound`` at most, and whether they were within.

    All in float64. Where any value is infinite or no number, all are 0, and not within.

    >>> shorter, within = clipped({"w": torch.tensor([3.0, 4.0])}, bound=1.0)
    >>> shorter["w"].round(decimals=3), within
    (tensor([0.6000, 0.8000], dtype=torch.float64), False)
    """
    length = l2_norm(tensors.values())
    factor = factor_to(bound, length)
    shorter: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Not a product with 0: that of infinity is no number.
        exact = tensor.to(torch.float64)
        shorter[name] = factor * exact if factor else torch.zeros_like(exact)
    return shorter, length <= bound


def factor_to(bound: float, length: float) -> float:
    """Return what a vector of this length is multiplied by to be no longer than ``bound``.

    0 where the length is infinite or no number.

    >>> factor_to(5.0, length=2.0), factor_to(1.0, length=math.inf)
    (1.0, 0.0)
    """
    if not math.isfinite(length):
        return 0.0
    return 1.0 if length <= bound else bound * (1 - _SLACK) / length


def next_bound(bound: float, share: float, quantile: float, rate: float) -> float:
    """Return the bound of the next round: C exp(-rate (share - quantile)).

    ``share``: of the updates that were within the bound. Andrew et al. 2021, equation (3).

    >>> next_bound(1.0, share=0.5, quantile=0.5, rate=0.2)
    1.0
    """
    return bound * math.exp(-rate * (share - quantile))
