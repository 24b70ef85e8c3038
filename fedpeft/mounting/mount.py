"""Mount tensors on a model for the length of a ``with``; names and shapes decide what goes where, and no trace is left."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fedpeft.lowrank import by_module
from fedpeft.mounting.branches import low_rank, stackable, stacked
from fedpeft.mounting.layers import dense_layer
from fedpeft.types import NotStackable, Payload, WireError


def trainable(tensors: Payload) -> dict[str, nn.Parameter]:
    """Return fresh parameters with the values of ``tensors``."""
    return {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}


def values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of ``parameters``, detached."""
    return {name: tensor.detach() for name, tensor in parameters.items()}


def forms(payload: Payload) -> dict[str, Tensor]:
    """Return meta tensors of the names, shapes and dtypes of ``payload``."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in payload.items()}


@contextmanager
def mounted(model: nn.Module, tensors: Payload, scale: float = 1.0) -> Iterator[None]:
    """Mount ``tensors``, each (K, ...), on ``model``: branches for ``<module>:A``/``:B``/``:e``, parameters for plain names.

    A name that the model lacks, or a parameter that cannot carry K > 1 clients, raises WireError.
    """
    plain = {name: tensor for name, tensor in tensors.items() if ":" not in name}
    with ExitStack() as undo:
        for name, parts in by_module(tensors).items():
            dense_layer(model, name)
            handle = model.get_submodule(name).register_forward_hook(low_rank(parts, scale))
            undo.callback(handle.remove)
        if all(len(tensor) == 1 for tensor in plain.values()):
            undo.enter_context(replaced(model, {name: partial(_first, tensor) for name, tensor in plain.items()}))
        else:
            undo.enter_context(_side_by_side(model, plain))
        yield


@contextmanager
def replaced(model: nn.Module, makers: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let ``makers[name](parameter)`` stand in for the parameter of that name, made anew before every forward pass.

    Tied parameters are replaced wherever they are used. On leaving, the very same parameter objects are back.
    """
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    places = _places(everywhere, makers)

    def put(name: str, tensor: Tensor) -> None:
        for place in places[name]:
            home, _, attribute = place.rpartition(".")
            model.get_submodule(home)._parameters[attribute] = cast(nn.Parameter, tensor)

    def refresh(*_: object) -> None:
        for name, make in makers.items():
            put(name, make(everywhere[name]))

    handle = model.register_forward_pre_hook(refresh)
    try:
        refresh()
        yield
    finally:
        handle.remove()
        for name in makers:
            put(name, everywhere[name])


@contextmanager
def _side_by_side(model: nn.Module, plain: Payload) -> Iterator[None]:
    """Give modules whose parameters are in ``plain``, (K, ...), a forward that keeps the K clients apart."""
    own: dict[str, dict[str, Tensor]] = {}
    for name, places in _places(dict(model.named_parameters(remove_duplicate=False)), plain).items():
        for place in places:
            home, _, attribute = place.rpartition(".")
            own.setdefault(home, {})[attribute] = plain[name]
    changed = {name: model.get_submodule(name) for name in own}
    for name, module in changed.items():
        if not stackable(module):
            kind = type(module).__name__
            raise NotStackable(f"the parameters of {name!r} ({kind}) cannot carry several clients at once; use cohorts of 1")
    forwards = {name: stacked(module, own[name]) for name, module in changed.items()}
    try:
        for name, module in changed.items():
            module.forward = forwards[name]
        yield
    finally:
        for module in changed.values():
            module.__dict__.pop("forward", None)


def touched(model: nn.Module) -> set[nn.Module]:
    """Return the modules inside ``model`` on which something is mounted: a branch, a forward, a tensor for a parameter."""
    return {
        module
        for module in model.modules()
        if module._forward_hooks
        or "forward" in module.__dict__
        or any(tensor is not None and not isinstance(tensor, nn.Parameter) for tensor in module._parameters.values())
    }


def _first(stack: Tensor, parameter: Tensor) -> Tensor:
    """Return the only client's tensor, in the place of ``parameter``."""
    del parameter
    return stack.squeeze(0)  # a view; indexing would copy the whole gradient


def _places(everywhere: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, list[str]]:
    """Return for each of ``names`` every name under which the model uses the parameter: its own, and those it is tied to."""
    twins: dict[Tensor, list[str]] = {}
    for name, parameter in everywhere.items():
        twins.setdefault(parameter, []).append(name)
    for name in names:
        if name not in everywhere:
            raise WireError(f"the message holds parameter {name!r}, which this model lacks")
    return {name: twins[everywhere[name]] for name in names}
