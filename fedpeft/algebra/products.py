"""Means of products B_k A_k over clients, as thin factors as long as these are small."""

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.lowrank import by_module
from fedpeft.algebra.svd import LARGE, holding, principal, rank_of_energy, thin_svd
from fedpeft.types import Payload, Update

WIDE: Final = 256
"""Ranks of all clients together that are kept of a large layer before they are compressed."""
KEPT: Final = 128
"""Ranks that are left of them: 16 times those of a usual adapter."""


class _Block(NamedTuple):
    """Some ranks of a stack: B (out, m), A (m, in), and the weight of each."""

    B: Tensor
    A: Tensor
    weights: Sequence[float]


@final
class ProductMean:
    """The streaming weighted mean of one layer's products B_k A_k, (out, in).

    Exact, and flat in the number of clients: factors are stacked until they are as large as the
    matrix itself, and from then on it is the matrix that is added to. With ``compress`` no large
    matrix is ever formed: of layers from ``LARGE`` rows and columns on, the ``KEPT`` largest
    components of the sum so far are kept each time the stack has become ``WIDE``. That is exact as
    long as what has been added has no higher rank.

    >>> mean = ProductMean()
    >>> mean.add(torch.tensor([[2.0]]), torch.tensor([[1.0, 0.0]]), weight=1.0)
    >>> mean.add(torch.tensor([[1.0]]), torch.tensor([[0.0, 4.0]]), weight=3.0)
    >>> mean.dense()
    tensor([[0.5000, 3.0000]])
    """

    def __init__(self, compress: bool = False) -> None:
        self._compress = compress
        self._stacked: list[_Block] = []
        self._width = 0  # ranks of all blocks together
        self._sum: Tensor | None = None  # what is no longer in the stack, (out, in) in float64
        self._weight = 0.0

    def add(self, B: Tensor, A: Tensor, weight: float) -> None:
        """Add the product of B, (out, r), and A, (r, in); r may differ from client to client."""
        self._weight += weight
        self._push(_Block(B, A, [weight] * len(A)))

    def add_terms(self, B: Tensor, A: Tensor, weights: Sequence[float]) -> None:
        """Add n products of rank one: the columns of B, (out, n), times the rows of A, (n, in).

        ``weights``: one of each product.
        """
        self._weight += sum(weights)
        self._push(_Block(B, A, weights))

    def _push(self, block: "_Block") -> None:
        """Put a block on the stack, and make the stack smaller where it has become too large."""
        self._stacked.append(block)
        self._width += len(block.weights)
        out, width = block.B.shape[0], block.A.shape[1]
        if self._compress and min(out, width) >= LARGE:
            if self._width > WIDE:
                self._shrink()
        elif self._width * (out + width) > out * width:
            self._condense()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean as (B, A), (out, m) and (m, in): the stack [B_1 ...] [p_1 A_1; ...].

        None where the stack would be larger than the matrix.
        """
        if self._sum is not None:
            return None
        B, A = self._stack()
        return B, (A / self._weight).to(B.dtype)

    def dense(self) -> Tensor:
        """Return the mean as a matrix, (out, in)."""
        dtype = self._stacked[0].B.dtype
        self._condense()
        assert self._sum is not None  # condensing leaves a sum
        return (self._sum / self._weight).to(dtype)

    def times(self, columns: Tensor) -> Tensor:
        """Return the mean times ``columns``, (in, n) in float64, as (out, n) in float64."""
        B, A = self._stack()
        product = B.to(torch.float64) @ (A @ columns)
        if self._sum is not None:
            product = product + self._sum @ columns
        return product / self._weight

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the SVD of the mean: left (out, k), values (k,), right (k, in), in float64."""
        if self._sum is None:
            B, A = self._stack()
            return thin_svd(B, A / self._weight)
        left, values, right = torch.linalg.svd(self.dense().to(torch.float64), full_matrices=False)
        return left, values, right

    def best(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the (B, A) of rank ``rank`` whose product is nearest to the mean.

        By Eckart and Young B = U_r S_r, (out, r), and A = V_r^T, (r, in), whose rows have norm 1. A
        mean of lower rank leaves B = 0 in the ranks beyond it.
        """
        if self._sum is not None:
            # Clients begin a round alike, so that few components hold nearly all of their mean:
            # the leading ones are tried at any size.
            return principal(self.dense(), rank, "left", large=0)
        dtype = self._stacked[0].B.dtype
        left, values, right = self.svd()
        B, A = (left * values)[:, :rank], right[:rank]
        missing = rank - len(A)
        if missing > 0:
            B = torch.nn.functional.pad(B, (0, missing))
            A = _orthonormally_filled(A, rank)
        return B.to(dtype).contiguous(), A.to(dtype).contiguous()

    def components(self, energy: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fewest leading components that hold a share ``energy`` of the mean.

        As ``svd`` returns all; what they hold is the sum of their squared singular values.
        """
        if self._sum is None:
            left, values, right = self.svd()
            squares = values.square().sum()
        else:
            matrix = self.dense().to(torch.float64)
            squares = matrix.square().sum()
            left, values, right = holding(matrix, energy * float(squares))
        rank = rank_of_energy(values, energy, float(squares))
        return left[:, :rank], values[:rank], right[:rank]

    @staticmethod
    def total(means: Sequence["ProductMean"]) -> "ProductMean":
        """Return the sum of several means of one layer, for reading: nothing is added to it."""
        whole = ProductMean(means[0]._compress)
        for mean in means:
            B, A = mean._stack()
            if mean._sum is not None:
                share = mean._sum / mean._weight
                whole._sum = share if whole._sum is None else whole._sum + share
            whole.add(B, A / mean._weight, weight=1.0)
        whole._weight = 1.0  # a sum, not a mean
        return whole

    def _stack(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return [B_1 ...], (out, m), and [w_1 A_1; ...], (m, in) in ``dtype``."""
        weights: list[float] = []
        for block in self._stacked:
            weights += block.weights
        B = torch.cat([block.B for block in self._stacked], dim=1)
        A = torch.cat([block.A for block in self._stacked])
        return B, A.to(dtype) * torch.tensor(weights, dtype=dtype)[:, None]

    def _condense(self) -> None:
        """Add the stack to the sum."""
        if self._width:
            # A product of some hundred ranks keeps its digits in float32, at half the time; the sum
            # of very many products would not.
            dtype = torch.promote_types(self._stacked[0].B.dtype, torch.float32)
            B, A = self._stack(dtype)
            product = B.to(dtype) @ A
            self._sum = product.double() if self._sum is None else self._sum.add_(product)
            # One empty block remembers the number format.
            self._stacked = [_Block(B[:, :0], A[:0], [])]
            self._width = 0

    def _shrink(self) -> None:
        """Replace the stack by the largest components of its product."""
        left, values, right = thin_svd(*self._stack())
        B = left[:, :KEPT].to(self._stacked[0].B.dtype)
        self._stacked = [_Block(B, right[:KEPT], values[:KEPT].tolist())]
        self._width = len(self._stacked[0].weights)


def mean_products(
    updates: Iterable[Update], weighting: Weighting, compress: bool = False
) -> tuple[dict[str, ProductMean], dict[str, Tensor]]:
    """Return the mean of B_k A_k for every module, and the means of all other tensors, by name.

    Both are empty where there was no update.

    >>> from fedpeft.types import Client
    >>> factors = {"layer:B": torch.tensor([[2.0]]), "layer:A": torch.tensor([[3.0, 4.0]])}
    >>> products, others = mean_products([Update(Client(0), 5, factors)], "examples")
    >>> products["layer"].dense(), others
    (tensor([[6., 8.]]), {})
    """
    products: dict[str, ProductMean] = {}
    others = Mean()
    for update in updates:
        weight = weight_of(update, weighting)
        for module, factors in by_module(update.payload).items():
            product = products.setdefault(module, ProductMean(compress))
            product.add(factors["B"], factors["A"], weight)
        others.add(_plain(update.payload), weight)
    return products, others.result()


def _plain(payload: Payload) -> dict[str, Tensor]:
    """Return what of a payload is no factor."""
    return {name: tensor for name, tensor in payload.items() if ":" not in name}


def _orthonormally_filled(rows: Tensor, count: int) -> Tensor:
    """Return orthonormal ``rows``, (k, in), with more such rows below, (count, in)."""
    # Unit vectors, made orthogonal to the rows and to each other: the first rows stay as they are.
    candidates = torch.eye(rows.shape[1], dtype=rows.dtype)[:count]
    basis = torch.linalg.qr(torch.cat([rows, candidates]).T).Q.T[:count]
    return torch.cat([rows, basis[len(rows) :]])


def product_norm(payload: Payload) -> float:
    """Return the Frobenius norm of all products B A in ``payload`` together.

    Without forming them: |B A|^2 is the trace of (B^T B)(A A^T).

    >>> product_norm({"q:B": torch.tensor([[3.0], [4.0]]), "q:A": torch.tensor([[2.0, 0.0]])})
    10.0
    """
    square = 0.0
    for factors in by_module(payload).values():
        B, A = factors["B"].to(torch.float64), factors["A"].to(torch.float64)
        square += float(((B.T @ B) * (A @ A.T)).sum())
    return math.sqrt(max(square, 0.0))
