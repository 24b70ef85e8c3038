"""Weighted means of payloads, one reply in memory at a time: McMahan et al. 2017, equation (2)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from fedpeft.types import Method, Payload, State, Update

Weighting = Literal["examples", "uniform"]
"""``examples``: by n_k / sum n over the participants; ``uniform``: the plain mean."""


class Mean:
    """A streaming weighted mean: payloads are added one by one and then let go.

    Sums are kept in float64 and cast once, at the end.

    >>> total = Mean()
    >>> total.add({"w": torch.tensor([0.0, 4.0])}, weight=1.0)
    >>> total.add({"w": torch.tensor([4.0, 0.0])}, weight=3.0)
    >>> total.result()["w"]
    tensor([3., 1.])
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0

    @staticmethod
    def of(sums: Payload, weight: float, dtypes: Mapping[str, torch.dtype]) -> "Mean":
        """Return the mean of what somebody else has summed up: weighted ``sums`` and weights.

        ``dtypes``: those of what was added.
        """
        total = Mean()
        total._sums = {name: tensor.to(torch.float64) for name, tensor in sums.items()}
        total._dtypes = dict(dtypes)
        total._weight = weight
        return total

    def add(self, payload: Payload, weight: float) -> None:
        """Add ``payload``; all payloads of one mean have the same names and shapes.

        What weighs nothing is not added.
        """
        if weight == 0:
            return
        for name, tensor in payload.items():
            if name not in self._sums:
                # In float64 the rounding of many additions stays below that of the last cast.
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._dtypes[name] = tensor.dtype
            self._sums[name].add_(tensor, alpha=weight)
        self._weight += weight

    def sums(self) -> dict[str, Tensor]:
        """Return the weighted sums in float64; empty when nothing was added."""
        return dict(self._sums)

    def result(self) -> dict[str, Tensor]:
        """Return the mean in the dtypes that were added; empty when nothing was."""
        means: dict[str, Tensor] = {}
        for name, total in self._sums.items():
            means[name] = (total / self._weight).to(self._dtypes[name])
        return means


def weight_of(update: Update, weighting: Weighting) -> float:
    """Return what ``update`` counts for in a mean, before the weights are divided by their sum."""
    return float(update.examples) if weighting == "examples" else 1.0


def mean(
    updates: Iterable[Update],
    weighting: Weighting,
    read: Callable[[Update], Payload] = lambda update: update.payload,
) -> dict[str, Tensor]:
    """Return the mean over ``updates`` of what ``read`` takes from each; empty when there was none.

    >>> from fedpeft.types import Client
    >>> few = Update(Client(0), examples=1, payload={"w": torch.tensor(0.0)})
    >>> many = Update(Client(1), examples=3, payload={"w": torch.tensor(4.0)})
    >>> mean([few, many], "examples"), mean([few, many], "uniform"), mean([], "uniform")
    ({'w': tensor(3.)}, {'w': tensor(2.)}, {})
    """
    total = Mean()
    for update in updates:
        total.add(read(update), weight_of(update, weighting))
    return total.result()


@final
@dataclass(frozen=True)
class MeanMerge:
    """A merge that reads of all replies nothing but weighted sums, as a mean does.

    So replies may be summed before the server sees them, under masks or with noise.
    ``contribution``: a reply's payload -> what is summed of it, in floating point, of the same
    names and shapes for all clients of a round. ``merge``: state and sums -> the next state;
    without anything summed up it is a silent round. ``least``: of how many replies a sum must be
    before anybody sees it; above 1, whoever sums has to promise that, as under masks.

    >>> halved = MeanMerge(
    ...     "uniform",
    ...     contribution=lambda payload: {"w": payload["w"] / 2},
    ...     merge=lambda state, total: replace(state, round=state.round + 1, shared=total.result()),
    ... )
    >>> total = Mean()
    >>> total.add(halved.contribution({"w": torch.tensor(6.0)}), weight=1.0)
    >>> halved.merge(State(0, {}), total).shared
    {'w': tensor(3.)}
    """

    weighting: Weighting
    contribution: Callable[[Payload], Payload]
    merge: Callable[[State, Mean], State]
    least: int = 1

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Return the next state from replies that are not summed yet, as ``Method.receive``."""
        total = Mean()
        for update in updates:
            total.add(self.contribution(update.payload), weight_of(update, self.weighting))
        return self.merge(state, total)


@runtime_checkable
class MeanMethod(Protocol):
    """A method whose ``receive`` is a ``MeanMerge``; wrappers that sum replies ask for one."""

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Return the merge of a round; None where it reads more than a mean."""
        ...


def mean_merge(method: Method, round_number: int) -> MeanMerge | None:
    """Return how ``method`` merges the replies of a round, None where it needs each by itself."""
    # The one place that looks at a method's kind: methods need not know of this protocol.
    return method.mean_merge(round_number) if isinstance(method, MeanMethod) else None


def plain_mean(weighting: Weighting) -> MeanMerge:
    """Return the merge of ``averaged``: what comes back is averaged, all else is kept.

    >>> total = Mean()
    >>> total.add({"w": torch.tensor(4.0)}, weight=2.0)
    >>> after = plain_mean("examples").merge(State(0, {"w": torch.tensor(1.0)}), total)
    >>> after.round, after.shared
    (1, {'w': tensor(4.)})
    """

    def merge(state: State, total: Mean) -> State:
        # A silent round has no mean to offer, so every tensor is kept.
        return replace(state, round=state.round + 1, shared={**state.shared, **total.result()})

    return MeanMerge(weighting, lambda payload: payload, merge)


def averaged(state: State, updates: Iterable[Update], weighting: Weighting) -> State:
    """Return the next state: tensors that came back are averaged, all others are kept.

    >>> state = State(0, {"w": torch.tensor(1.0), "b": torch.tensor(2.0)})
    >>> after = averaged(state, [], "examples")  # a silent round
    >>> after.round, after.shared == state.shared
    (1, True)
    """
    return plain_mean(weighting).receive(state, updates)
