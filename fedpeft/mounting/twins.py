"""A second model on the same parameters, whose modules another library may change."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedpeft.mounting.mount import overridden
from fedpeft.mounting.tracing import claimed


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of the modules of ``model`` that holds its very parameters and buffers.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> twin = twin_of(model)
    >>> twin[0] is model[0], twin[0].weight is model[0].weight
    (False, True)
    """
    # ``deepcopy`` takes what is in its memo instead of copying it.
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


@contextmanager
def standing_in(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let ``other`` compute what ``model`` is asked for, in the mode in which ``model`` is.

    For the length of a ``with``.

    >>> model, other = nn.Sequential(nn.Identity()), nn.Sequential(nn.ReLU())
    >>> import torch
    >>> with standing_in(model, other):
    ...     model(torch.tensor(-1.0)).item()
    0.0
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if other.training != model.training:
            other.train(model.training)
        return other(*args, **kwargs)

    with overridden(model, forward), claimed([(model, "__dict__", "forward")]):
        yield
