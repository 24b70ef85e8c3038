"""Several cores between frozen factors, as the heads of RAVAN are."""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fedpeft.seeds import generator

Start = Literal["orthonormal", "normal"]
"""Frozen factors: orthonormal over all heads, or normal with vectors of norm 1 on average."""


def factors(
    shape: torch.Size, heads: int, rank: int, start: Start, seed: int, module: str
) -> tuple[Tensor, Tensor]:
    """Return all B_i, (h, out, p), and A_i, (h, p, in), of a layer of ``shape``, (out, in).

    They follow from the seed and the name of the layer. ``rank``: p, that of one head.
    """
    out, width = shape
    count = heads * rank
    B = _drawn(out, count, start, seed, f"{module}:B").T  # (h p, out)
    A = _drawn(width, count, start, seed, f"{module}:A").T  # (h p, in)
    return B.view(heads, rank, out).mT, A.view(heads, rank, width)


@lru_cache(maxsize=1024)
def _drawn(length: int, count: int, start: Start, seed: int, name: str) -> Tensor:
    """Return ``count`` random vectors, (length, count); drawn once, for reading only."""
    with torch.inference_mode(mode=False):
        draw = torch.randn(length, count, generator=generator(seed, "ravan", name))
        if start == "normal":
            return draw / math.sqrt(length)
        basis: Tensor = torch.linalg.qr(draw.to(torch.float64)).Q
        return basis.float()


def others(chosen: Tensor, heads: int) -> Tensor:
    """Return which of ``heads`` are not ``chosen``, (K, m) -> (K, heads - m), ascending."""
    taken = torch.zeros(len(chosen), heads, dtype=torch.bool, device=chosen.device)
    taken.scatter_(1, chosen, value=True)
    # A stable sort of False before True: what is not taken comes first, in order.
    order = taken.to(torch.int8).argsort(dim=1, stable=True)
    return order[:, : heads - chosen.shape[1]]


def picked(stack: Tensor, heads: Tensor) -> Tensor:
    """Return those ``heads``, (K, m), of a stack of cores: (K, h, p, p) -> (K, m, p, p)."""
    rows = torch.arange(len(stack), device=stack.device).unsqueeze(1)
    return stack[rows, heads]


def side_by_side(module: str, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """Return the factors of m heads, (K, m, out, p) and (K, m, p, in), as a branch of rank m p."""
    left = B.permute(0, 2, 1, 3).flatten(2)  # (K, out, m p)
    return {f"{module}:B": left, f"{module}:A": A.flatten(1, 2)}
