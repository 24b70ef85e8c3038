"""The algebra of low-rank factors: B (..., out, r) and A (..., r, in) stand for scale * B A."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from fedpeft.errors import BadInput
from fedpeft.seeds import generator
from fedpeft.types import Delta, Payload

Split = Literal["sqrt", "left", "right"]
"""Where the singular values go: half each, all to B (left), or all to A (right)."""
Drawn = Literal["random", "orthogonal"]
"""How A is drawn: LoRA's uniform numbers, or orthonormal rows."""
LARGE: Final = 1024
"""From so many rows and columns on, only the leading part of an SVD is computed."""
SPARE: Final = 8
"""Vectors in a block beside those that are wanted."""
SHARE: Final = 4
"""A basis of more than this part of all directions costs as much as the whole SVD."""
RESIDUAL: Final = 1e-6
"""How far M v may be from s u, as a share of the largest singular value."""


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


def principal(matrix: Tensor, rank: int, split: Split, large: int = LARGE) -> tuple[Tensor, Tensor]:
    """Return (B, A), the best approximation B A of rank ``rank`` of a matrix (Eckart-Young).

    The matrix is (out, in); ``split`` says where its singular values go. Where a singular value is
    0, ``sqrt`` would set both factors to 0, and then neither has a gradient. So in such a direction
    B takes the whole singular value and A keeps its row of norm 1: the direction can be trained.

    Computed in float64 and cast back, from ``large`` rows and columns on by ``leading`` where that
    finds them. The factors are unique only up to sign, and their last digits depend on the thread
    count and the machine. So they are computed once, on the server, and sent.

    >>> matrix = torch.diag(torch.tensor([4.0, 1.0]))
    >>> B, A = principal(matrix, rank=1, split="sqrt")
    >>> (B @ A).round()
    tensor([[4., 0.],
            [0., 0.]])
    """
    # matrix = left @ diag(values) @ right, the values in descending order.
    found = None
    if min(matrix.shape) >= large:
        found = leading(matrix.to(torch.float64), rank)
    if found is None:
        found = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    left, values, right = found
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


def largest(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the (B, A) of the ``rank`` largest components of K matrices, (K, out, in).

    B is (K, out, rank), with the singular values, and A (K, rank, in). A matrix that is not finite
    has no SVD: its factors are NaN, which no server accepts.

    >>> B, A = largest(torch.diag(torch.tensor([4.0, 1.0])).unsqueeze(0), rank=1)
    >>> (B @ A).round()
    tensor([[[4., 0.],
             [0., 0.]]])
    """
    _, out, width = matrices.shape
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    for matrix in matrices:
        B, A = matrix.new_full((out, rank), torch.nan), matrix.new_full((rank, width), torch.nan)
        if matrix.isfinite().all():
            B, A = principal(matrix, rank, "left")
        lefts.append(B)
        rights.append(A)
    return torch.stack(lefts), torch.stack(rights)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the first ``rank`` singular vectors and values of a matrix, (out, in), in float64.

    As left (out, rank), values (rank,), right (rank, in); None where they cannot be told apart from
    the next ones with less work than all of them take. Randomised block Krylov iteration: Musco and
    Musco 2015, algorithm 2, continued until M v = s u within ``RESIDUAL``.

    >>> left, values, right = leading(torch.diag(0.5 ** torch.arange(200.0).double()), rank=2)
    >>> [round(value, 6) for value in values.tolist()]
    [1.0, 0.5]
    """
    most = min(matrix.shape) // SHARE
    width = rank + SPARE
    # A fixed seed: the same matrix has the same factors in every run.
    draw = torch.randn(matrix.shape[1], width, generator=generator(0, "svd"), dtype=matrix.dtype)
    block = matrix @ draw.to(matrix.device)  # (out, width)
    basis, projected = matrix[:, :0], matrix[:0]  # Q, (out, k); Q^T M, (k, in)
    while basis.shape[1] + width <= most:
        # 1. What of the block is new, as an orthonormal basis. Twice is enough (Kahan).
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        rows = block.T @ matrix  # (width, in)
        basis, projected = torch.cat([basis, block], dim=1), torch.cat([projected, rows])
        # 2. The best within the basis (Rayleigh-Ritz): Q^T M M^T Q = U S^2 U^T, values ascending.
        vectors = torch.linalg.eigh(projected @ projected.T).eigenvectors
        chosen = vectors.flip(1)[:, :rank]  # (k, rank)
        scaled = torch.linalg.qr(projected.T @ chosen)  # its columns s v are orthogonal already
        signed = scaled.R.diagonal()
        # A direction whose value is 0 keeps its row of norm 1, too.
        values, right = signed.abs(), scaled.Q * torch.where(signed < 0, -1.0, 1.0)
        left = basis @ chosen
        # 3. M v - s u is 0 for singular vectors of M itself.
        residual = (matrix @ right - left * values).norm(dim=0).max()
        if residual <= RESIDUAL * values[0]:
            return left, values, right.T
        block = matrix @ rows.T
    return None


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
