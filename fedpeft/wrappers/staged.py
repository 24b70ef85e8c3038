"""Two methods one after the other, with a bridge from the first one's last state to the second one's first."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import nn

from fedpeft.types import (
    NO_MEMORY,
    Base,
    Client,
    Context,
    LocalTask,
    Method,
    Payload,
    State,
    Update,
)


@final
@dataclass(frozen=True)
class Staged:
    """Play ``first`` for ``until`` rounds and ``second`` from then on; both sides tell the stage from the round.

    ``bridge``: last state of the first stage -> first state of the second, on the server, when
    round ``until`` begins. ``rates``: what each stage multiplies the learning rates by. A client's
    memory belongs to the stage that wrote it: it is tagged, and not shown to the other one.
    """

    paper: ClassVar[str] = "SLoRA: Babakniya et al. 2023, arXiv 2308.06522"
    first: Method
    second: Method
    bridge: Callable[[State], State]
    until: int
    rates: tuple[float, float] = (1.0, 1.0)

    def init(self, base: Base, seed: int) -> State:
        """Start with the first stage; ``until`` = 0 bridges at once."""
        return self._bridged(self.first.init(base, seed))

    def send(self, state: State, client: Client) -> Payload:
        """Send what the stage under way sends; a memory of the other stage counts as none."""
        ours = client.memory != NO_MEMORY and self._stage(client.memory) == self._stage(state.round)
        return self._method(state.round).send(
            state, client if ours else replace(client, memory=NO_MEMORY)
        )

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the stage under way does, at its own rate."""
        stage = self._stage(context.round)
        tagged = dict(memory)
        ours = bool((tagged.pop("stage", torch.tensor(NO_MEMORY)) == stage).all())
        with self._method(context.round).mount(
            model, down, tagged if ours else {}, context
        ) as task:

            def reply() -> tuple[Payload, Payload]:
                up, stays = task.reply()
                tag = {"stage": torch.full((len(context.clients),), stage)}
                return up, {**stays, **tag} if stays else {}

            yield replace(task, reply=reply, rate=task.rate * self.rates[stage])

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the stage under way expects."""
        return self._method(state.round).expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the stage under way does, and cross the bridge when it was the first one's last round."""
        merged = self._method(state.round).receive(state, updates)
        return self._bridged(merged) if self._stage(state.round) == 0 else merged

    def _bridged(self, state: State) -> State:
        return state if state.round < self.until else self.bridge(state)

    def _stage(self, number: int) -> int:
        return int(number >= self.until)

    def _method(self, number: int) -> Method:
        return (self.first, self.second)[self._stage(number)]
