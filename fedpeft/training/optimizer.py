"""AdamW and SGD on stacked parameters: state per client; only clients still training move."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Final, Literal, final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedpeft.types import Payload

Kind = Literal["adamw", "sgd"]

# Names in a state that is kept. They begin with "@", so that no method takes them for its own.
STEPS: Final = "@steps"  # how many steps each client has taken
MOVES: Final = "@moves/"  # and a tensor's name: how many of these moved the tensor
MOMENT: Final = "@moment"  # and a number and a tensor's name: that moment of the tensor


@final
class Optimizer:
    """Steps ``parameters``, each (K, ...), by torch's own kernels, at ``rates`` per parameter name.

    A client that has stopped training must not move at all. Weight decay and Adam's moments would
    move it even with zero gradients, so every step works on the slice of clients that are active.

    ``warmup``: steps over which the rates of a client rise linearly. ``kept``: the ``state`` after
    the same clients last trained, (K, ...), from which they go on. A tensor that it lacks, or has
    in another shape, starts anew.
    """

    def __init__(
        self,
        kind: Kind,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        *,
        weight_decay: float,
        momentum: float,
        warmup: int = 0,
        kept: Payload | None = None,
    ) -> None:
        self._kind: Kind = kind
        self._parameters, self._rates = parameters, rates
        self._weight_decay, self._momentum, self._warmup = weight_decay, momentum, warmup
        clients = max((len(p) for p in parameters.values()), default=0)
        # AdamW keeps two moments of every tensor; SGD one, and none without momentum.
        slots = {"adamw": 2, "sgd": int(momentum > 0)}[kind]
        # How many steps each client has taken, and how many of them moved each tensor.
        self._steps: list[int] = kept[STEPS].tolist() if kept else [0] * clients
        self._moves: dict[str, list[int]] = {}
        self._moments: dict[str, list[Tensor]] = {}
        for name, parameter in parameters.items():
            self._moments[name], self._moves[name] = _begin(name, parameter, slots, kept or {})
        self._runs = [(run, self._clocks(run)) for run in self._equal_neighbours(clients)]

    def _equal_neighbours(self, clients: int) -> list[slice]:
        """Return runs of clients with equally many steps behind them: torch steps these at once."""
        starts: list[int] = []
        before: list[int] = []
        for k in range(clients):
            counts = [self._steps[k]]
            for moves in self._moves.values():
                counts.append(moves[k])
            if counts != before:
                starts.append(k)
            before = counts
        return [slice(start, stop) for start, stop in pairwise([*starts, clients])]

    def _clocks(self, run: slice) -> dict[str, Tensor]:
        """Return the step count of every tensor, 0-d float32, for the clients of one run."""
        # AdamW's kernel raises these by itself and corrects the bias of the moments by them.
        clocks: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            moves = float(self._moves[name][run.start])
            clocks[name] = torch.full((), moves, device=parameter.device)
        return clocks

    def state(self) -> dict[str, Tensor]:
        """Return all that another optimizer needs to go on from here, (K, ...); see ``kept``."""
        if not self._parameters:
            return {}
        state = {STEPS: torch.tensor(self._steps)}
        for name, moments in self._moments.items():
            if moments:  # plain SGD has none
                state |= dict(zip(_keys(name, len(moments)), moments, strict=True))
                state[f"{MOVES}{name}"] = torch.tensor(self._moves[name])
        return state

    @torch.no_grad()
    def step(self, active: slice) -> None:
        """Move the ``active`` clients, which are the first so many, by their gradients."""
        # A client that has stopped does not start again, so those of a run that move stay equal.
        for run, clocks in self._runs:
            moving = slice(run.start, min(run.stop, active.stop))
            if moving.start < moving.stop:
                self._step_run(moving, clocks)

    def _step_run(self, active: slice, clocks: Mapping[str, Tensor]) -> None:
        """Move clients that have taken equally many steps, and so have one rate and one clock."""
        # Linear warm-up: 1 / (warmup + 1) at the first step, 1 from step ``warmup`` + 1 on.
        lr_factor = min(1.0, (self._steps[active.start] + 1) / (self._warmup + 1))
        for rate in sorted(set(self._rates.values())):
            # A tensor that no micro-batch used does not move: weight decay would shrink it.
            names: list[str] = []
            for name, parameter in self._parameters.items():
                if self._rates[name] == rate and parameter.grad is not None:
                    names.append(name)
            if names:
                self._move(names, active, rate * lr_factor, clocks)
            for name in names:
                _count(self._moves[name], active)
        _count(self._steps, active)

    def _move(
        self,
        names: list[str],
        active: slice,
        rate: float,
        clocks: Mapping[str, Tensor],
    ) -> None:
        """Let torch's kernel move the ``active`` clients' slices of the tensors ``names``."""
        # Slices are views, (active, ...): the kernel changes the stack through them.
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        moments: list[list[Tensor]] = []
        for name in names:
            parameter = self._parameters[name]
            parameters.append(parameter[active])
            gradients.append(_gradient(parameter)[active])
            moments.append([moment[active] for moment in self._moments[name]])
        if self._kind == "sgd":
            sgd(
                parameters,
                gradients,
                [slots[0] if slots else None for slots in moments],
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
                [slots[0] for slots in moments],
                [slots[1] for slots in moments],
                [],  # for AMSGrad alone
                [clocks[name] for name in names],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate,
                weight_decay=self._weight_decay,
                eps=1e-8,
                maximize=False,
            )


def _count(counts: list[int], active: slice) -> None:
    """Raise the counts of the ``active`` clients by one."""
    for k in range(active.start, active.stop):
        counts[k] += 1


def _keys(name: str, slots: int) -> list[str]:
    """Return the names of the moments of tensor ``name`` in a state that is kept."""
    return [f"{MOMENT}{slot}/{name}" for slot in range(slots)]


def _begin(
    name: str,
    parameter: nn.Parameter,
    slots: int,
    kept: Payload,
) -> tuple[list[Tensor], list[int]]:
    """Return the moments of one tensor and how often each client moved it.

    They are taken from ``kept`` where all are there and fit ``parameter``, (K, ...). Otherwise they
    are 0.
    """
    keys, moves = _keys(name, slots), f"{MOVES}{name}"
    moments: list[Tensor] = []
    for key in keys:
        if key in kept and kept[key].shape == parameter.shape:
            moments.append(kept[key].clone())  # steps change it in place
    if len(moments) == slots and moves in kept:
        return moments, kept[moves].tolist()
    # FedARA's factors shrink with the ranks that die: moments of the larger ones mean nothing now.
    return [torch.zeros_like(parameter) for _ in keys], [0] * len(parameter)


@torch.no_grad()
def clip(parameters: Mapping[str, nn.Parameter], active: slice, limit: float) -> None:
    """Scale the gradients of each ``active`` client to a joint norm of at most ``limit``."""
    gradients = [p.grad[active] for p in parameters.values() if p.grad is not None]
    if not gradients:
        return
    by_tensor = torch.stack([_norm_per_client(gradient) for gradient in gradients])  # (tensors, K)
    by_client = torch.linalg.vector_norm(by_tensor, dim=0)
    factors = (limit / (by_client + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        one_axis_each = [1] * (gradient.ndim - 1)
        gradient.mul_(factors.view(-1, *one_axis_each))  # (K, 1, ..., 1)


def _norm_per_client(gradient: Tensor) -> Tensor:
    """Return the norm of each client's gradient of one tensor, (K, ...) -> (K,)."""
    norms: Tensor = torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1)
    return norms


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of ``parameter``, 0 where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
