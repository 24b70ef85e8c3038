"""A second model on the same parameters, whose modules another library may change."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fedpeft.errors import WireError


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


def check_shapes(tuned: nn.Module, makers: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    """Raise WireError where what is to stand in for a parameter has another shape."""
    for name, parameter in tuned.named_parameters():
        if name in makers and makers[name](parameter).shape != parameter.shape:
            raise WireError(f"{name} is of another shape than {tuple(parameter.shape)}")
