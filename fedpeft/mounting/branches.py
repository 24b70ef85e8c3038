"""What stands in for a module while adapters are mounted: low-rank branches and parameters with a client axis."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedpeft.mounting.rows import by_owner, present

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


def low_rank(parts: Mapping[str, Tensor], scale: float) -> Hook:
    """Return a forward hook that adds scale * B diag(e) A x to a dense layer's output; ``e`` may be missing.

    ``parts``: A (K, r, in), B (K, out, r), e (K, r). Whose the rows of x, (rows, ..., in), are, ``rows_of`` says.
    """
    A, B, e = parts["A"], parts["B"], parts.get("e")

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Transposed before rows are gathered: what comes back to be added up per client is contiguous.
        down, up = present(A.transpose(1, 2)), present(B.transpose(1, 2))
        inner = torch.bmm(by_owner(args[0], len(down)), down)
        if e is not None:
            inner = inner * present(e).unsqueeze(1)
        flat = output.reshape(len(down), -1, output.shape[-1])
        return torch.baddbmm(flat, inner, up, alpha=scale).view(output.shape)

    return add


def _linear(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(x @ weight.transpose(-1, -2), bias)


def _conv1d(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(x @ weight, bias)


def _layer_norm(module: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _plus(functional.layer_norm(x, module.normalized_shape, eps=module.eps) * weight.to(x.dtype), bias)


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias in the number format of the product, as torch's own layers do under autocast."""
    return product if bias is None else product + bias.to(product.dtype)


_FORWARDS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    Conv1D: _conv1d,
    nn.LayerNorm: _layer_norm,
}


def stackable(module: nn.Module) -> bool:
    """Return whether ``module`` can hold K values of its own parameters at once."""
    return type(module) in _FORWARDS


def stacked(module: nn.Module, own: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward for ``module`` in which the parameters in ``own``, each (K, ...), are the clients' own.

    Whose the rows of its input, (rows, ..., in), are, ``rows_of`` says.
    """
    forward = _FORWARDS[type(module)]

    def run(x: Tensor) -> Tensor:
        mine = {name: present(stack) for name, stack in own.items()}
        parts = max(len(tensor) for tensor in mine.values())
        columns = {name: tensor.unsqueeze(1) if tensor.ndim == 2 else tensor for name, tensor in mine.items()}
        weight, bias = (columns.get(name, module._parameters.get(name)) for name in ("weight", "bias"))
        y = forward(module, by_owner(x, parts), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    return run
