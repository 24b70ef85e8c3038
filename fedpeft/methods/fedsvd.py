"""FedSVD: B is trained, and an SVD after every round renews A (Lee et al. 2025)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, Weighting
from fedpeft.algebra.lowrank import by_module, deltas
from fedpeft.algebra.svd import thin_svd
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets, detached, mounted, specs, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedSVD:
    """Train and average B alone, as FFA-LoRA does, and refactor the product after every round.

    A becomes the right singular vectors of B A: it adapts without ever being trained.
    """

    paper: ClassVar[str] = "FedSVD: Lee et al. 2025, arXiv 2505.12805"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method whose start this one has."""
        return LoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does: A random, B = 0."""
        return self.lora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the A that was sent, frozen, beside the B that is trained."""
        del memory, context
        frozen = {name: tensor for name, tensor in down.items() if name.endswith(":A")}
        moving = {name: tensor for name, tensor in down.items() if name not in frozen}
        trained = trainable(moving)  # B (K, out, r), head (K, ...)
        branches = trained | frozen
        difference = partial(deltas, branches, self.scale)
        with mounted(model, branches, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), {}), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect B and head back."""
        del state
        return {name: spec for name, spec in specs(down).items() if not name.endswith(":A")}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average B and head, and take the SVD of each product."""
        return self.mean_merge(state.round).receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means: the SVD is that of the mean."""
        del round_number
        return MeanMerge(self.weighting, lambda payload: payload, self._merge)

    def _merge(self, state: State, total: Mean) -> State:
        """Return the next state from the sums of B and head."""
        merged = total.result()
        shared = {**state.shared, **merged}
        for module, factors in by_module(merged).items():
            if factors["B"].any():  # nothing was learnt: the SVD of 0 has no directions
                B, A = _renewed(factors["B"], state.shared[f"{module}:A"])
                shared |= {f"{module}:B": B, f"{module}:A": A}
        return replace(state, round=state.round + 1, shared=shared)


def _renewed(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, A) with the same product: B A = U S V^T, B <- U S and A <- V^T."""
    # B A has no more than r singular values, so nothing is cut off.
    left, values, right = thin_svd(B, A)
    return (left * values).to(B.dtype).contiguous(), right.to(A.dtype).contiguous()
