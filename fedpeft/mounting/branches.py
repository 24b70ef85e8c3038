"""What stands in for a module while adapters are mounted: branches, and parameters of K clients."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import WireError
from fedpeft.mounting.rows import by_client, group_by_client, select_clients

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


BRANCHES: Sequence[Collection[str]] = (
    {"A", "B"},
    {"A", "B", "e"},
    {"dense"},
    {"A", "B", "dense"},
    {"A", "B", "e", "dense"},
)
"""The parts that a dense layer's branches may consist of."""


def branches(parts: Mapping[str, Tensor], scale: float) -> list[Hook]:
    """Return the forward hooks that add a dense layer's branches, of ``parts``, to its output."""
    found = []
    if "A" in parts:
        found.append(low_rank(parts, scale))
    if "dense" in parts:
        found.append(dense(parts["dense"], scale))
    return found


def check_branch(name: str, parts: Mapping[str, Tensor], shape: torch.Size) -> set[int]:
    """Raise WireError unless ``parts`` fit dense layer ``name`` of ``shape``, (out, in).

    A branch of low rank is A (K, r, in), B (K, out, r) and maybe e (K, r); a dense one is ``dense``
    (K, out, in). A branch without the client axis is the same for all clients. Returns for how many
    clients there are tensors: K, or nothing where none has that axis.
    """
    if set(parts) not in BRANCHES:
        found = ", ".join(sorted(parts))
        raise WireError(f"the branch on {name!r} has {found}; it needs A and B, maybe e, or dense")
    one = torch.Size([1])
    rank = parts["A"].shape[-2:-1] or one if "A" in parts else one
    height, width = shape[:1], shape[1:]
    due = {"A": rank + width, "B": height + rank, "e": rank, "dense": shape}
    clients: dict[str, torch.Size] = {}
    for part, tensor in parts.items():
        axes = len(due[part])
        if tensor.shape[-axes:] != due[part] or tensor.ndim > axes + 1:
            size, fitting = tuple(tensor.shape), tuple(due[part])
            raise WireError(f"{name}:{part} is {size}; {fitting} after a client axis would fit")
        clients[part] = tensor.shape[:-axes]
    if len({clients[part] for part in parts if part != "dense"}) > 1:
        raise WireError(f"the factors of {name!r} differ in their client axis: {clients}")
    return {axis[0] for axis in clients.values() if axis}


def low_rank(parts: Mapping[str, Tensor], scale: float) -> Hook:
    """Return a forward hook that adds scale * B diag(e) A x to an output; ``e`` may be missing.

    ``parts``: A (K, r, in), B (K, out, r), e (K, r), or all of them without the client axis, the
    same for all clients. Whose the rows of x, (rows, ..., in), are, ``row_owners`` says.
    """
    A, B, e = parts["A"], parts["B"], parts.get("e")

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Transposed before rows are gathered: what comes back to be added up is contiguous.
        down, up = _entries(A.mT, 2), _entries(B.mT, 2)
        inner = torch.bmm(group_by_client(args[0], len(down)), down)
        if e is not None:
            inner = inner * _entries(e, 1).unsqueeze(1)
        flat = output.reshape(len(down), -1, output.shape[-1])
        return torch.baddbmm(flat, inner, up, alpha=scale).view(output.shape)

    return add


def dense(difference: Tensor, scale: float) -> Hook:
    """Return a forward hook that adds scale * D x to a dense layer's output, without a new weight.

    ``difference``: D, (K, out, in), or (out, in), the same for all clients, which takes one product
    for the whole batch. Whose the rows of x, (rows, ..., in), are, ``row_owners`` says.
    """

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        if difference.ndim == 2:
            return torch.add(output, functional.linear(x, difference), alpha=scale)
        # Not gathered for each row as factors are: a row would then have a whole matrix.
        own = difference.unbind()
        products = [functional.linear(rows, own[client]) for client, rows in by_client(x, len(own))]
        return torch.add(output, torch.cat(products), alpha=scale)

    return add


def _entries(stack: Tensor, axes: int) -> Tensor:
    """Return what the batch needs of a (K, ...) stack; of ``axes`` alone, it is everyone's."""
    return stack.unsqueeze(0) if stack.ndim == axes else select_clients(stack)


def _linear(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(x @ weight.transpose(-1, -2), bias)


def _conv1d(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(x @ weight, bias)


def _layer_norm(module: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(
        functional.layer_norm(x, module.normalized_shape, eps=module.eps) * weight.to(x.dtype), bias
    )


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias in the number format of the product, as torch's own layers do under autocast."""
    return product if bias is None else product + bias.to(product.dtype)


_FORWARDS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.LayerNorm: _layer_norm,
}


def stackable(module: nn.Module) -> bool:
    """Return whether ``module`` can hold K values of its own parameters at once.

    One to which others gave a forward cannot: what it computes is not known here.
    """
    return type(module) in _FORWARDS and "forward" not in vars(module)


def stacked(module: nn.Module, own: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward for ``module`` in which the parameters in ``own``, (K, ...), are the clients'.

    Whose the rows of its input, (rows, ..., in), are, ``row_owners`` says.
    """
    forward = _FORWARDS[type(module)]

    def run(x: Tensor) -> Tensor:
        mine = {name: select_clients(stack) for name, stack in own.items()}
        parts = max(len(tensor) for tensor in mine.values())
        columns = {
            name: tensor.unsqueeze(1) if tensor.ndim == 2 else tensor
            for name, tensor in mine.items()
        }
        weight, bias = (
            columns.get(name, module._parameters.get(name)) for name in ("weight", "bias")
        )
        y = forward(module, group_by_client(x, parts), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    return run
