"""The frozen parameters of a model in the number format in which it computes, cast once."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpeft.mounting.layers import matrix
from fedpeft.mounting.tracing import Entry, entry, same

Copy = tuple[Entry, nn.Parameter]
"""What a parameter was when it was cast, and the copy."""

_COPIES: WeakKeyDictionary[nn.Module, dict[torch.dtype, dict[str, Copy]]] = WeakKeyDictionary()


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let copies in ``dtype`` stand in for the frozen parameters of ``model`` in the ``with``.

    They are made at the first call and kept for as long as the model is, but for those of
    parameters that have changed since; what is mounted stays as it is.
    """
    copies = _COPIES.setdefault(model, {}).setdefault(dtype, {})
    frozen = {
        name: parameter for name, parameter in _own_parameters(model) if not parameter.requires_grad
    }
    try:
        for name, parameter in frozen.items():
            now = entry(parameter)
            if name not in copies or not same(copies[name][0], now):
                with torch.inference_mode(mode=False):  # they serve training, too
                    copies[name] = now, nn.Parameter(parameter.to(dtype), requires_grad=False)
            _put(model, name, copies[name][1])
        yield
    finally:
        for name, parameter in frozen.items():
            _put(model, name, parameter)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters in float32, tied ones under every name.

    A module in which a tensor is mounted stays as it is, as its kernel may want one format for all;
    autocast sees to the dense ones.
    """
    for prefix, module in model.named_modules():
        own = {
            name: parameter
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        if matrix(module) is None and not all(
            isinstance(parameter, nn.Parameter) for parameter in own.values()
        ):
            continue
        for name, parameter in own.items():
            if isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32:
                yield f"{prefix}.{name}" if prefix else name, parameter


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    home, _, attribute = name.rpartition(".")
    model.get_submodule(home)._parameters[attribute] = tensor  # type: ignore[assignment]
