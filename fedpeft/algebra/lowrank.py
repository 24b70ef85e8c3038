"""The algebra of low-rank factors: B (..., out, r) and A (..., r, in) stand for scale * B A."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from fedpeft.errors import BadInput
from fedpeft.seeds import generator
from fedpeft.types import Delta, Payload

Split = Literal["sqrt", "left", "right"]
"""Where the singular values go: half each, all to B (left), or all to A (right)."""


@final
@dataclass(frozen=True)
class LowRank:
    """A difference scale * B diag(e) A, stacked over K clients; ``e`` is None for plain LoRA.

    >>> A, B = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
    >>> LowRank(A, B, scale=2.0).dense()
    tensor([[[2., 2., 2.],
             [2., 2., 2.]]])
    """

    A: Tensor
    B: Tensor
    scale: float
    e: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (B, A), (K, out, r) and (K, r, in), with the scale and e inside B."""
        # e becomes (K, 1, r), so that it scales the columns of B (K, out, r).
        weight = self.scale if self.e is None else self.scale * self.e.unsqueeze(-2)
        return (self.B * weight).detach(), self.A.detach()

    def dense(self) -> Tensor:
        """Return the (K, out, in) difference."""
        left, right = self.factors()
        return left @ right


def deltas(tensors: Payload, scale: float) -> dict[str, Delta]:
    """Return the differences that factors stand for, by module.

    ``tensors``: ``<module>:A``, ``:B`` and maybe ``:e``, stacked over K; other names are passed
    over.

    >>> A, B = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
    >>> list(deltas({"query:A": A, "query:B": B, "bias": torch.ones(1, 2)}, scale=1.0))
    ['query']
    """
    by_name: dict[str, Delta] = {}
    for module, factors in by_module(tensors).items():
        if "A" in factors:
            by_name[module] = LowRank(factors["A"], factors["B"], scale, factors.get("e"))
    return by_name


def by_module(tensors: Payload) -> dict[str, dict[str, Tensor]]:
    """Group the factors in a payload by the module that they branch off.

    >>> by_module({"query:A": 1, "query:B": 2, "value:A": 3, "bias": 4})
    {'query': {'A': 1, 'B': 2}, 'value': {'A': 3}}
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, colon, factor = name.partition(":")
        if colon:
            groups.setdefault(module, {})[factor] = tensor
    return groups


def principal(matrix: Tensor, rank: int, split: Split) -> tuple[Tensor, Tensor]:
    """Return (B, A), the best approximation B A of rank ``rank`` of a matrix (Eckart-Young).

    The matrix is (out, in); ``split`` says where its singular values go. Where a singular value is
    0, ``sqrt`` would set both factors to 0, and then neither has a gradient. So in such a direction
    B takes the whole singular value and A keeps its row of norm 1: the direction can be trained.

    Computed in float64 and cast back. The factors are unique only up to sign, and their last digits
    depend on the thread count and the machine. So they are computed once, on the server, and sent.

    >>> matrix = torch.diag(torch.tensor([4.0, 1.0]))
    >>> B, A = principal(matrix, rank=1, split="sqrt")
    >>> (B @ A).round()
    tensor([[4., 0.],
            [0., 0.]])
    """
    # matrix = left @ diag(values) @ right, the values in descending order.
    left, values, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    values = values[:rank]
    power = {"sqrt": 0.5, "left": 1.0, "right": 0.0}[split]
    to_B, to_A = values**power, values ** (1.0 - power)
    if split == "sqrt":
        # Zero up to the rounding of float32 weights: the tolerance of torch.linalg.matrix_rank.
        rounding = values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps
        nothing = values <= rounding
        to_B = torch.where(nothing, values, to_B)
        to_A = torch.where(nothing, 1.0, to_A)
    B = left[:, :rank] * to_B  # (out, rank)
    A = to_A[:, None] * right[:rank]  # (rank, in)
    return B.to(matrix.dtype).contiguous(), A.to(matrix.dtype).contiguous()


def orthogonality(tensors: Payload) -> Tensor:
    """Return the sum over modules and clients of |A A^T - I|_F + |B^T B - I|_F, 0-d.

    Source: AdaLoRA, equation 4.
    """
    total = torch.zeros(())
    for factors in by_module(tensors).values():
        A, B = factors["A"], factors["B"]
        # Both (K, r, r), and the identity where the r directions are orthonormal.
        for gram in (A @ A.mT, B.mT @ B):
            identity = torch.eye(gram.shape[-1]).to(gram)
            distances = (gram - identity).norm(dim=(-2, -1))  # Frobenius, (K,)
            total = total + distances.sum().to(total)
    return total


def uniform(rank: int, width: int, seed: int, module: str) -> Tensor:
    """Return LoRA's random A, (rank, width), for one module.

    Kaiming uniform with a = sqrt(5), as in the code of Hu et al. and of peft: uniform between
    -1 / sqrt(width) and 1 / sqrt(width).

    >>> A = uniform(rank=2, width=16, seed=0, module="query")
    >>> A.shape, bool((A.abs() <= 0.25).all())
    (torch.Size([2, 16]), True)
    """
    # Kaiming's bound is sqrt(6 / ((1 + a^2) * width)), and 6 / (1 + 5) = 1.
    bound = 1.0 / math.sqrt(width)
    draw = torch.rand(rank, width, generator=generator(seed, "lora", module))
    return draw * (2 * bound) - bound


def check_ranks(layers: Mapping[str, Tensor], rank: int, field: str = "method.rank") -> None:
    """Raise BadInput where ``rank`` is below 1 or above what an (out, in) layer can hold.

    >>> check_ranks({"query": torch.zeros(4, 3)}, rank=8)
    Traceback (most recent call last):
    fedpeft.errors.BadInput: method.rank = 8: layer 'query' is 4 x 3; choose a rank from 1 to 3
    """
    for module, matrix in layers.items():
        # B A with more ranks than the matrix has rows or columns would add nothing but cost.
        if not 1 <= rank <= min(matrix.shape):
            raise BadInput(
                f"{field} = {rank}: layer {module!r} is {matrix.shape[0]} x {matrix.shape[1]}; "
                f"choose a rank from 1 to {min(matrix.shape)}"
            )
