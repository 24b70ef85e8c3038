"""FFA-LoRA: A is random, the same everywhere and never sent; B is trained (Sun et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import by_module, check_ranks, deltas, uniform
from fedpeft.mounting import Targets, dense_shape, detached, mounted, select, specs, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FFALoRA:
    """Train and average B alone.

    The mean of the B_k A is exactly mean(B) A, and half of LoRA's bytes travel.
    """

    paper: ClassVar[str] = "FFA-LoRA: Sun et al. 2024, arXiv 2403.12313"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from B = 0, (out, r), so that the model is unchanged; A is no part of the state."""
        del seed  # it is in the context of ``mount``, too: clients draw A from it themselves
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        B: dict[str, Tensor] = {}
        for name, weight in layers.items():
            out = weight.shape[0]
            B[f"{name}:B"] = weight.new_zeros(out, self.rank)
        return State(0, B | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send B and head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Redraw every A from the seed and mount it, frozen, beside the B that is trained."""
        del memory
        trained = trainable(down)  # B (K, out, r), head (K, ...)
        drawn: dict[str, Tensor] = {}
        for name, factors in by_module(down).items():
            B = factors["B"]
            clients, _, rank = B.shape
            width = dense_shape(model, name)[1]
            # The draw depends on the seed and the layer alone: every client has the same A_0.
            A = uniform(rank, width, context.seed, name).to(B)  # (r, in)
            drawn[f"{name}:A"] = A.expand(clients, -1, -1)  # (K, r, in), without a copy
        branches = trained | drawn
        difference = partial(deltas, branches, self.scale)
        # h = W_0 x + scale * B A_0 x; the gradient goes to B alone, as A_0 is no parameter.
        with mounted(model, branches, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), {}), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect B and head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average B and head."""
        # Exact: sum_k p_k (B_k A_0) = (sum_k p_k B_k) A_0, as all clients share A_0.
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)
