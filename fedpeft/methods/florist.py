"""FLoRIST: FLoRA's stack, cut where its singular values become small (Ramesh and Li 2025)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting
from fedpeft.algebra.increments import with_factors
from fedpeft.algebra.products import mean_products
from fedpeft.methods.flora import FLoRA
from fedpeft.mounting import Targets
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FLoRIST:
    """Add to every client's weights the largest components of the mean product.

    Each layer and round keeps as many as hold a share ``energy`` of the squares of all singular
    values. That they are added to the base, as in FLoRA, is a reconstruction.
    """

    paper: ClassVar[str] = "FLoRIST: Ramesh and Li 2025, arXiv 2506.09199"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of a client of full capacity."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r, the same for all ranks."""
    energy: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the squared singular values that is kept; the 0.9 of the official code's example. 1
    keeps all, as FLoRA does."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    @cached_property
    def flora(self) -> FLoRA:
        """Return the method that each client runs."""
        return FLoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start from the head alone; nothing has been added to the base."""
        return self.flora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send the client's rank, the head, and the components that it has not added yet."""
        return self.flora.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount the total that the client keeps beside a fresh adapter, as FLoRA does."""
        return self.flora.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect a head, and A and B of the client's rank."""
        return self.flora.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the head; take the SVD of every layer's mean product and cut it."""
        products, others = mean_products(updates, self.weighting, compress=True)
        if not products:
            return replace(state, round=state.round + 1)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for module, product in products.items():
            left, values, right = product.components(self.energy)
            factors[module] = (left * values).float().contiguous(), right.float().contiguous()
        server = with_factors(state, factors)
        shared = {**state.shared, **others}
        return replace(state, round=state.round + 1, shared=shared, server=server)
