"""What mounted branches add to the base, as matrices and factors: what merge and export read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fedpeft.algebra.lowrank import LowRank, by_module
from fedpeft.types import Delta, Payload


@final
@dataclass(frozen=True)
class Dense:
    """A difference scale * D of no low rank, stacked over K clients.

    ``difference``: D, (K, out, in).
    """

    difference: Tensor
    scale: float

    def dense(self) -> Tensor:
        """Return the (K, out, in) difference."""
        return (self.scale * self.difference).detach()

    def factors(self) -> None:
        """Return None: a dense difference has no factors of low rank."""
        return


@final
@dataclass(frozen=True)
class Total:
    """The sum of several differences to one layer.

    One that all clients share may be a stack of one.
    """

    deltas: Sequence[Delta]

    def dense(self) -> Tensor:
        """Return the (K, out, in) difference."""
        total = self.deltas[0].dense()
        # Broadcast, not added in place: the first may be a stack of one, and the next one of K.
        for delta in self.deltas[1:]:
            total = total + delta.dense()
        return total

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return the (B, A) of all side by side, (K, out, r) and (K, r, in).

        Here r is the sum of the ranks. None where a difference has no factors.
        """
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for delta in self.deltas:
            pair = delta.factors()
            if pair is None:
                return None
            lefts.append(pair[0])
            rights.append(pair[1])
        clients = max(len(left) for left in lefts)
        # [B_1, B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2: the sum of products is one product.
        B = torch.cat([left.expand(clients, -1, -1) for left in lefts], dim=2)
        A = torch.cat([right.expand(clients, -1, -1) for right in rights], dim=1)
        return B, A


def mounted_deltas(tensors: Payload, scale: float) -> dict[str, Delta]:
    """Return what ``mounted(model, tensors, scale)`` adds to each dense layer's matrix, by module.

    A branch without a client axis is the same for all clients, and becomes a stack of one.

    >>> [delta] = mounted_deltas({"query:dense": torch.ones(1, 2, 3)}, scale=0.5).values()
    >>> delta.dense()
    tensor([[[0.5000, 0.5000, 0.5000],
             [0.5000, 0.5000, 0.5000]]])
    """
    deltas: dict[str, Delta] = {}
    for module, factors in by_module(tensors).items():
        added: list[Delta] = []
        if "A" in factors:
            A, B = _stacked(factors["A"], 2), _stacked(factors["B"], 2)
            e = _stacked(factors["e"], 1) if "e" in factors else None
            H = _stacked(factors["H"], 3) if "H" in factors else None
            s = _stacked(factors["s"], 1) if "s" in factors else None
            added.append(LowRank(A, B, scale, e, H, s))
        if "dense" in factors:
            added.append(Dense(_stacked(factors["dense"], 2), scale))
        deltas[module] = added[0] if len(added) == 1 else Total(added)
    return deltas


def summed(stacks: Sequence[Payload], scale: float) -> dict[str, Delta]:
    """Return what several stacks of branches, mounted one beside the other, add by module.

    >>> branch = {"query:A": torch.ones(1, 1, 2), "query:B": torch.ones(1, 1, 1)}
    >>> summed([branch, branch], scale=0.5)["query"].dense()
    tensor([[[1., 1.]]])
    """
    added: dict[str, list[Delta]] = {}
    for stack in stacks:
        for module, delta in mounted_deltas(stack, scale).items():
            added.setdefault(module, []).append(delta)
    total: dict[str, Delta] = {}
    for module, deltas in added.items():
        total[module] = deltas[0] if len(deltas) == 1 else Total(deltas)
    return total


def _stacked(tensor: Tensor, axes: int) -> Tensor:
    """Return a tensor with its client axis; one that has only ``axes`` axes has none yet."""
    return tensor.unsqueeze(0) if tensor.ndim == axes else tensor
