"""raFLoRA: each rank is averaged over the clients that have it (Wu et al. 2026)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.lowrank import by_module
from fedpeft.algebra.products import ProductMean
from fedpeft.methods.flexlora import FlexLoRA
from fedpeft.mounting import Targets, plain_parameters
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


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
        terms: dict[str, list[ProductMean]] = {}  # module -> the mean of each rank's terms
        head = Mean()
        for update in updates:
            weight = weight_of(update, self.weighting)
            head.add(plain_parameters(update.payload), weight)
            for module, factors in by_module(update.payload).items():
                means = terms.setdefault(module, [])
                _add(means, factors["B"], factors["A"], weight)
        adapter: dict[str, Tensor] = {}
        for module, means in terms.items():
            B, A = ProductMean.total(means).best(self.rank)
            adapter |= {f"{module}:B": B, f"{module}:A": A}
        shared = {**state.shared, **adapter, **head.result()}
        return replace(state, round=state.round + 1, shared=shared)


def _add(means: list[ProductMean], B: Tensor, A: Tensor, weight: float) -> None:
    """Add a client's rank-one terms b_i a_i, each to the mean of its own rank."""
    for i in range(len(A)):
        if i == len(means):
            means.append(ProductMean(compress=True))
        # A mean divides by the weights that were added to it: those of clients with an i-th rank.
        means[i].add(B[:, i : i + 1], A[i : i + 1], weight)
