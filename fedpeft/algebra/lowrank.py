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

Drawn = Literal["random", "orthogonal"]
"""How A is drawn: LoRA's uniform numbers, or orthonormal rows."""


@final
@dataclass(frozen=True)
class LowRank:
    """A difference scale * B diag(e) A, stacked over K clients; ``e`` is None for plain LoRA.

    With ``H``, (K, h, p, p), the r = h p ranks form h heads with a square core each, and the
    difference is scale * sum_i s_i B_i H_i A_i; ``s``, (K, h), is None where all are 1.

    >>> A, B = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
    >>> LowRank(A, B, scale=2.0).dense()
    tensor([[[2., 2., 2.],
             [2., 2., 2.]]])
    """

    A: Tensor
    B: Tensor
    scale: float
    e: Tensor | None = None
    H: Tensor | None = None
    s: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (B, A), (K, out, r) and (K, r, in), with all that is between them inside B."""
        if self.H is not None:
            cores = self.H if self.s is None else self.H * self.s[..., None, None]
            clients, out, rank = self.B.shape
            heads = self.B.view(clients, out, *self.H.shape[1:3])  # (K, out, h, p)
            # [B_1 H_1, B_2 H_2, ...], (K, out, r).
            left = torch.einsum("kohp,khpq->kohq", heads, cores).reshape(clients, out, rank)
            return (self.scale * left).detach(), self.A.detach()
        # e becomes (K, 1, r), so that it scales the columns of B (K, out, r).
        weight = self.scale if self.e is None else self.scale * self.e.unsqueeze(-2)
        return (self.B * weight).detach(), self.A.detach()

    def dense(self) -> Tensor:
        """Return the (K, out, in) difference."""
        left, right = self.factors()
        return left @ right


def deltas(tensors: Payload, scale: float) -> dict[str, Delta]:
    """Return the differences that factors stand for, by module.

    ``tensors``: ``<module>:A``, ``:B`` and maybe ``:e``, or ``:H`` and maybe ``:s``, stacked over
    K; other names are passed over.

    >>> A, B = torch.ones(1, 1, 3), torch.ones(1, 2, 1)
    >>> list(deltas({"query:A": A, "query:B": B, "bias": torch.ones(1, 2)}, scale=1.0))
    ['query']
    """
    by_name: dict[str, Delta] = {}
    for module, factors in by_module(tensors).items():
        if "A" in factors:
            between = (factors.get(name) for name in ("e", "H", "s"))
            by_name[module] = LowRank(factors["A"], factors["B"], scale, *between)
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


def orthonormal(rank: int, width: int, seed: int, module: str) -> Tensor:
    """Return a random A, (rank, width), with orthonormal rows, for one module.

    >>> A = orthonormal(rank=2, width=16, seed=0, module="query")
    >>> bool(torch.allclose(A @ A.T, torch.eye(2), atol=1e-6))
    True
    """
    draw = torch.randn(width, rank, generator=generator(seed, "orthonormal", module))
    # In float64, so that machines agree on the last digits of float32.
    basis: Tensor = torch.linalg.qr(draw.to(torch.float64)).Q
    return basis.T.float().contiguous()


def drawn(start: Drawn, rank: int, width: int, seed: int, module: str) -> Tensor:
    """Return the A, (rank, width), that one module starts with."""
    draw = {"random": uniform, "orthogonal": orthonormal}[start]
    return draw(rank, width, seed, module)


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
