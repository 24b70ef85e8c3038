"""FedSA-LoRA: the A of every client are averaged, B and the head stay at home (Guo et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets, specs
from fedpeft.types import NO_MEMORY, Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedSALoRA:
    """Train A and B, share A alone.

    A learns what is common to all clients. B and the head are each client's own, so there is no
    global model.
    """

    paper: ClassVar[str] = "FedSA-LoRA: Guo et al. 2024, arXiv 2410.01463"
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
        """Return the method that each client runs on its own and the shared factors."""
        return LoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does; the server keeps B = 0 and the head for clients that are new."""
        start = self.lora.init(base, seed).shared
        shared, personal = _split(start)
        return State(0, shared, server=personal)

    def send(self, state: State, client: Client) -> Payload:
        """Send A, and to a client that has none of its own the start of B and the head."""
        if client.memory == NO_MEMORY:
            return {**state.shared, **state.server}
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the shared A beside the client's own B and head; all of them are trained."""
        shared, start = _split(down)
        own = start or memory
        with self.lora.mount(model, {**shared, **own}, {}, context) as task:

            def reply() -> tuple[Payload, Payload]:
                trained, _ = task.reply()
                return _split(trained)  # A goes up, B and head stay

            yield replace(task, reply=reply, personal=frozenset(own))

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A back."""
        del state
        shared, _ = _split(down)
        return specs(shared)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)


def _split(payload: Payload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the factors A in a payload, and the rest of it."""
    shared: dict[str, Tensor] = {}
    personal: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        part = shared if name.endswith(":A") else personal
        part[name] = tensor
    return shared, personal
