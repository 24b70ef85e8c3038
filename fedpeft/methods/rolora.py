"""RoLoRA: B and A are trained in turn, round by round (Chen et al. 2025)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.choice import turn
from fedpeft.methods.federa import FeDeRA
from fedpeft.methods.lora import LoRA
from fedpeft.methods.starts import Start, begun
from fedpeft.mounting import Targets
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class RoLoRA:
    """Train and average B in one round and A in the next.

    All clients share the factor that rests, so every average is exact.
    """

    paper: ClassVar[str] = "RoLoRA: Chen et al. 2025, arXiv 2502.01755"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    start: Start = "random"
    """Where A and B start: LoRA's `random` A and B = 0, an `orthogonal` A, or FeDeRA's `principal`
    components of the pre-trained weights, with the residual as base. Beside `random` a
    reconstruction."""

    @cached_property
    def both(self) -> LoRA | FeDeRA:
        """Return the method that trains both factors at once."""
        return begun(self.start, self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does, A random and B = 0, or as ``start`` says."""
        return self.both.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head: the factor that rests has changed in the round before."""
        return self.both.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount both factors; that of this round and the head are trained and go up."""
        with self.both.mount(model, down, memory, context) as task:
            moving: dict[str, nn.Parameter] = {}
            _, resting = turn(context.round)
            for name, parameter in task.trainable.items():
                if name.endswith(f":{resting}"):
                    parameter.requires_grad_(False)
                else:
                    moving[name] = parameter

            def reply() -> tuple[Payload, Payload]:
                trained, stays = task.reply()
                return {name: trained[name] for name in moving}, stays

            yield replace(task, trainable=moving, reply=reply)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect this round's factor and the head back."""
        expected = dict(self.both.expects(state, down))
        _, resting = turn(state.round)
        for name in down:
            if name.endswith(f":{resting}"):
                del expected[name]
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average what was trained; the other factor stays."""
        # Exact: sum_k p_k (B_k A) = (sum_k p_k B_k) A, and likewise for A with B at rest.
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)
