"""RAVAN: several small cores a layer, of which a weak client trains some (Raje et al. 2025)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.heads import Start, factors, others, picked, side_by_side
from fedpeft.algebra.lowrank import by_module, check_ranks
from fedpeft.algebra.ranks import share_of
from fedpeft.mounting import (
    Targets,
    dense_shape,
    mounted,
    plain_parameters,
    select,
    specs,
    summed,
    trainable,
)
from fedpeft.seeds import generator
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class Ravan:
    """Train the cores H_i and their weights s_i of W + scale * sum_i s_i B_i H_i A_i.

    B_i and A_i are drawn from the seed and never sent, so the average is exact and the rank of an
    update is that of all heads together.
    """

    paper: ClassVar[str] = "RAVAN: Raje et al. 2025, arXiv 2506.05568"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    heads: Annotated[int, Ge(1)] = 4
    """Heads of a layer, the paper's 4; a client trains its capacity's share of them."""
    rank: Annotated[int, Ge(1)] = 16
    """Rank p of one head, whose core has p x p entries. Reconstruction."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What the sum is multiplied by. Reconstruction."""
    start: Start = "orthonormal"
    """How B_i and A_i are drawn: `orthonormal` over all heads, or `normal` with vectors of norm 1
    on average (that norm is a reconstruction)."""
    choice: Literal["random", "norm"] = "norm"
    """Which heads a weak client trains: `random` ones, or those of the largest |H_i|. Where all are
    0 they are random."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from H = 0, (h, p, p), so that the model is unchanged."""
        layers = select(base, self.targets)
        check_ranks(layers, self.heads * self.rank, "method.heads * method.rank")
        cores = {f"{name}:H": torch.zeros(self.heads, self.rank, self.rank) for name in layers}
        return State(0, cores | base.heads(), server={"seed": torch.tensor(seed)})

    def send(self, state: State, client: Client) -> Payload:
        """Send all cores and the head, and the numbers of the heads that the client trains."""
        chosen = {f"{m}:heads": heads for m, heads in self._chosen(state, client).items()}
        return {**state.shared, **chosen}

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the heads that are trained, and the others beside them, frozen."""
        del memory
        moving = plain_parameters(down)
        between: dict[str, Tensor] = {}  # the frozen factors of the heads that are trained
        resting: dict[str, Tensor] = {}
        for module, entries in by_module(down).items():
            H, chosen = entries["H"], entries["heads"]  # (K, h, p, p), (K, m)
            rest = others(chosen, H.shape[1])  # (K, h - m)
            shape = dense_shape(model, module)
            B, A = factors(shape, self.heads, self.rank, self.start, context.seed, module)
            B, A = B.to(H), A.to(H)  # (h, out, p), (h, p, in)
            moving[f"{module}:H"] = picked(H, chosen)
            moving[f"{module}:s"] = torch.ones(chosen.shape).to(H)  # they start at 1 in every round
            between |= side_by_side(module, B[chosen], A[chosen])
            if rest.shape[1]:
                resting[f"{module}:H"] = picked(H, rest)
                resting |= side_by_side(module, B[rest], A[rest])
        trained = trainable(moving)
        branches = trained | between

        def reply() -> tuple[Payload, Payload]:
            up = {n: tensor.detach() for n, tensor in plain_parameters(trained).items()}
            for module, entries in by_module(trained).items():
                weights = entries["s"].detach()[..., None, None]
                up[f"{module}:H"] = weights * entries["H"].detach()  # s_i H_i
            return up, {}

        difference = partial(summed, [branches, resting], self.scale)
        with mounted(model, branches, self.scale), mounted(model, resting, self.scale):
            yield LocalTask(trained, reply, difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect s_i H_i of the heads that the client trains, (m, p, p), and the head back."""
        del state
        expected = specs(plain_parameters(down))
        for module, entries in by_module(down).items():
            shape = (len(entries["heads"]), self.rank, self.rank)
            expected[f"{module}:H"] = torch.empty(shape, device="meta")
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average every head over the clients that trained it; heads that nobody did stay."""
        means: dict[tuple[str, int], Mean] = {}
        head = Mean()
        for update in updates:
            weight = weight_of(update, self.weighting)
            head.add(plain_parameters(update.payload), weight)
            for module, chosen in self._chosen(state, update.client).items():
                cores = update.payload[f"{module}:H"]
                for i, core in zip(chosen.tolist(), cores, strict=True):
                    means.setdefault((module, i), Mean()).add({"H": core}, weight)
        shared = {**state.shared, **head.result()}
        for (module, i), mean in means.items():
            name = f"{module}:H"
            if shared[name] is state.shared[name]:
                shared[name] = state.shared[name].clone()
            shared[name][i] = mean.result()["H"]
        return replace(state, round=state.round + 1, shared=shared)

    def _chosen(self, state: State, client: Client) -> dict[str, Tensor]:
        """Return the numbers of the heads that ``client`` trains, (m,) ascending, by module.

        Server and client need no message about them that the other way could contradict.
        """
        count = share_of(client, self.heads, "method.heads")
        chosen: dict[str, Tensor] = {}
        for module, entries in by_module(state.shared).items():
            norms = entries["H"].flatten(1).norm(dim=1)  # (h,)
            if count == self.heads or (self.choice == "norm" and bool(norms.any())):
                order = norms.argsort(descending=True, stable=True)
            else:
                seed = int(state.server["seed"])
                draw = generator(seed, "ravan", client.id, state.round, module)
                order = torch.randperm(self.heads, generator=draw)
            chosen[module] = order[:count].sort().values
        return chosen
