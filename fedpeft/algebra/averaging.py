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
    """A streaming weighted mean, linear in what is added; sums are float64 and cast once, at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._weight = 0.0

    def add(self, payload: Payload, weight: float) -> None:
        """Add ``payload``; all payloads of one mean have the same names and shapes."""
        for name, tensor in payload.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._dtypes[name] = tensor.dtype
            self._sums[name].add_(tensor, alpha=weight)
        self._weight += weight

    def result(self) -> dict[str, Tensor]:
        """Return the mean in the dtypes that were added; empty when nothing was."""
        return {
            name: (total / self._weight).to(self._dtypes[name])
            for name, total in self._sums.items()
        }


def weight_of(update: Update, weighting: Weighting) -> float:
    """Return what ``update`` counts for in a mean, before the weights are divided by their sum."""
    return float(update.examples) if weighting == "examples" else 1.0


def mean(
    updates: Iterable[Update],
    weighting: Weighting,
    read: Callable[[Update], Payload] = lambda update: update.payload,
) -> dict[str, Tensor]:
    """Return the mean over ``updates`` of what ``read`` takes from each; empty when there was none."""
    total = Mean()
    for update in updates:
        total.add(read(update), weight_of(update, weighting))
    return total.result()


def averaged(state: State, updates: Iterable[Update], weighting: Weighting) -> State:
    """Return the next state: each shared tensor that came back is its mean over the replies, and a silent round keeps all."""
    return replace(
        state, round=state.round + 1, shared={**state.shared, **mean(updates, weighting)}
    )
