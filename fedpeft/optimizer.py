"""AdamW and SGD on stacked parameters: state per client, and only the clients still training move."""

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

Kind = Literal["adamw", "sgd"]


@final
class Optimizer:
    """Steps ``parameters``, each (K, ...), by torch's own kernels, at ``rates`` per parameter name.

    A client that has stopped training must not move at all: weight decay and Adam's moments would move it even with zero
    gradients, so every step works on the slice of clients that are active.
    """

    def __init__(
        self,
        kind: Kind,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        *,
        weight_decay: float,
        momentum: float,
    ) -> None:
        self._kind: Kind = kind
        self._parameters, self._rates = parameters, rates
        self._weight_decay, self._momentum = weight_decay, momentum
        slots = {"adamw": 2, "sgd": 1}[kind]
        self._moments = {name: [torch.zeros_like(p) for _ in range(slots)] for name, p in parameters.items()}
        self._steps = {name: torch.zeros((), device=p.device) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, active: slice, warmth: float = 1.0) -> None:
        """Move the ``active`` clients by their gradients; ``warmth`` multiplies every rate."""
        for rate in sorted(set(self._rates.values())):
            names = [n for n, p in self._parameters.items() if self._rates[n] == rate and p.grad is not None]
            if names:
                self._move(names, active, rate * warmth)

    def _move(self, names: list[str], active: slice, rate: float) -> None:
        parameters = [self._parameters[name][active] for name in names]
        gradients = [_gradient(self._parameters[name])[active] for name in names]
        moments = [[moment[active] for moment in self._moments[name]] for name in names]
        if self._kind == "sgd":
            sgd(
                parameters,
                gradients,
                [own[0] for own in moments],
                fused=True,
                weight_decay=self._weight_decay,
                momentum=self._momentum,
                lr=rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        else:
            adamw(
                parameters,
                gradients,
                [own[0] for own in moments],
                [own[1] for own in moments],
                [],
                [self._steps[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=self._weight_decay,
                eps=1e-8,
                maximize=False,
            )


@torch.no_grad()
def clip(parameters: Mapping[str, nn.Parameter], active: slice, limit: float) -> None:
    """Scale the gradients of each ``active`` client so that their joint norm is at most ``limit``."""
    gradients = [p.grad[active] for p in parameters.values() if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients])
    factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
