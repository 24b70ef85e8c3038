"""An optimizer on the server: the step to the mean is its gradient (Reddi et al. 2021)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, final

from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, mean_merge
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update


class Rule(Protocol):
    """How an optimizer steps a tensor; a frozen dataclass."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Return the names of what is kept of every tensor, as they begin in the state's slice."""
        ...

    def step(
        self, before: Tensor, delta: Tensor, kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the tensor after the step, and what is kept then.

        ``delta``: the mean minus ``before``. ``kept``: by slot; empty for a tensor at rest.
        """
        ...


@final
@dataclass(frozen=True)
class ServerOptimizer:
    """A method whose merged step is taken by an optimizer's ``rule`` instead of as it is.

    What the rule keeps of every floating-point tensor is in the ``owner``'s slice of the state.
    """

    paper: ClassVar[str] = "FedOpt: Reddi et al. 2021, arXiv 2003.00295"
    inner: Method
    owner: str
    rule: Rule

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
        """Merge as the method inside does, then step.

        A tensor that is new or has another shape, as after a bridge between stages, is taken as it
        is and begins at rest. A silent round changes nothing, not even what the rule keeps.
        """
        counted = Counted(updates)
        merged = self.inner.receive(state.without(self.owner), counted)
        return self._stepped(state, merged, silent=counted.count == 0)

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Return the merge of the method inside, with the step after it."""
        inner = mean_merge(self.inner, round_number)
        if inner is None:
            return None

        def merge(state: State, total: Mean) -> State:
            merged = inner.merge(state.without(self.owner), total)
            return self._stepped(state, merged, silent=not total.sums())

        return replace(inner, merge=merge)

    def _stepped(self, state: State, merged: State, *, silent: bool) -> State:
        """Return what becomes of ``state`` once the method inside has merged the replies."""
        kept = state.slice_of(self.owner)
        if silent or merged.round == state.round:
            # Without this, the last step would go on moving the model that nobody trained; and a
            # round of several phases has one step, after the last.
            return merged.with_slice(self.owner, kept)
        shared = dict(merged.shared)
        keeps: dict[str, Tensor] = {}
        for name, mean in merged.shared.items():
            before = state.shared.get(name)
            if before is None or before.shape != mean.shape or not mean.is_floating_point():
                continue
            of_tensor: dict[str, Tensor] = {}
            for slot in self.rule.slots:
                if f"{slot}{name}" in kept:
                    of_tensor[slot] = kept[f"{slot}{name}"]
            shared[name], now = self.rule.step(before, mean - before, of_tensor)
            keeps |= {f"{slot}{name}": tensor for slot, tensor in now.items()}
        return replace(merged, shared=shared).with_slice(self.owner, keeps)


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
