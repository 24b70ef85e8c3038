"""Gaussian noise that nobody can draw again: from the operating system, never from a seed."""

import os
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DIGITS: Final = 53
"""Binary digits of a double."""
_TERMS: Final = 4
"""Draws that are added up to one. Floating-point numbers are no real ones, and the last digits of a
single draw can tell what it was added to; of a sum of several they do not, as far as is known."""


def gaussian(shape: torch.Size, deviation: float) -> Tensor:
    """Return noise from N(0, deviation^2), float64, from the operating system's randomness.

    Each number is half the sum of four draws, as in Holohan and Braghin 2021, "Secure Random
    Sampling in Differential Privacy", section 4.
    """
    count = shape.numel()
    total = np.zeros(count)
    for _ in range(_TERMS):
        total += _normal(count)
    # The variance of a sum is the sum of the variances.
    return torch.from_numpy(total * (deviation / _TERMS**0.5)).reshape(shape)


def _normal(count: int) -> NDArray[np.float64]:
    """Return ``count`` draws from N(0, 1), by Box and Muller 1958."""
    pairs = (count + 1) // 2
    # 1 - u is in (0, 1], where there is a logarithm.
    radius = np.sqrt(-2 * np.log(1 - uniform(pairs)))
    angle = 2 * np.pi * uniform(pairs)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:count]


def uniform(count: int) -> NDArray[np.float64]:
    """Return ``count`` draws from [0, 1), from the operating system's randomness."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return np.ldexp((words >> np.uint64(64 - _DIGITS)).astype(np.float64), -_DIGITS)


def secret_seed() -> int:
    """Return a seed in [0, 2**63) that nobody knows, from the operating system's randomness.

    Of such a seed torch's generator on a CPU keeps 32 bits.
    """
    return int.from_bytes(os.urandom(8), "big") >> 1
