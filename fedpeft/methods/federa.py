"""FeDeRA: LoRA that starts from the SVD of the pre-trained weights (Yan et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import LowRank, by_module, check_ranks, deltas
from fedpeft.algebra.svd import Split, principal
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.types import NO_MEMORY, Base, Client, Context, Delta, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FeDeRA:
    """Train B and A from the SVD of each pre-trained W_0.

    The base becomes the residual W_0 - scale * B_0 A_0, so the model starts unchanged.
    """

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
        """Take the r principal components of every W_0 / scale.

        The server keeps a copy of them, the anchor (B_0, A_0).
        """
        del seed  # an SVD draws nothing
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        start: dict[str, Tensor] = {}
        for name, weight in layers.items():
            # W_0 / s = U S V^T; with the square-root split B_0 = U_r sqrt(S_r), (out, r), and
            # A_0 = sqrt(S_r) V_r^T, (r, in). Divided by s first: s B_0 A_0 is W_0's own best part.
            B, A = principal(weight / self.scale, self.rank, self.split)
            start |= {f"{name}:B": B, f"{name}:A": A}
        # B and A are trained from here on, and the anchor has to stay what it was.
        anchor = {f"{name}0": factor.clone() for name, factor in start.items()}
        return State(0, start | base.heads(), server=anchor)

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head, and the anchor to a client that does not remember it."""
        # The server's SVD travels, once for each client. A client that recomputed it could get
        # other last digits, and would subtract another B_0 A_0 than the one that it starts from.
        if client.memory == NO_MEMORY:
            return {**state.shared, **state.server}
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the anchor as a frozen branch of scale -s beside the trained branch.

        The anchor stays with the client.
        """
        del context
        sent_anchor, adapter = split_anchor(down)
        trained = trainable(adapter)  # A (K, r, in), B (K, out, r), head (K, ...)
        anchor: dict[str, Tensor] = {}
        for name, factor in (sent_anchor or memory).items():
            anchor[name.removesuffix("0")] = factor
        difference = partial(differences, anchor, trained, self.scale)
        # W_0 - s B_0 A_0 as W_0 with a branch beside it: the base model is shared, and stays as it
        # is for other clients and methods.
        with mounted(model, anchor, -self.scale), mounted(model, trained, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), sent_anchor), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        del state
        _, adapter = split_anchor(down)
        return specs(adapter)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, each by itself."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)


def split_anchor(payload: Payload) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the anchor in a payload, ``<module>:A0`` and ``:B0``, and the rest of it."""
    anchor: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, tensor in payload.items():
        part = anchor if name.endswith((":A0", ":B0")) else adapter
        part[name] = tensor
    return anchor, adapter


def differences(anchor: Payload, trained: Payload, scale: float) -> dict[str, Delta]:
    """Return what is added to every W_0, scale * (B A - B_0 A_0), by module.

    As factors of rank 2 r: [B, -B_0] [A; A_0]. Without an anchor it is scale * B A.
    """
    if not anchor:
        return deltas(trained, scale)
    first = by_module(anchor)
    differences: dict[str, Delta] = {}
    for name, now in by_module(trained).items():
        A = torch.cat([now["A"], first[name]["A"]], dim=1)  # (K, 2 r, in)
        B = torch.cat([now["B"], -first[name]["B"]], dim=2)  # (K, out, 2 r)
        differences[name] = LowRank(A, B, scale)
    return differences
