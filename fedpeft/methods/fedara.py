"""FedARA: W + B E A whose ranks are allocated and pruned by the clients' votes (Wu et al. 2025)."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, Weighting
from fedpeft.algebra.importance import (
    Importance,
    Score,
    counted,
    cubic_budget,
    rank_norms,
    survivors,
)
from fedpeft.algebra.lowrank import by_module, check_ranks, deltas, orthogonality, orthonormal
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.seeds import generator
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedARA:
    """Adapters B diag(e) A; clients score their ranks and vote, and dead ranks leave for good.

    The form W + B E A and its three ideas are the paper's; every number and the scoring are a
    reconstruction after AdaLoRA's code. A client without any score, as after one step from e = 0,
    abstains.
    """

    paper: ClassVar[str] = "FedARA: Wu et al. 2025, arXiv 2501.14406"
    rounds: Annotated[int, Ge(1)] = 20
    """Rounds of the whole run; where it is left out, `federation.rounds`."""
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings.
    Reconstruction."""
    rank: Annotated[int, Ge(1)] = 12
    """Rank r of every adapter at the start; reconstruction."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B E A is multiplied by: alpha / r, kept when ranks drop; reconstruction."""
    kept: Annotated[float, Gt(0), Le(1)] = 0.25
    """Share of all ranks alive at the end; reconstruction."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of the rounds before the cubic decay of the number of ranks; reconstruction."""
    settled: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the rounds after the cubic decay; reconstruction."""
    threshold: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the votes that keeps a rank; reconstruction."""
    score: Score = "sensitivity"
    """What ranks are scored by: AdaLoRA's smoothed sensitivity, plain gradient |p * grad|, or
    magnitude |p|. Reconstruction."""
    beta1: Annotated[float, Ge(0), Le(1)] = 0.85
    """Smoothing of the sensitivity over steps; reconstruction, AdaLoRA's 0.85."""
    beta2: Annotated[float, Ge(0), Le(1)] = 0.85
    """Smoothing of its uncertainty over steps; reconstruction, AdaLoRA's 0.85."""
    deviation: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the normal draw of A and B; reconstruction."""
    orthogonality: Annotated[float, Ge(0)] = 0.0
    """Weight in the loss of |A A^T - I| + |B^T B - I|; reconstruction."""
    weighting: Weighting = "examples"
    """How clients' factors and votes are averaged: by their examples, or all alike.
    Reconstruction."""
    start: Literal["normal", "orthogonal"] = "normal"
    """How A and B are drawn: from N(0, deviation^2), or with orthonormal rows and columns, which
    AdaLoRA's penalty aims at. Both a reconstruction."""

    def init(self, base: Base, seed: int) -> State:
        """Draw A and B, from N(0, deviation^2) by default, and set e to 0; all ranks are alive.

        So the model starts unchanged.
        """
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        start: dict[str, Tensor] = {}
        alive: dict[str, Tensor] = {}  # the global masks M of the ranks, (r,) each
        for name, weight in layers.items():
            out, width = weight.shape
            draw = generator(seed, "fedara", name)
            if self.start == "normal":
                A = self.deviation * torch.randn(self.rank, width, generator=draw)
                B = self.deviation * torch.randn(out, self.rank, generator=draw)
            else:
                A = orthonormal(self.rank, width, seed, f"{name}:A")
                B = orthonormal(self.rank, out, seed, f"{name}:B").T.contiguous()
            start |= {f"{name}:A": A, f"{name}:B": B}
            # E = diag(e) = 0: the first gradient moves only e, in a random subspace that all share.
            start[f"{name}:e"] = torch.zeros(self.rank)
            alive[f"{name}:alive"] = torch.ones(self.rank, dtype=torch.bool)
        return State(0, start | base.heads(), server=alive)

    def budget(self, round_number: int, total: int) -> int:
        """Return how many of ``total`` ranks may live after round ``round_number``.

        >>> method = FedARA(rounds=10, warmup=0.2, settled=0.3, kept=0.25)
        >>> [method.budget(round_number, total=100) for round_number in (0, 1, 4, 6, 9)]
        [100, 100, 30, 25, 25]
        """
        return cubic_budget(
            round_number + 1,
            total,
            rounds=self.rounds,
            kept=self.kept,
            warmup=self.warmup,
            settled=self.settled,
        )

    def send(self, state: State, client: Client) -> Payload:
        """Send the live triplets of every module that has any, the head, and the budget.

        The budget is how many ranks the client may vote for.
        """
        del client
        # The budget depends on b_0, which a client that sees only live ranks cannot know.
        sent = {"budget": torch.tensor(self.budget(state.round, _total(state)))}
        for name in state.shared:
            live = _take(state, name)
            if live.numel():  # module pruning: one whose ranks are all dead is not even mounted
                sent[name] = live
        return sent

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount a branch on every module that is alive; score its ranks as they train, and vote."""
        del memory
        tensors = dict(down)
        budget = int(tensors.pop("budget").max())  # (K,), the same for all clients
        trained = trainable(tensors)  # live ranks: A (K, r, in), B (K, out, r), e (K, r); head
        importance = Importance(trained, len(context.clients), self.score, self.beta1, self.beta2)

        def after_backward(active: slice) -> None:
            if self.orthogonality > 0 and by_module(trained):
                # AdaLoRA, equation 4, its gradient added to that of the loss.
                torch.autograd.backward(self.orthogonality * orthogonality(trained))
            # Scores are of the gradient as it is here, before it is clipped.
            importance.update(active)

        def reply() -> tuple[Payload, Payload]:
            votes = importance.votes(budget)  # (K, ceil(n / 8)) bytes for n live ranks
            return {**detached(trained), "votes": votes}, {}

        difference = partial(deltas, trained, self.scale)
        # W x + scale * B diag(e) A x. The scale stays alpha / r_0 however many ranks have died.
        with mounted(model, trained, self.scale):
            yield LocalTask(trained, reply, difference, after_backward)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect the live triplets and the head back, and one bit per live rank, 8 to a byte."""
        expected = specs(down)
        del expected["budget"]
        ballot_bytes = math.ceil(_count(state) / 8)
        expected["votes"] = torch.empty(ballot_bytes, dtype=torch.uint8, device="meta")
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the live triplets and the head, and count the votes.

        A rank dies when too few clients voted for it, and stays dead.
        """
        return self.mean_merge(state.round).receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means: shares of votes are means, too."""
        del round_number
        return MeanMerge(self.weighting, _contribution, self._merge)

    def _merge(self, state: State, total: Mean) -> State:
        """Return the next state from the sums of what ``_contribution`` takes from each reply."""
        means, sums = total.result(), total.sums()
        if not means:
            return replace(state, round=state.round + 1)
        # 1. B, e and A are averaged, each by itself.
        shared: dict[str, Tensor] = {}
        for name in state.shared:
            shared[name] = _put(state, name, means.get(name))
        # 2. Arbitrate the masks: a rank lives on with enough votes, v_i = sum_k p_k m_ki, as far as
        # the budget goes.
        budget = self.budget(state.round, _total(state))
        survives = survivors(sums, _norms(means), self.threshold, budget)
        # 3. Masks are monotone: only live ranks were voted on, so none comes back to life.
        server = _with_survivors(state, survives)
        return replace(state, round=state.round + 1, shared=shared, server=server)


