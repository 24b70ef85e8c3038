"""The frozen parameters of a model in the number format in which it computes, cast once."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpeft.mounting.layers import matrix
from fedpeft.mounting.tracing import Entry, entry, same

Copy = tuple[Entry, nn.Parameter]
"""What a parameter was when it was cast, and the copy."""

_COPIES: WeakKeyDictionary[nn.Module, dict[torch.dtype, dict[str, Copy]]] = WeakKeyDictionary()


def keep_matrices_in(model: nn.Module, dtype: torch.dtype, head: Container[str]) -> None:
    """Keep the matrices of ``model`` in ``dtype`` for good, all else in float32.

    For models so large that there should be no float32 copy of them. ``head``: names of what is
    trained and stays float32. Vectors do, too: their modules may hold a mounted one beside them.
    """
    for name, parameter in model.named_parameters():
        is_kept = parameter.ndim > 1 and name not in head
        # The parameter itself stays, so tied modules share it as before.
        parameter.data = parameter.data.to(dtype if is_kept else torch.float32)


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let copies in ``dtype`` stand in for the frozen parameters of ``model`` in the ``with``.

    They are made at the first call and kept as long as the model lives. That of a parameter which
    has changed since is made anew. Mounted tensors stay as they are.
    """
    # Autocast alone would cast every frozen weight anew in every pass.
    copies = _COPIES.setdefault(model, {}).setdefault(dtype, {})
    frozen: dict[str, nn.Parameter] = {}
    for name, parameter in _float32_parameters(model):
        if not parameter.requires_grad:  # what is trained stays float32
            frozen[name] = parameter
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


def _float32_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters in float32, tied ones under every name.

    A module in which a tensor is mounted stays as it is, as its kernel may want one format for all.
    Dense layers are excepted: autocast gives them one format.
    """
    for prefix, module in model.named_modules():
        if matrix(module) is None and _has_mounted(module):
            continue
        for name, parameter in module._parameters.items():
            if isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32:
                yield f"{prefix}.{name}" if prefix else name, parameter


def _has_mounted(module: nn.Module) -> bool:
    """Return whether a tensor stands in for one of the module's own parameters."""
    # What is mounted is the result of a computation and so a plain tensor (see ``replaced``).
    tensors: Mapping[str, Tensor | None] = module._parameters
    for parameter in tensors.values():
        if parameter is not None and not isinstance(parameter, nn.Parameter):
            return True
    return False


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Let ``tensor`` stand in for the parameter called ``name``."""
    home, _, attribute = name.rpartition(".")
    model.get_submodule(home)._parameters[attribute] = tensor  # type: ignore[assignment]
