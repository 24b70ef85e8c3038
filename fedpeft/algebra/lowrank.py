"""The algebra of low-rank factors: B (..., out, r) and A (..., r, in) stand for the matrix scale * B A."""

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
    """A difference scale * B diag(e) A, stacked over K clients; ``e`` is None for plain LoRA."""

    A: Tensor
    B: Tensor
    scale: float
    e: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (B, A), (K, out, r) and (K, r, in), with the scale and e inside B."""
        weight = self.scale if self.e is None else self.scale * self.e.unsqueeze(-2)
        return (self.B * weight).detach(), self.A.detach()

    def dense(self) -> Tensor:
        """Return the (K, out, in) difference."""
        left, right = self.factors()
        return left @ right


def deltas(tensors: Payload, scale: float) -> dict[str, Delta]:
    """Return the differences that the factors in ``tensors`` (``<module>:A``, ``:B``, maybe ``:e``) stand for, by module."""
    return {
        module: LowRank(parts["A"], parts["B"], scale, parts.get("e"))
        for module, parts in by_module(tensors).items()
        if "A" in parts
    }


def by_module(tensors: Payload) -> dict[str, dict[str, Tensor]]:
    """Group the branch parts of a payload: ``{"m:A": x, "m:B": y, "bias": z}`` -> ``{"m": {"A": x, "B": y}}``."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, colon, part = name.partition(":")
        if colon:
            groups.setdefault(module, {})[part] = tensor
    return groups


def principal(matrix: Tensor, rank: int, split: Split) -> tuple[Tensor, Tensor]:
    """Return (B, A), the best rank-``rank`` approximation B A of an (out, in) matrix (Eckart-Young), S divided by ``split``.

    Of a direction whose singular value is 0, ``sqrt`` would leave both factors at 0, where neither
    has a gradient. There all of it goes to B, and A keeps its row of norm 1, so it can be trained.

    Computed in float64 and cast back. Factors are defined up to sign and may differ between thread counts and machines
    in their last digits, so they are computed once and sent.
    """
    left, values, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    values = values[:rank]
    power = {"sqrt": 0.5, "left": 1.0, "right": 0.0}[split]
    to_B, to_A = values**power, values ** (1.0 - power)
    if split == "sqrt":
        # Zero but for the rounding of float32 weights, as torch.linalg.matrix_rank tells it.
        rounding = values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps
        nothing = values <= rounding
        to_B = torch.where(nothing, values, to_B)
        to_A = torch.where(nothing, 1.0, to_A)
    B = left[:, :rank] * to_B
    A = to_A[:, None] * right[:rank]
    return B.to(matrix.dtype).contiguous(), A.to(matrix.dtype).contiguous()


def orthogonality(tensors: Payload) -> Tensor:
    """Return the sum over modules and clients of |A A^T - I|_F + |B^T B - I|_F, 0-d (AdaLoRA, equation 4)."""
    total = torch.zeros(())
    for parts in by_module(tensors).values():
        for gram in (parts["A"] @ parts["A"].mT, parts["B"].mT @ parts["B"]):
            total = total + (gram - torch.eye(gram.shape[-1]).to(gram)).norm(dim=(-2, -1)).sum().to(
                total
            )
    return total


def uniform(rank: int, width: int, seed: int, module: str) -> Tensor:
    """Return LoRA's random A, (rank, width): Kaiming uniform with a = sqrt(5), as in Hu et al.'s and peft's code."""
    bound = 1.0 / math.sqrt(width)
    return torch.rand(rank, width, generator=generator(seed, "lora", module)) * (2 * bound) - bound


def check_ranks(layers: Mapping[str, Tensor], rank: int, field: str = "method.rank") -> None:
    """Raise BadInput where ``rank`` is below 1 or above what an (out, in) layer of that size can hold."""
    for module, matrix in layers.items():
        if not 1 <= rank <= min(matrix.shape):
            raise BadInput(
                f"{field} = {rank}: layer {module!r} is {matrix.shape[0]} x {matrix.shape[1]}; "
                f"choose a rank from 1 to {min(matrix.shape)}"
            )
