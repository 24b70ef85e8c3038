"""What stands in for a module while adapters are mounted: low-rank branches and parameters with a client axis."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedpeft.mounting.rows import by_client, present

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


def low_rank(parts: Mapping[str, Tensor], scale: float) -> Hook:
    """Return a forward hook that adds scale * B diag(e) A x to a dense layer's output; ``e`` may be missing.

    ``parts``: A (K, r, in), B (K, out, r), e (K, r). The rows of x, (K*b, ..., in), belong to the clients in order.
    """
    A, B, e = parts["A"], parts["B"], parts.get("e")

    def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        down, up = present(A), present(B)
        clients = down.shape[0]
        x = args[0]
        inner = torch.bmm(by_client(x, clients), down.transpose(1, 2))
        if e is not None:
            inner = inner * present(e).unsqueeze(1)
        flat = output.reshape(clients, -1, output.shape[-1])
        return torch.baddbmm(flat, inner, up.transpose(1, 2), alpha=scale).view(output.shape)

    return add


def _linear(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.transpose(-1, -2) + bias


def _conv1d(_module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight + bias


def _layer_norm(module: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, module.normalized_shape, eps=module.eps) * weight + bias


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

    The rows of its input, (K*b, ..., in), belong to the clients in order.
    """
    forward = _FORWARDS[type(module)]
    shared = {"bias": torch.zeros(()), **dict(module.named_parameters(recurse=False))}

    def parameter(name: str) -> Tensor:
        if name not in own:
            return shared[name]
        mine = present(own[name])
        return mine.unsqueeze(1) if mine.ndim == 2 else mine  # vectors broadcast over a client's rows

    def run(x: Tensor) -> Tensor:
        weight, bias = parameter("weight"), parameter("bias")
        clients = max(len(tensor) for tensor in (weight, bias) if tensor.ndim == 3)
        y = forward(module, by_client(x, clients), weight, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    return run
