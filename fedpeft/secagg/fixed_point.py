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
        # The largest f with most * 2^f <= room: the logarithm of their quotient, rounded down.
        fraction = min(bits, int(room / Fraction(most)).bit_length() - 1)
        if fraction < LEAST:
            raise BadInput(
                f"wrap.bits = {bits} of secagg: sums of {terms} terms of up to {most:g} leave less "
                f"than {LEAST} bits behind the point; choose more bits, or a smaller wrap.range or "
                "wrap.examples"
            )
        return FixedPoint(bits, fraction)

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
        scaled = numbers * 2.0**self.fraction
        return np.rint(scaled, out=scaled).astype(np.int64).view(np.uint64)

    def decode(self, words: Words) -> NDArray[np.float64]:
        """Return the numbers that ``words`` stand for, modulo 2^bits, with their signs."""
        # To the top of the word and back: the shift of a signed number copies its sign.
        unused = 64 - self.bits
        signed = (words << np.uint64(unused)).view(np.int64) >> np.int64(unused)
        return signed * np.float64(self.step)

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Return ``words`` modulo 2^bits as bytes, the lowest first, ``size`` for each."""
        all_bytes = words.astype("<u8", copy=False).view(np.uint8).reshape(-1, _WORD)
        packed = np.empty((len(words), self.size), dtype=np.uint8)
        # Byte by byte of all numbers: NumPy is slow at rows as short as those of one number.
        for byte in range(self.size):
            packed[:, byte] = all_bytes[:, byte]
        return packed.reshape(-1)

    def add_packed(self, total: Words, packed: NDArray[np.uint8]) -> None:
        """Add to ``total`` what ``pack`` returned."""
        all_bytes = np.zeros((len(total), _WORD), dtype=np.uint8)
        for byte in range(self.size):  # as in `pack`
            all_bytes[:, byte] = packed[byte :: self.size]
        np.add(total, all_bytes.view("<u8").reshape(-1), out=total)
