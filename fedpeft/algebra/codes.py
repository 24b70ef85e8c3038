"""Real numbers in few bits: rows of whole numbers with one scale each, and sorted places."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_QUIET: Final = 1e-30
"""A row without any larger number is written as 0: the quotient of a smaller one could overflow."""
_HUGE: Final = 3.4e38
"""Nearly the largest number of float32."""


def row_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, length) of a tensor of ``shape``, whose rows have one scale each.

    Of a matrix that is taller than wide, such as B, the columns are the rows: so there are few.

    >>> row_shape([8, 384]), row_shape([384, 8]), row_shape([5]), row_shape([4, 3, 3])
    ((8, 384), (8, 384), (1, 5), (12, 3))
    """
    if not shape:
        return 1, 1
    if _is_tall(shape):
        return shape[1], shape[0]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]


def to_rows(stack: Tensor) -> Tensor:
    """Return a stack of K tensors as rows: (K, ...) -> (K, rows, length)."""
    shape = stack.shape[1:]
    if _is_tall(shape):
        return stack.mT
    return stack.reshape(len(stack), *row_shape(shape))


def from_rows(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what ``to_rows`` turned into ``rows``: (K, rows, length) -> (K, *shape)."""
    if _is_tall(shape):
        return rows.mT.contiguous()
    return rows.reshape(len(rows), *shape)


def _is_tall(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[0] > shape[1]


def quantised(rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return ``rows``, (..., n), as whole numbers in -levels ... levels, and their largest |x|.

    The first are int8, (..., n), the others one a row, (...), in the dtype of ``rows``.

    >>> codes, largest = quantised(torch.tensor([[0.5, -2.0, 1.0]]), levels=127)
    >>> codes, largest
    (tensor([[  32, -127,   64]], dtype=torch.int8), tensor([2.]))
    """
    least, most = rows.aminmax(dim=-1)
    largest = torch.maximum(-least, most)
    factor = torch.where(largest > _QUIET, levels / largest, 0.0)
    # Half to even; no value gets beyond +-levels, as x * (levels / x) is levels within rounding.
    return (rows * factor.unsqueeze(-1)).round_().to(torch.int8), largest


def dequantised(codes: Tensor, largest: Tensor, levels: int) -> Tensor:
    """Return the rows of which ``quantised`` made ``codes``, to half a step of largest / levels.

    What anybody may send as ``codes`` gives finite numbers where ``largest`` is finite.
    """
    # Without the bounds a forged code, or the rounding of a quotient, could overflow.
    steps = largest.clamp(max=_HUGE) / levels
    return codes.clamp(-levels, levels).to(largest.dtype).mul_(steps.unsqueeze(-1))


def in_halves(codes: Tensor) -> Tensor:
    """Return int8 codes in -8 ... 7, (..., n), two to a byte: (..., ceil(n / 2)) uint8.

    >>> in_halves(torch.tensor([1, -2, 7], dtype=torch.int8))
    tensor([105, 143], dtype=torch.uint8)
    """
    shifted = (codes + 8).to(torch.uint8)
    padded = torch.nn.functional.pad(shifted, (0, codes.shape[-1] % 2), value=8)
    return padded[..., 0::2] | (padded[..., 1::2] << 4)


def from_halves(packed: Tensor, count: int) -> Tensor:
    """Return the (..., count) codes that ``in_halves`` packed."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return both[..., :count].to(torch.int8) - 8


def place_bits(numbers: int, chosen: int) -> int:
    """Return the bits in which ``places_as_bits`` writes ``chosen`` of so many ``numbers``.

    About log2(numbers / chosen) + 2 for each place.

    >>> place_bits(10_000, 100) / 100, place_bits(10_000, 1_000) / 1_000
    (8.56, 5.249)
    """
    low = _low_bits(numbers, chosen)
    return chosen * (low + 1) + ((numbers - 1) >> low)


def _low_bits(numbers: int, chosen: int) -> int:
    """Return how many bits of a place are written as they are: log2 of the mean gap, cut off."""
    return (numbers // chosen).bit_length() - 1


def places_as_bits(places: Tensor, numbers: int) -> Tensor:
    """Return ascending places below ``numbers``, (K, k), as (K, place_bits) truth values.

    Elias-Fano's code (Elias 1974): the lower bits of every place as they are; of the upper ones the
    differences between neighbours in unary. So the length does not depend on the places.

    >>> bits = places_as_bits(torch.tensor([[2, 3, 9]]), numbers=12)
    >>> bits.int()
    tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1]], dtype=torch.int32)
    >>> places_from_bits(bits[0], numbers=12, chosen=3)
    tensor([2, 3, 9])
    """
    clients, chosen = places.shape
    low = _low_bits(numbers, chosen)
    weights = _bit_values(low).to(places.device)
    lower = (places.unsqueeze(-1) & weights).ne(0).flatten(1)  # (K, k low)
    upper = torch.zeros(
        clients, chosen + ((numbers - 1) >> low), dtype=torch.bool, device=places.device
    )
    # A 1 for every place, behind as many 0s as its upper bits say, counted from the start.
    ones = (places >> low) + torch.arange(chosen, device=places.device)
    upper.scatter_(1, ones, value=True)
    return torch.cat([lower, upper], dim=1)


def places_from_bits(bits: Tensor, numbers: int, chosen: int) -> Tensor:
    """Return the (chosen,) places that ``places_as_bits`` wrote as ``bits``, (place_bits,).

    Any other bits give some places below ``numbers``, too.
    """
    low = _low_bits(numbers, chosen)
    lower, upper = bits[: chosen * low].view(chosen, low), bits[chosen * low :]
    ones = torch.full((chosen,), len(upper) - 1)
    found = upper.nonzero().flatten()[:chosen]
    ones[: len(found)] = found
    high = ones - torch.arange(chosen)
    places = (high << low) + (lower * _bit_values(low)).sum(1)
    return places.clamp(0, numbers - 1)


def _bit_values(count: int) -> Tensor:
    """Return 2^(count - 1), ..., 2, 1."""
    return 2 ** torch.arange(count - 1, -1, -1)
