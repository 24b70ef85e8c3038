"""FedAvgM: momentum on the server (Hsu et al. 2019, section 4.3)."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, mean_merge
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update


@final
@dataclass(frozen=True)
class FedAvgM:
    """Let the server step along v <- momentum * v + (mean - w) instead of to the mean."""

    paper: ClassVar[str] = "FedAvgM: Hsu et al. 2019, arXiv 1909.06335"
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last step that goes on; 0 with rate 1 is the method inside."""
    rate: Annotated[float, Gt(0)] = 1.0
    """The server's learning rate."""

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with momentum on its server."""
        return WithMomentum(method, owner, self.momentum, self.rate)


@final
@dataclass(frozen=True)
class WithMomentum:
    """A method whose merged step is smoothed by momentum.

    The velocity of every floating-point tensor is kept in the ``owner``'s slice of the state.
    """

    paper: ClassVar[str] = FedAvgM.paper
    inner: Method
    owner: str
    momentum: float
    rate: float

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does, at rest."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends."""
        return self.inner.send(state.without(self.owner), client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as the method inside does."""
        return self.inner.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        return self.inner.expects(state.without(self.owner), down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the method inside does, then step along the velocity.

        A tensor that is new or has another shape, as after a bridge between stages, is taken as it
        is and begins at rest. A silent round changes nothing, not even the velocity.
        """
        counted = Counted(updates)
        merged = self.inner.receive(state.without(self.owner), counted)
        return self._stepped(state, merged, silent=counted.count == 0)

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Return the merge of the method inside, with the step along the velocity after it."""
        inner = mean_merge(self.inner, round_number)
        if inner is None:
            return None

        def merge(state: State, total: Mean) -> State:
            merged = inner.merge(state.without(self.owner), total)
            return self._stepped(state, merged, silent=not total.sums())

        return replace(inner, merge=merge)

    def _stepped(self, state: State, merged: State, *, silent: bool) -> State:
        """Return what becomes of ``state`` once the method inside has merged the replies."""
        velocities = state.slice_of(self.owner)
        if silent or merged.round == state.round:
            # Without this, the old velocity would go on moving the model that nobody trained; and a
            # round of several phases has one step, after the last.
            return merged.with_slice(self.owner, velocities)
        shared = dict(merged.shared)
        new_velocities: dict[str, Tensor] = {}
        for name, mean in merged.shared.items():
            before = state.shared.get(name)
            if before is None or before.shape != mean.shape or not mean.is_floating_point():
                continue
            # Hsu et al. subtract a velocity of w - mean; this adds one of mean - w.
            velocity = mean - before
            if name in velocities:
                velocity = velocity + self.momentum * velocities[name]
            new_velocities[name] = velocity
            shared[name] = before + self.rate * velocity
        return replace(merged, shared=shared).with_slice(self.owner, new_velocities)


@final
class Counted:
    """A stream of updates that remembers how many have been read."""

    def __init__(self, updates: Iterable[Update]) -> None:
        self._updates = updates
        self.count = 0

    def __iter__(self) -> Iterator[Update]:
        for update in self._updates:
            self.count += 1
            yield update
