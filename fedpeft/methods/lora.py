"""LoRA with separately averaged factors (Hu et al. 2021).

Federated as FedIT, also called FedLoRA (Zhang et al. 2023).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import Drawn, check_ranks, deltas, drawn
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class LoRA:
    """Train B and A of W + scale * B A and average each of them.

    The average is inexact, as mean(B) mean(A) is not mean(B A).
    """

    paper: ClassVar[str] = (
        "LoRA: Hu et al. 2021, arXiv 2106.09685; FedIT: Zhang et al. 2023, arXiv 2305.05644"
    )
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""
    start: Drawn = "random"
    """How A is drawn: LoRA's uniform numbers, or `orthogonal` rows of norm 1 (reconstruction). The
    start from the pre-trained weights' principal components is the method `federa`."""

    def init(self, base: Base, seed: int) -> State:
        """Draw A, (r, in), from the seed; B, (out, r), is 0, so the model starts unchanged."""
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        A: dict[str, Tensor] = {}
        B: dict[str, Tensor] = {}
        for name, weight in layers.items():
            out, width = weight.shape
            # With both at 0 neither would have a gradient; with B = 0 alone, B has one.
            A[f"{name}:A"] = drawn(self.start, self.rank, width, seed, name)  # (r, in)
            B[f"{name}:B"] = weight.new_zeros(out, self.rank)  # (out, r)
        return State(0, A | B | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount a branch on every module that has factors.

        All factors and the head are trained and go up.
        """
        del memory, context
        trained = trainable(down)  # A (K, r, in), B (K, out, r), head (K, ...)
        difference = partial(deltas, trained, self.scale)
        # Hu et al., equation 3: h = W_0 x + scale * B A x, and W_0 is frozen.
        with mounted(model, trained, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), {}), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, each by itself."""
        # FedIT is FedAvg of the factors: A <- sum_k p_k A_k and B <- sum_k p_k B_k. The product of
        # these means is not sum_k p_k B_k A_k; that error is the method's own.
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)
