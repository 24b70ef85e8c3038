"""FedRot-LoRA: clients turn their factors towards the ones they were sent (Zhang et al. 2026)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import by_module
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedRotLoRA:
    """Train as LoRA does, and rotate B R and R^T A before they are averaged.

    A client's product stays what it was; its factors no longer cancel those of others that say the
    same in another basis.
    """

    paper: ClassVar[str] = "FedRot-LoRA: Zhang et al. 2026, arXiv 2602.23638"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    strength: Annotated[float, Ge(0), Le(1)] = 0.5
    """How far factors are turned: 0 not at all, 1 all the way; the paper's range is 0.4 to 0.6."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method that this one is but for the rotation."""
        return LoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does: A random, B = 0."""
        return self.lora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head."""
        return self.lora.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as LoRA does; what goes up is rotated, after all rounds but the first."""
        with self.lora.mount(model, down, memory, context) as task:

            def reply() -> tuple[Payload, Payload]:
                up, stays = task.reply()
                # In the first round B was 0: there is nothing to turn to. Then A and B take turns;
                # that A comes first is a reconstruction.
                if context.round == 0:
                    return up, stays
                by_A = context.round % 2 == 1
                return _rotated(up, down, self.strength, by_A=by_A), stays

            yield replace(task, reply=reply)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        return self.lora.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, each by itself."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)


def _rotated(up: Payload, sent: Payload, strength: float, *, by_A: bool) -> dict[str, Tensor]:
    """Return ``up`` with R^T A and B R in every module, R turning A (or B) towards what was sent.

    All tensors are (K, ...).
    """
    rotated = dict(up)
    targets = by_module(sent)
    for module, factors in by_module(up).items():
        A, B = factors["A"], factors["B"]  # (K, r, in), (K, out, r)
        target = targets[module]
        overlap = A @ target["A"].mT if by_A else B.mT @ target["B"]  # (K, r, r)
        R = rotation(overlap, strength).to(A)
        rotated |= {f"{module}:A": R.mT @ A, f"{module}:B": B @ R}
    return rotated


def rotation(overlap: Tensor, strength: float) -> Tensor:
    """Return the orthogonal R, (K, r, r), for which R^T X comes nearest to X_0.

    ``overlap``: X X_0^T, (K, r, r). Orthogonal Procrustes: R is the polar factor of the overlap.
    With a ``strength`` below 1 it is that of (1 - strength) I + strength R. Without any overlap
    nothing is turned.

    >>> quarter_turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    >>> bool(torch.allclose(rotation(quarter_turn, 1.0), quarter_turn.double()))
    True
    """
    identity = torch.eye(overlap.shape[-1], dtype=torch.float64, device=overlap.device)
    wide = overlap.to(torch.float64)
    soft = (1 - strength) * identity + strength * _polar(wide)
    nothing = wide.abs().amax(dim=(1, 2), keepdim=True) == 0
    return torch.where(nothing, identity, _polar(soft))


def _polar(matrices: Tensor) -> Tensor:
    """Return the orthogonal polar factor U V^T of each of the square ``matrices``, (K, r, r)."""
    left, _, right = torch.linalg.svd(matrices)
    factors: Tensor = left @ right
    return factors
