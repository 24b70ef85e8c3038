"""How much each rank of a B diag(e) A adapter matters to a client: AdaLoRA's smoothed sensitivity (Zhang et al. 2023)."""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from fedpeft.algebra.averaging import Mean
from fedpeft.algebra.lowrank import by_module
from fedpeft.types import Payload

Score = Literal["sensitivity", "gradient", "magnitude"]
"""``sensitivity``: smoothed |p * grad| times its smoothed uncertainty; ``gradient``: the first alone; ``magnitude``: |p|."""


class Importance:
    """Scores of the triplets in ``trained`` (``<module>:A`` (K, r, in), ``:B`` (K, out, r), ``:e`` (K, r)), kept per client.

    ``clients``: K, of which no tensor tells where all modules are dead and there is no head.
    """

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        clients: int,
        score: Score,
        beta1: float,
        beta2: float,
    ) -> None:
        self._tensors = {name: tensor for name, tensor in trained.items() if ":" in name}
        self._clients = clients
        self._score, self._beta1, self._beta2 = score, beta1, beta2
        self._smooth = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        self._spread = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self, active: slice) -> None:
        """Take in the gradients of one backward pass, for the ``active`` clients."""
        for name, tensor in self._tensors.items():
            if tensor.grad is None:
                continue
            now = (tensor[active] * tensor.grad[active]).abs()
            smooth, spread = self._smooth[name][active], self._spread[name][active]
            smooth.lerp_(now, 1 - self._beta1)
            spread.lerp_((now - smooth).abs(), 1 - self._beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Return S_i = I(e_i) + mean_j I(b_ji) + mean_j I(a_ij) of every rank, (K, n), modules in alphabetical order."""
        parts = {name: self._of(name) for name in self._tensors}
        groups = by_module(parts)
        return torch.cat(
            [g["e"] + g["B"].mean(1) + g["A"].mean(2) for _, g in sorted(groups.items())], dim=1
        )

    def votes(self, budget: int) -> Tensor:
        """Return each client's mask of its ``budget`` highest ranks over all modules, 8 to a byte, (K, ceil(n / 8)) uint8.

        A rank that scores 0 is not known to matter and gets no vote, unless all ranks may live. A
        client of which no rank scores, as after a first step from e = 0, has no opinion: it
        abstains, which a ballot with every bit set says (see ``Tally``).
        """
        if not self._tensors:
            return torch.zeros(self._clients, 0, dtype=torch.uint8)
        scores = self.scores()
        ranks = scores.shape[1]
        best = scores.topk(min(budget, ranks), dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, value=True)
        if budget < ranks:
            chosen &= scores > 0
            abstains = ~chosen.any(dim=1, keepdim=True)
            chosen |= abstains
        return pack(chosen)

    def _of(self, name: str) -> Tensor:
        match self._score:
            case "sensitivity":
                return self._smooth[name] * self._spread[name]
            case "gradient":
                return self._smooth[name]
            case "magnitude":
                return self._tensors[name].abs()


_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """Return a (..., n) mask as (..., ceil(n / 8)) bytes, first rank in the highest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    return (padded.view(*mask.shape[:-1], -1, 8) * _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return the (count,) mask that ``pack`` turned into ``packed``."""
    return ((packed.unsqueeze(-1) & _BITS) != 0).flatten()[:count]


@final
class Tally:
    """The ballots of one round over ``ranks`` ranks, counted one by one.

    A ballot with every bit set abstains and does not count: it tells no rank from another. So a
    vote's share is one of those clients that have an opinion.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._votes = Mean()

    def add(self, ballot: Tensor, weight: float) -> None:
        """Count one client's packed ``ballot`` with its ``weight``."""
        choice = unpack(ballot, self._ranks)
        if not choice.all():
            self._votes.add({"share": choice.to(torch.float64)}, weight)

    def select_ranks(self, rank_norms: Tensor, threshold: float, budget: int) -> Tensor:
        """Return which ranks live on, (ranks,), by the function ``select_ranks`` below.

        Where all abstained the strongest ``budget`` ranks do, and where none has any rank_norms, as
        nothing was learnt yet, all do: nothing tells them apart.
        """
        votes = self._votes.result()
        if votes:
            return select_ranks(votes["share"], rank_norms, threshold, budget)
        if rank_norms.any():
            return select_ranks(torch.ones_like(rank_norms), rank_norms, threshold, budget)
        return torch.ones_like(rank_norms, dtype=torch.bool)


def select_ranks(votes: Tensor, rank_norms: Tensor, threshold: float, budget: int) -> Tensor:
    """Return which of n ranks live on: those voted for by at least ``threshold``, at most ``budget`` of them.

    ``votes``: weighted share of clients for each rank, (n,). If too many remain, the most votes
    win; ties go to the larger ``rank_norms``, (n,), then to the earlier rank.
    """
    order = torch.argsort(rank_norms, descending=True, stable=True)
    order = order[torch.argsort(votes[order], descending=True, stable=True)][:budget]
    alive = torch.zeros_like(votes, dtype=torch.bool)
    alive[order] = votes[order] >= threshold
    return alive


def rank_norms(parts: Payload) -> Tensor:
    """Return the norm of every rank-one term e_i b_i a_i of one module, (r,)."""
    rows: Tensor = torch.linalg.vector_norm(parts["A"], dim=1)
    columns: Tensor = torch.linalg.vector_norm(parts["B"], dim=0)
    return parts["e"].abs() * rows * columns
