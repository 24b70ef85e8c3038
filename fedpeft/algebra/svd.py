"""Singular value decompositions: whole, of thin factors, and of the leading part alone."""

from typing import Final, Literal

import torch
from torch import Tensor

from fedpeft.seeds import generator

Split = Literal["sqrt", "left", "right"]
"""Where the singular values go: half each, all to B (left), or all to A (right)."""
LARGE: Final = 1024
"""From so many rows and columns on, only the leading part of an SVD is computed."""
SPARE: Final = 8
"""Vectors in a block beside those that are wanted."""
SHARE: Final = 4
"""A basis of more than this part of all directions costs as much as the whole SVD."""
RESIDUAL: Final = 1e-6
"""How far M v may be from s u, as a share of the largest singular value."""
FEW: Final = 16
"""Components that are looked for first, where it is not known how many are wanted."""
SMALLEST: Final = torch.finfo(torch.float64).tiny


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


def thin_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of B A, (out, m) and (m, in), without forming the product.

    As left (out, k), values (k,) and right (k, in) in float64, k = min(out, m, in) at most: two QR
    decompositions, and an SVD of what is left between them.

    >>> B, A = torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    >>> left, values, right = thin_svd(B, A)
    >>> values.tolist(), (left * values @ right).abs().round().tolist()
    ([6.0], [[0.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
    """
    # B A = Q_B (R_B R_A^T) Q_A^T with orthonormal Q_B and Q_A.
    columns = torch.linalg.qr(B.to(torch.float64))
    rows = torch.linalg.qr(A.to(torch.float64).T)
    left, values, right = torch.linalg.svd(columns.R @ rows.R.T, full_matrices=False)
    return columns.Q @ left, values, right @ rows.Q.T


def holding(matrix: Tensor, squares: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading components of a matrix whose squared singular values sum up to ``squares``."""
    rank = FEW
    while (found := leading(matrix, rank)) is not None:
        if float(found[1].square().sum()) >= squares:
            return found
        rank *= 2
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def rank_of_energy(values: Tensor, energy: float, squares: float) -> int:
    """Return how many of the descending singular ``values``, (k,), hold a share of their squares.

    ``energy`` is the share, and ``squares`` the sum over all singular values, also those that
    ``values`` lacks. At least one, and no more than are above 0 up to rounding.

    >>> rank_of_energy(torch.tensor([3.0, 1.0, 0.0]), energy=0.9, squares=10.0)
    1
    >>> rank_of_energy(torch.ones(4), energy=1.0, squares=4.0)
    4
    """
    held = values.to(torch.float64).square().cumsum(0) / max(squares, SMALLEST)
    enough = held >= energy - 1e-12  # sums of shares are 1 up to rounding
    positive = int((values > values[0] * 1e-7).sum())
    first = int(enough.to(torch.int8).argmax()) + 1 if bool(enough.any()) else len(values)
    return max(1, min(first, positive))
