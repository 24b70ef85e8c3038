"""Secret sharing over a prime field: any t of n shares give the secret, fewer tell nothing.

Source: Shamir 1979, "How to Share a Secret".
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Final

PRIME: Final = 2**256 + 297
"""The smallest prime above all secrets of 32 bytes."""
SHARE: Final = 33
"""Bytes of one share in the field of ``PRIME``."""


def split(
    secret: int,
    threshold: int,
    count: int,
    prime: int = PRIME,
    draw: Callable[[int], int] = secrets.randbelow,
) -> list[int]:
    """Return ``count`` shares of ``secret``, any ``threshold`` of which give it back.

    Share number i is that of the point i + 1. ``draw(n)`` returns a uniform number below n, from
    the operating system by default.

    >>> shares = split(123, threshold=2, count=3)
    >>> combine({1: shares[0], 3: shares[2]})
    123
    """
    if not 0 <= secret < prime or not 1 <= threshold <= count < prime:
        raise ValueError(f"no {threshold} of {count} shares of such a secret in this field")
    # A random polynomial of degree t - 1 with f(0) = secret.
    coefficients = [secret]
    for _ in range(threshold - 1):
        coefficients.append(draw(prime))
    return [_value(coefficients, point, prime) for point in range(1, count + 1)]


def _value(coefficients: Sequence[int], point: int, prime: int) -> int:
    """Return the polynomial's value at ``point``, by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


def combine(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """Return the secret of at least as many ``shares``, by point, as its threshold.

    Fewer, or other shares, give a number that has nothing to do with the secret.
    """
    secret = 0
    for weight, share in zip(weights_at_zero(list(shares), prime), shares.values(), strict=True):
        secret += weight * share
    return secret % prime


def weights_at_zero(points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return Lagrange's weights: f(0) is the weighted sum of f at ``points``.

    w_i = prod_{j != i} x_j / (x_j - x_i)
    """
    weights: list[int] = []
    for one in points:
        above, below = 1, 1
        for other in points:
            if other != one:
                above = above * other % prime
                below = below * (other - one) % prime
        weights.append(above * pow(below, -1, prime) % prime)
    return weights