def _contribution(payload: Payload) -> Payload:
    """Return what is averaged of a reply: its triplets, its head, and its ballot as numbers."""
    contribution = dict(payload)
    ballot = contribution.pop("votes")
    ranks = 0
    for factors in by_module(contribution).values():
        ranks += len(factors["e"])
    return {**contribution, **counted(ballot, ranks)}


def _total(state: State) -> int:
    """Return the number of ranks over all modules, alive or not."""
    return sum(len(alive) for alive in state.server.values())


def _count(state: State) -> int:
    """Return the number of live ranks over all modules."""
    count = 0
    for alive in state.server.values():
        count += int(alive.sum())
    return count


def _norms(means: Payload) -> Tensor:
    """Return the norms of all live rank-one terms, (n,), modules in alphabetical order."""
    norms = [torch.zeros(0)]  # all there is to concatenate where every module is dead
    for _, factors in sorted(by_module(means).items()):
        norms.append(rank_norms(factors))
    return torch.cat(norms)


def _with_survivors(state: State, survives: Tensor) -> dict[str, Tensor]:
    """Return the masks after a vote.

    ``survives``, (n,): which of the live ranks live on, in the order of ballots.
    """
    masks = dict(state.server)
    begin = 0
    # Ballots hold the modules in alphabetical order, and of each the live ranks in their own order.
    for name in sorted(masks, key=_module):
        alive = masks[name]
        end = begin + int(alive.sum())
        masks[name] = alive.masked_scatter(alive, survives[begin:end])
        begin = end
    return masks


def _module(name: str) -> str:
    """``encoder.query:A`` -> ``encoder.query``."""
    return name.partition(":")[0]


def _alive(state: State, name: str) -> Tensor | slice:
    """Return the index of what lives along the rank axis of a tensor; of the head all does."""
    everything = slice(None)
    if ":" not in name:
        return everything
    return state.server.get(f"{_module(name)}:alive", everything)


def _take(state: State, name: str) -> Tensor:
    """Return what lives of a shared tensor."""
    # The rank is the last axis of B, (out, r), and the first of A, (r, in), and e, (r,).
    alive, tensor = _alive(state, name), state.shared[name]
    return tensor[:, alive] if name.endswith(":B") else tensor[alive]


def _put(state: State, name: str, live: Tensor | None) -> Tensor:
    """Return a shared tensor with ``live`` in the place of what lives.

    Without any it is returned as it is; dead ranks keep the values with which they died.
    """
    if live is None:
        return state.shared[name]
    alive, tensor = _alive(state, name), state.shared[name].clone()
    if name.endswith(":B"):
        tensor[:, alive] = live
    else:
        tensor[alive] = live
    return tensor
