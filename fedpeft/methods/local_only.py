"""No exchange at all: every client trains a LoRA of its own.

The row of a comparison that shows what federating is worth.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import nn

from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets
from fedpeft.types import NO_MEMORY, Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class LocalOnly:
    """Send the same start once.

    What a client trains stays in its memory, and nothing ever goes up.
    """

    paper: ClassVar[str] = "a reference, from no paper"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method that each client runs by itself."""
        return LoRA(self.targets, self.rank, self.scale)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does; this state never changes."""
        return self.lora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send the start to a client that has nothing of its own yet."""
        # An empty message still asks the client to train: it goes on from its memory.
        return state.shared if client.memory == NO_MEMORY else {}

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the client's own factors and head, or the start; what is trained stays."""
        with self.lora.mount(model, memory or down, {}, context) as task:
            # All of it, the head too: there is no global model that could be scored.
            personal = frozenset(task.trainable)

            def reply() -> tuple[Payload, Payload]:
                trained, _ = task.reply()
                return {}, trained

            yield replace(task, reply=reply, personal=personal)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect an empty reply."""
        del state, down
        return {}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Count the round."""
        for _ in updates:  # replies are empty: what was learnt stays with the clients
            pass
        return replace(state, round=state.round + 1)
