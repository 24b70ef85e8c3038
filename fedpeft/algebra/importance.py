"""How much each rank of a B diag(e) A adapter matters to a client.

Source: AdaLoRA's smoothed sensitivity (Zhang et al. 2023).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedpeft.algebra.lowrank import by_module
from fedpeft.errors import WireError
from fedpeft.types import Payload

Score = Literal["sensitivity", "gradient", "magnitude"]
"""How a single entry p of a factor is scored.

``sensitivity``: smoothed |p * grad| times its smoothed uncertainty. ``gradient``: smoothed
|p * grad| alone. ``magnitude``: |p|.
"""


def cubic_budget(
    rounds_done: int, total: int, *, rounds: int, kept: float, warmup: float, settled: float
) -> int:
    """Return how many of ``total`` ranks may live after so many of ``rounds``.

    AdaLoRA's cubic schedule, in rounds: all of them until ``begin`` (a share ``warmup`` of the
    rounds), a share ``kept`` of them from ``end`` on (a share ``settled`` before the last). In
    between, after t rounds,

        last + (total - last) * (1 - (t - begin) / (end - begin))^3

    >>> shares = {"kept": 0.25, "warmup": 0.2, "settled": 0.3}
    >>> [cubic_budget(done, 100, rounds=10, **shares) for done in (1, 2, 5, 7, 10)]
    [100, 100, 30, 25, 25]
    """
    # In AdaLoRA's letters: begin = t_i, end = T - t_f, last = b_T, total = b_0.
    begin = warmup * rounds
    end = (1 - settled) * rounds
    last = max(1, round(kept * total))
    if end > begin:
        decayed = (rounds_done - begin) / (end - begin)
        left = min(1.0, max(0.0, 1 - decayed))
    else:  # nothing between the two: one cut
        left = 1.0 if rounds_done < begin else 0.0
    return last + round((total - last) * left**3)


class Importance:
    """Scores of the rank-one terms (triplets) of every module, kept per client.

    ``trained``: ``<module>:A`` (K, r, in), ``:B`` (K, out, r) and ``:e`` (K, r); names without a
    colon, those of the head, are passed over. ``clients``: K. It is told because it cannot be read
    off a tensor once every module has lost all of its ranks. A module that has not just these three
    raises WireError.
    """

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        clients: int,
        score: Score,
        beta1: float,
        beta2: float,
    ) -> None:
        self._clients = clients
        self._score, self._beta1, self._beta2 = score, beta1, beta2
        self._tensors: dict[str, Tensor] = {}
        self._smooth: dict[str, Tensor] = {}  # running mean of |p * grad|
        self._spread: dict[str, Tensor] = {}  # running mean of its distance from that mean
        for name, factors in by_module(trained).items():
            if factors.keys() != {"A", "B", "e"}:
                parts = ", ".join(sorted(factors))
                raise WireError(f"the triplets of {name!r} are {parts}, and not A, B, e")
        for name, tensor in trained.items():
            if ":" in name:
                self._tensors[name] = tensor
                self._smooth[name] = torch.zeros_like(tensor)
                self._spread[name] = torch.zeros_like(tensor)

    @torch.no_grad()
    def update(self, active: slice) -> None:
        """Take in the gradients of one backward pass, for the ``active`` clients."""
        for name, tensor in self._tensors.items():
            if tensor.grad is None:
                continue
            # Clients that have done all their steps are not ``active``: their rows stay.
            now = (tensor[active] * tensor.grad[active]).abs()
            # Views of the active rows, so the in-place updates below reach the stored means.
            smooth, spread = self._smooth[name][active], self._spread[name][active]
            # lerp_(now, 1 - beta) is beta * mean + (1 - beta) * now.
            smooth.lerp_(now, 1 - self._beta1)
            spread.lerp_((now - smooth).abs(), 1 - self._beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Return S_i = I(e_i) + mean_j I(b_ji) + mean_j I(a_ij) of every rank, (K, n).

        n counts the ranks of all modules, in alphabetical order of the modules.
        """
        groups = by_module({name: self._entry_scores(name) for name in self._tensors})
        scores_by_module: list[Tensor] = []
        # Ballots follow this order, and the server counts them in the same one.
        for _, scores in sorted(groups.items()):
            # e (K, r), B (K, out, r) over out, A (K, r, in) over in.
            scores_by_module.append(scores["e"] + scores["B"].mean(1) + scores["A"].mean(2))
        return torch.cat(scores_by_module, dim=1)

    def votes(self, budget: int) -> Tensor:
        """Return each client's ballot: its ``budget`` highest ranks over all modules.

        A ballot is a mask of the n ranks, 8 to a byte, so the result is (K, ceil(n / 8)) uint8.

        A rank whose score is 0 is not known to matter and gets no vote, unless the budget covers
        all ranks. A client all of whose scores are 0, as after a first step from e = 0, has no
        opinion. It abstains by a ballot with every bit set (see ``counted``).
        """
        if not self._tensors:
            return torch.zeros(self._clients, 0, dtype=torch.uint8)
        scores = self.scores()  # (K, n)
        ranks = scores.shape[1]
        best = scores.topk(min(budget, ranks), dim=1).indices  # (K, budget)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, value=True)
        if budget < ranks:
            chosen &= scores > 0
            abstains = ~chosen.any(dim=1, keepdim=True)
            chosen |= abstains
        return pack(chosen)

    def _entry_scores(self, name: str) -> Tensor:
        """Return the score of every entry of one factor, in the factor's shape."""
        match self._score:
            case "sensitivity":
                return self._smooth[name] * self._spread[name]
            case "gradient":
                return self._smooth[name]
            case "magnitude":
                return self._tensors[name].abs()


