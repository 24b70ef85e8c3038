"""Real numbers as whole ones modulo 2^b, whose sums are exact."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import BadInput
from fedpeft.secagg.masks import Words

LEAST: Final = 8
"""Bits behind the point at least; with fewer, a mean would hardly be one."""
_WORD: Final = 8


@final
@dataclass(frozen=True)
class FixedPoint:
    """Numbers of ``bits`` bits, a multiple of 8 up to 56, ``fraction`` of them behind the point.

    >>> form = FixedPoint.fitting(bits=32, terms=20, most=1000.0)
    >>> form.fraction
    16
    >>> words = form.encode(np.array([-1.5, 0.25])) + form.encode(np.array([1.0, 1.0]))
    >>> form.decode(words)
    array([-0.5 ,  1.25])
    """

    bits: int
    fraction: int

    @staticmethod
    def fitting(bits: int, terms: int, most: float) -> "FixedPoint":
        """Return the finest form in which so many ``terms`` of at most ``most`` can be added.

        BadInput where less than ``LEAST`` bits are left behind the point.
        """
        # |sum| <= terms * (most * 2^f + 1/2 for rounding) must stay below 2^(bits - 1). In exact
        # arithmetic, as a floating-point number has fewer digits than 2^(bits - 1).
        room = Fraction(2 ** (bits - 1) - 1, terms) - Fraction(1, 2)
        for fraction in range(bits, LEAST - 1, -1):
            if Fraction(most) * 2**fraction <= room:
                return FixedPoint(bits, fraction)
        raise BadInput(
            f"wrap.bits = {bits} of secagg: sums of {terms} terms of up to {most:g} leave less "
            f"than {LEAST} bits behind the point; choose more bits, or a smaller wrap.range or "
            "wrap.examples"
        )

    @property
    def step(self) -> float:
        """Return the difference between neighbours; every term is off by half of it at most."""
        return 2.0**-self.fraction

    @property
    def size(self) -> int:
        """Return the bytes of one number on the wire."""
        return self.bits // 8

    def encode(self, numbers: NDArray[np.float64]) -> Words:
        """Return the nearest whole numbers of steps, modulo 2^64."""
        # Exact but for the rounding: scaling by a power of two changes no digit.
        return np.rint(np.ldexp(numbers, self.fraction)).astype(np.int64).view(np.uint64)

    def decode(self, words: Words) -> NDArray[np.float64]:
        """Return the numbers that ``words`` stand for, modulo 2^bits, with their signs."""
        # To the top of the word and back: the shift of a signed number copies its sign.
        unused = 64 - self.bits
        signed = (words << np.uint64(unused)).view(np.int64) >> np.int64(unused)
        return np.ldexp(signed.astype(np.float64), -self.fraction)

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Return ``words`` modulo 2^bits as bytes, the lowest first, ``size`` for each."""
        low = words.astype("<u8", copy=False).view(np.uint8).reshape(-1, _WORD)[:, : self.size]
        return np.ascontiguousarray(low).reshape(-1)

    def add_packed(self, total: Words, packed: NDArray[np.uint8]) -> None:
        """Add to ``total`` what ``pack`` returned."""
        words = np.zeros((len(total), _WORD), dtype=np.uint8)
        words[:, : self.size] = packed.reshape(-1, self.size)
        np.add(total, words.view("<u8").reshape(-1), out=total)
