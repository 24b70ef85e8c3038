"""FeDeRA: LoRA started from the principal components of the pre-trained weights (Yan et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting, averaged
from fedpeft.algebra.lowrank import LowRank, Split, by_module, check_ranks, principal
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.types import NO_MEMORY, Base, Client, Context, Delta, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FeDeRA:
    """Train B and A from the SVD of each pre-trained W_0, on the residual base W_0 - scale * B_0 A_0."""

    paper: ClassVar[str] = "FeDeRA: Yan et al. 2024, arXiv 2404.18848"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters; reconstruction, as the paper's was not found."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r; reconstruction, as the paper's was not found."""
    split: Split = "sqrt"
    """Where the singular values go: `sqrt` gives B and A half each, `left` all to B, `right` all to
    A. Reconstruction; `sqrt` equals PiSSA."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (reconstruction), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Take the r principal components of every W_0 / scale; the server keeps them as the anchor (B_0, A_0) too."""
        del seed
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        start: dict[str, Tensor] = {}
        for name, weight in layers.items():
            start[f"{name}:B"], start[f"{name}:A"] = principal(
                weight / self.scale, self.rank, self.split
            )
        return State(
            0,
            start | base.heads(),
            server={f"{name}0": factor.clone() for name, factor in start.items()},
        )

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head, and once, to a client that has no memory of it, the anchor."""
        return {**state.shared, **state.server} if client.memory == NO_MEMORY else state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the anchor as a frozen branch of scale -s beside the trained one; the anchor stays with the client."""
        del context
        trained = trainable({name: tensor for name, tensor in down.items() if not _is_anchor(name)})
        news = {name: tensor for name, tensor in down.items() if _is_anchor(name)}
        anchor = {name.removesuffix("0"): tensor for name, tensor in (news or memory).items()}
        with mounted(model, anchor, -self.scale), mounted(model, trained, self.scale):
            difference = partial(_differences, anchor, trained, self.scale)
            yield LocalTask(trained, lambda: (detached(trained), news), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        del state
        return specs({name: tensor for name, tensor in down.items() if not _is_anchor(name)})

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, each by itself."""
        return averaged(state, updates, self.weighting)


def _is_anchor(name: str) -> bool:
    return name.endswith((":A0", ":B0"))


def _differences(anchor: Payload, trained: Payload, scale: float) -> dict[str, Delta]:
    """Return scale * (B A - B_0 A_0) to W_0 as factors of rank 2 r: [B, -B_0] [A; A_0]."""
    first = by_module(anchor)
    return {
        name: LowRank(
            torch.cat([now["A"], first[name]["A"]], 1),
            torch.cat([now["B"], -first[name]["B"]], 2),
            scale,
        )
        for name, now in by_module(trained).items()
    }
