"""FFA-LoRA: A is random, the same everywhere and never sent; B is trained (Sun et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import Drawn, by_module, check_ranks, drawn
from fedpeft.methods.federa import FeDeRA, differences, split_anchor
from fedpeft.methods.starts import Start
from fedpeft.mounting import Targets, dense_shape, detached, mounted, select, trainable
from fedpeft.types import NO_MEMORY, Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FFALoRA:
    """Train and average B alone.

    The mean of the B_k A is exactly mean(B) A, and half of LoRA's bytes travel.
    """

    paper: ClassVar[str] = "FFA-LoRA: Sun et al. 2024, arXiv 2403.12313"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    start: Start = "random"
    """Where A and B start: LoRA's `random` A and B = 0, an `orthogonal` A, or FeDeRA's `principal`
    components of the pre-trained weights, with the residual as base. Beside `random` a
    reconstruction."""

    @cached_property
    def principal(self) -> FeDeRA:
        """Return the method whose start and residual base this one may have."""
        return FeDeRA(self.targets, self.rank, self.scale)

    def init(self, base: Base, seed: int) -> State:
        """Start from B = 0, (out, r), so that the model is unchanged; A is no part of the state.

        From ``principal`` components B is B_0, and the server keeps them: A rests at A_0.
        """
        if self.start == "principal":
            begun = self.principal.init(base, seed)
            moving = {n: tensor for n, tensor in begun.shared.items() if not n.endswith(":A")}
            return replace(begun, shared=moving)
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        B: dict[str, Tensor] = {}
        for name, weight in layers.items():
            out = weight.shape[0]
            B[f"{name}:B"] = weight.new_zeros(out, self.rank)
        # The seed is in the context of ``mount``, too: clients draw A from it themselves.
        return State(0, B | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send B and head, and principal components to a client that does not remember them."""
        if state.server and client.memory == NO_MEMORY:
            return {**state.shared, **state.server}
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount A, frozen, beside the B that is trained: redrawn from the seed, or A_0."""
        sent_anchor, moving = split_anchor(down)
        anchor = {n.removesuffix("0"): tensor for n, tensor in (sent_anchor or memory).items()}
        trained = trainable(moving)  # B (K, out, r), head (K, ...)
        frozen: dict[str, Tensor] = {}
        for name, factors in by_module(moving).items():
            A = f"{name}:A"
            # (K, r, in): what was sent once, or what anyone can draw.
            if A in anchor:
                frozen[A] = anchor[A]
            else:
                frozen[A] = self._drawn(model, name, factors["B"], context)
        branches = trained | frozen
        difference = partial(differences, anchor, branches, self.scale)
        # h = W_0 x + scale * B A_0 x; the gradient goes to B alone, as A_0 is no parameter. From
        # principal components W_0 - scale * B_0 A_0 is the base, as in FeDeRA.
        with mounted(model, anchor, -self.scale), mounted(model, branches, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), sent_anchor), difference)

    def _drawn(self, model: nn.Module, module: str, B: Tensor, context: Context) -> Tensor:
        """Return the A of all clients, (K, r, in), without a copy. ``B``: (K, out, r)."""
        clients, _, rank = B.shape
        width = dense_shape(model, module)[1]
        # The draw depends on the seed and the layer alone: every client has the same A_0.
        start: Drawn = "orthogonal" if self.start == "orthogonal" else "random"
        A = drawn(start, rank, width, context.seed, module).to(B)  # (r, in)
        return A.expand(clients, -1, -1)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect B and head back."""
        return self.principal.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average B and head."""
        # Exact: sum_k p_k (B_k A_0) = (sum_k p_k B_k) A_0, as all clients share A_0.
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)
