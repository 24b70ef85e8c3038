"""Merges that a few clients cannot bend, in the place of a weighted mean."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, MeanMerge, mean_merge, weight_of
from fedpeft.errors import BadInput, WireError
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update
from fedpeft.wire.versions import as_told
from fedpeft.wrappers.differences import is_difference


@final
@dataclass(frozen=True)
class Summand:
    """What one reply adds to a sum: its numbers, of equal names and shapes for all, and its weight.

    ``compared``: names of those by which replies are compared; votes, for example, are not.
    """

    numbers: Payload
    weight: float
    compared: Sequence[str]


class Rule(Protocol):
    """A merge of replies that says more than their mean."""

    name: ClassVar[str]
    """The wrapper, as a configuration calls it."""

    @property
    def least(self) -> int:
        """Return the fewest replies that can be merged."""
        ...

    def merged(self, summands: Sequence[Summand]) -> dict[str, Tensor]:
        """Return what takes the place of their weighted mean."""
        ...


@final
@dataclass(frozen=True)
class Robust:
    """A method in whose merge a ``rule`` takes the place of the weighted mean.

    All replies of a round are held in memory at once, other than with a mean.
    """

    paper: ClassVar[str] = "each rule has its own"
    inner: Method
    rule: Rule

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends."""
        return self.inner.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as the method inside does."""
        return self.inner.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        return self.inner.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge by the rule; WireError where it needs more replies than have come."""
        merge = self.merge_of(state.round)
        summands: list[Summand] = []
        compared: Sequence[str] = ()
        for update in updates:
            weight = weight_of(update, merge.weighting)
            if weight:
                numbers = merge.contribution(update.payload)
                compared = compared or self._compared(state, update, numbers)
                summands.append(Summand(numbers, weight, compared))
        if not summands:
            return merge.merge(state, Mean())
        if len(summands) < self.rule.least:
            raise WireError(f"{self.rule.name}: {len(summands)} replies, {self.rule.least} needed")
        merged = self.rule.merged(summands)
        dtypes = {name: tensor.dtype for name, tensor in summands[0].numbers.items()}
        return merge.merge(state, Mean.of(merged, 1.0, dtypes))

    def merge_of(self, round_number: int) -> MeanMerge:
        """Return how the method inside merges a round; BadInput where that is no weighted mean."""
        merge = mean_merge(self.inner, round_number)
        if merge is None:
            raise BadInput(
                f"wrap.name = {self.rule.name!r}: {type(self.inner).__name__} does not merge by a "
                "weighted mean, in the place of which another merge could stand"
            )
        return merge

    def _compared(self, state: State, update: Update, numbers: Payload) -> list[str]:
        """Return the names of what went down and came back; all names where nothing did."""
        down = self.inner.send(state, as_told(update.client))
        names = [name for name, tensor in numbers.items() if is_difference(name, tensor, down)]
        return sorted(names) or sorted(numbers)


def around(method: Method, rule: Rule) -> Method:
    """Return ``method`` with ``rule`` as its merge; BadInput where it is no method of means."""
    robust = Robust(method, rule)
    robust.merge_of(0)
    return robust


def sorted_stacks(summands: Sequence[Summand]) -> dict[str, Tensor]:
    """Return the numbers of n replies by name, (n, ...), each by itself in ascending order."""
    stacks: dict[str, Tensor] = {}
    for name in summands[0].numbers:
        stack = torch.stack([summand.numbers[name] for summand in summands])
        stacks[name] = stack.sort(dim=0).values
    return stacks


def weighted_mean(summands: Sequence[Summand]) -> dict[str, Tensor]:
    """Return the mean of replies by their weights."""
    total = Mean()
    for summand in summands:
        total.add(summand.numbers, summand.weight)
    return total.result()


def squared_distances(summands: Sequence[Summand]) -> Tensor:
    """Return the squared distance of every two of n replies, (n, n) float64."""
    count = len(summands)
    distances = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            one, other = summands[i].numbers, summands[j].numbers
            total = torch.zeros((), dtype=torch.float64)
            for name in summands[i].compared:
                # A norm by itself: float32 would lose digits of small differences in a square.
                gap = torch.linalg.vector_norm(one[name] - other[name], dtype=torch.float64)
                total += gap.square()
            distances[i, j] = distances[j, i] = total
    return distances
