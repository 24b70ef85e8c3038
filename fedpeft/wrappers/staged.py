"""Two methods one after the other, with a bridge between their states.

The bridge turns the last state of the first stage into the first state of the second.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import nn

from fedpeft.algebra.averaging import Mean, MeanMerge, mean_merge
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
    """Run ``first`` for ``until`` rounds and ``second`` from then on.

    Server and client both derive the stage from the round number. ``bridge``: last state of the
    first stage -> first state of the second; it runs on the server, before round ``until``.
    ``rates``: each stage's factor on the learning rates. A client's memory belongs to the stage
    that wrote it: it is tagged, and the other stage never sees it.
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
        """Send what the current stage sends; a memory of the other stage counts as none."""
        # Methods see their memory's version as the round that wrote it, so it tells the stage.
        if client.memory != NO_MEMORY and self._stage(client.memory) != self._stage(state.round):
            client = replace(client, memory=NO_MEMORY)
        return self._method(state.round).send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the current stage does, at its own rate."""
        stage = self._stage(context.round)
        stage_memory = dict(memory)
        tag = stage_memory.pop("stage", torch.tensor(NO_MEMORY))  # (K,), or () where there is none
        if not bool((tag == stage).all()):
            stage_memory = {}
        method = self._method(context.round)
        with method.mount(model, down, stage_memory, context) as task:

            def reply() -> tuple[Payload, Payload]:
                up, stays = task.reply()
                if not stays:
                    return up, {}  # a tag alone would be a memory, and would need a version
                tag = torch.full((len(context.clients),), stage)
                return up, {**stays, "stage": tag}

            yield replace(task, reply=reply, rate=task.rate * self.rates[stage])

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the current stage expects."""
        return self._method(state.round).expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the current stage does; cross the bridge after the first stage's last round."""
        merged = self._method(state.round).receive(state, updates)
        return self._after(state, merged)

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Return the merge of the current stage, with the bridge after it."""
        inner = mean_merge(self._method(round_number), round_number)
        if inner is None:
            return None

        def merge(state: State, total: Mean) -> State:
            return self._after(state, inner.merge(state, total))

        return replace(inner, merge=merge)

    def _after(self, before: State, merged: State) -> State:
        """Return the state after a round, across the bridge after the first stage's last one."""
        return self._bridged(merged) if self._stage(before.round) == 0 else merged

    def _bridged(self, state: State) -> State:
        """Return a state of the first stage, or what the bridge makes of it once that is over."""
        return state if state.round < self.until else self.bridge(state)

    def _stage(self, round_number: int) -> int:
        """Return 0 for a round of the first stage, 1 for one of the second."""
        return int(round_number >= self.until)

    def _method(self, round_number: int) -> Method:
        return (self.first, self.second)[self._stage(round_number)]
