"""FlexLoRA: the mean of the clients' products, cut to each one's rank (Bai et al. 2024)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting
from fedpeft.algebra.products import mean_products
from fedpeft.algebra.ranks import cut, share_of
from fedpeft.errors import BadInput
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.lora import LoRA
from fedpeft.methods.starts import Start, begun
from fedpeft.mounting import Targets
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FlexLoRA:
    """Average the products B A of clients of any rank and send each the best part of its own rank.

    A client's rank is its capacity's share of ``rank``. Up to the cut to ``rank`` the average is
    exact.
    """

    paper: ClassVar[str] = "FlexLoRA: Bai et al. 2024, arXiv 2402.11505"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of a client of full capacity."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r, the same for all ranks. Reconstruction: the official
    code has alpha / r_k."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    start: Start = "random"
    """Where A and B start: LoRA's `random` A and B = 0, an `orthogonal` A, or FeDeRA's `principal`
    components of the pre-trained weights, with the residual as base. Beside `random` a
    reconstruction."""

    @cached_property
    def single(self) -> LoRA | FeDeRA:
        """Return the method that each client runs at its own rank."""
        return begun(self.start, self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does, A random and B = 0, or as ``start`` says."""
        return self.single.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send the first ranks of A and B, as many as the client can train, and the head.

        A residual base lacks all components, so that from ``start`` = principal every client needs
        all ranks: a lower capacity raises BadInput.
        """
        rank = share_of(client, self.rank)
        if self.start == "principal" and rank < self.rank:
            raise BadInput(
                f"method.start = 'principal': client {client.id} has capacity {client.capacity}, "
                "but on the residual base every client needs all ranks; choose 'random'"
            )
        # After an SVD the first ranks are the largest components.
        return cut(self.single.send(state, client), rank)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount both factors, which are trained and go up with the head."""
        return self.single.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A and B of the client's rank and the head back."""
        return self.single.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the products and the head, and take the SVD of each product."""
        products, others = mean_products(updates, self.weighting, compress=True)
        factors: dict[str, Tensor] = {}
        for module, product in products.items():
            # dW / s = sum_k p_k B_k A_k = U S V^T; B = U_r S_r and A = V_r^T. One scale for all
            # ranks, so it plays no part in the decomposition.
            B, A = product.best(self.rank)
            factors |= {f"{module}:B": B, f"{module}:A": A}
        shared = {**state.shared, **factors, **others}
        return replace(state, round=state.round + 1, shared=shared)