# The value of each place in a byte, highest first: numpy.packbits' order.
_BITS = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """Return a (..., n) mask as (..., ceil(n / 8)) bytes, first rank in the highest bit."""
    # Padded with zeros to whole bytes; ``unpack`` cuts them off again.
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    octets = padded.view(*mask.shape[:-1], -1, 8)  # (..., ceil(n / 8), 8)
    return (octets * _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int) -> Tensor:
    """Return the (count,) mask that ``pack`` turned into ``packed``."""
    bits = (packed.unsqueeze(-1) & _BITS) != 0  # (ceil(n / 8), 8)
    return bits.flatten()[:count]


def counted(ballot: Tensor, ranks: int) -> dict[str, Tensor]:
    """Return one client's packed ``ballot`` over so many ``ranks`` as numbers that can be summed.

    ``votes``, (ranks,): 1 for a rank that it wants. ``voters``, (): 1. A ballot with every bit set
    is an abstention, since it prefers no rank to another: it counts 0 everywhere, so that shares
    are shares of the clients that have an opinion.
    """
    choice = unpack(ballot, ranks)
    has_opinion = (~choice.all()).to(torch.float64)
    return {"votes": choice * has_opinion, "voters": has_opinion}


def survivors(sums: Payload, rank_norms: Tensor, threshold: float, budget: int) -> Tensor:
    """Return which ranks live on, (ranks,), by ``select_ranks``.

    ``sums``: the weighted sums of what ``counted`` returned for every client. Where every client
    abstained, the ``budget`` ranks with the largest ``rank_norms`` live on. Where these norms are
    all 0, too, nothing has been learnt yet, and all ranks live on.
    """
    if sums["voters"] > 0:
        # The mean of 0s and 1s is the weighted share of voters that want the rank.
        shares = sums["votes"] / sums["voters"]
        return select_ranks(shares, rank_norms, threshold, budget)
    if rank_norms.any():
        # Equal votes for all ranks leave the choice to the norms.
        return select_ranks(torch.ones_like(rank_norms), rank_norms, threshold, budget)
    return torch.ones_like(rank_norms, dtype=torch.bool)


def select_ranks(votes: Tensor, rank_norms: Tensor, threshold: float, budget: int) -> Tensor:
    """Return which of n ranks live on: those of enough votes, and at most ``budget`` of them.

    ``votes``: weighted share of clients for each rank, (n,); at least ``threshold`` is enough. If
    more than ``budget`` ranks remain, the most votes win. Ties go to the larger ``rank_norms``,
    (n,), then to the earlier rank.
    """
    # Two stable sorts, the second criterion first: by votes, ties by norm, then by position.
    order = torch.argsort(rank_norms, descending=True, stable=True)
    order = order[torch.argsort(votes[order], descending=True, stable=True)][:budget]
    alive = torch.zeros_like(votes, dtype=torch.bool)
    alive[order] = votes[order] >= threshold
    return alive


def rank_norms(parts: Payload) -> Tensor:
    """Return the norm of every rank-one term e_i b_i a_i of one module, (r,)."""
    # |e b a^T|_F = |e| |b| |a|; A is (r, in), B is (out, r), e is (r,).
    rows: Tensor = torch.linalg.vector_norm(parts["A"], dim=1)
    columns: Tensor = torch.linalg.vector_norm(parts["B"], dim=0)
    return parts["e"].abs() * rows * columns
