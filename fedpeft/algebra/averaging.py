"""Weighted means of payloads, one reply in memory at a time: McMahan et al. 2017, equation (2)."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedpeft.types import Payload, State, Update

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

    def add(self, payload: Payload, weight: float) -> None:
        """Add ``payload``; all payloads of one mean have the same names and shapes."""
        for name, tensor in payload.items():
            if name not in self._sums:
                # In float64 the rounding of many additions stays below that of the last cast.
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._dtypes[name] = tensor.dtype
            self._sums[name].add_(tensor, alpha=weight)
        self._weight += weight

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


def averaged(state: State, updates: Iterable[Update], weighting: Weighting) -> State:
    """Return the next state: tensors that came back are averaged, all others are kept.

    >>> state = State(0, {"w": torch.tensor(1.0), "b": torch.tensor(2.0)})
    >>> after = averaged(state, [], "examples")  # a silent round
    >>> after.round, after.shared == state.shared
    (1, True)
    """
    # A silent round has no mean to offer, so every tensor is kept.
    merged = mean(updates, weighting)
    return replace(state, round=state.round + 1, shared={**state.shared, **merged})
