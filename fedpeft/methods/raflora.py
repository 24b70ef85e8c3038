"""raFLoRA: each rank is averaged over the clients that have it (Wu et al. 2026)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, Final, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.lowrank import by_module
from fedpeft.algebra.products import ProductMean
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.mounting import Targets, plain_parameters
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update

TOGETHER: Final = 32
"""Clients whose terms are sorted by rank at once."""


@final
@dataclass(frozen=True)
class RaFLoRA:
    """FlexLoRA whose higher ranks are no longer drowned by the clients that lack them.

    The i-th rank-one terms of the clients are averaged over those that have an i-th rank; the sum
    of these averages goes through the SVD.
    """

    paper: ClassVar[str] = "raFLoRA: Wu et al. 2026, arXiv 2602.13486"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of a client of full capacity; others have their capacity's share of it."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r, the same for all ranks."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    @cached_property
    def flexlora(self) -> FlexLoRA:
        """Return the method that this one is but for its merge."""
        return FlexLoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does: A random, B = 0."""
        return self.flexlora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send the first ranks of A and B, as many as the client can train, and the head."""
        return self.flexlora.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as LoRA does; all factors and the head are trained and go up."""
        return self.flexlora.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A and B of the client's rank and the head back."""
        return self.flexlora.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average rank by rank, and take the SVD of the sum."""
        layers: dict[str, _RankMeans] = {}  # by module
        head = Mean()
        for update in updates:
            weight = weight_of(update, self.weighting)
            head.add(plain_parameters(update.payload), weight)
            for module, factors in by_module(update.payload).items():
                layer = layers.setdefault(module, _RankMeans())
                layer.add(factors["B"], factors["A"], weight)
        adapter: dict[str, Tensor] = {}
        for module, layer in layers.items():
            B, A = layer.total().best(self.rank)
            adapter |= {f"{module}:B": B, f"{module}:A": A}
        shared = {**state.shared, **adapter, **head.result()}
        return replace(state, round=state.round + 1, shared=shared)


class _RankMeans:
    """The means of one layer's first, second, ... rank-one terms b_i a_i, each over its clients."""

    def __init__(self) -> None:
        self._means: list[ProductMean] = []
        # Clients whose terms are not yet in the means, by their rank: (B, A, weight) of each.
        self._waiting: dict[int, list[tuple[Tensor, Tensor, float]]] = {}

    def add(self, B: Tensor, A: Tensor, weight: float) -> None:
        """Add a client's terms: the columns of B, (out, r), times the rows of A, (r, in)."""
        same_rank = self._waiting.setdefault(len(A), [])
        same_rank.append((B, A, weight))
        if len(same_rank) == TOGETHER:
            self._sort(len(A))

    def total(self) -> ProductMean:
        """Return the sum of the means."""
        for rank in list(self._waiting):
            self._sort(rank)
        return ProductMean.total(self._means)

    def _sort(self, rank: int) -> None:
        """Add the terms of all waiting clients of one rank, each to the mean of its index."""
        lefts, rights, weights = zip(*self._waiting.pop(rank), strict=True)
        columns = torch.cat(lefts, dim=1).reshape(-1, len(lefts), rank)  # (out, n, r)
        rows = torch.stack(rights)  # (n, r, in)
        for i in range(rank):
            if i == len(self._means):
                self._means.append(ProductMean(compress=True))
            # A mean divides by the weights of what it holds: of the clients with an i-th rank.
            self._means[i].add_terms(columns[:, :, i], rows[:, i], weights)
