"""LoRA with separately averaged factors (Hu et al. 2021; federated as FedIT / FedLoRA, Zhang et al. 2023)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import nn

from fedpeft.algebra.averaging import Weighting, averaged
from fedpeft.algebra.lowrank import check_ranks, deltas, uniform
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

    def init(self, base: Base, seed: int) -> State:
        """Draw A, (r, in), from the seed; B, (out, r), is 0, so the model starts unchanged."""
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        A = {
            f"{name}:A": uniform(self.rank, weight.shape[1], seed, name)
            for name, weight in layers.items()
        }
        B = {
            f"{name}:B": weight.new_zeros(weight.shape[0], self.rank)
            for name, weight in layers.items()
        }
        return State(0, A | B | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount a branch on every module that has factors; all factors and the head are trained and go up."""
        del memory, context
        trained = trainable(down)
        with mounted(model, trained, self.scale):
            yield LocalTask(
                trained, lambda: (detached(trained), {}), partial(deltas, trained, self.scale)
            )

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, each by itself."""
        return averaged(state, updates, self.weighting)
