"""RAVAN: several small cores a layer, of which a weak client trains some (Raje et al. 2025)."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.lowrank import by_module, check_ranks, deltas
from fedpeft.algebra.ranks import share_of
from fedpeft.mounting import (
    Targets,
    Total,
    dense_shape,
    mounted,
    plain_parameters,
    select,
    specs,
    trainable,
)
from fedpeft.seeds import generator
from fedpeft.types import Base, Client, Context, Delta, LocalTask, Payload, State, Update

Start = Literal["orthonormal", "normal"]


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
            others = _others(chosen, H.shape[1])
            B, A = self._factors(dense_shape(model, module), context.seed, module)
            B, A = B.to(H), A.to(H)  # (h, out, p), (h, p, in)
            moving[f"{module}:H"] = _picked(H, chosen)
            moving[f"{module}:s"] = torch.ones(chosen.shape).to(H)  # they start at 1 in every round
            between |= _side_by_side(module, B[chosen], A[chosen])
            if others.shape[1]:
                resting[f"{module}:H"] = _picked(H, others)
                resting |= _side_by_side(module, B[others], A[others])
        trained = trainable(moving)
        branches = trained | between

        def reply() -> tuple[Payload, Payload]:
            up = {n: tensor.detach() for n, tensor in plain_parameters(trained).items()}
            for module, entries in by_module(trained).items():
                weights = entries["s"].detach()[..., None, None]
                up[f"{module}:H"] = weights * entries["H"].detach()  # s_i H_i
            return up, {}

        def difference() -> dict[str, Delta]:
            added: dict[str, Delta] = dict(deltas(branches, self.scale))
            for module, delta in deltas(resting, self.scale).items():
                added[module] = Total([added[module], delta])
            return added

        with ExitStack() as undo:
            undo.enter_context(mounted(model, branches, self.scale))
            undo.enter_context(mounted(model, resting, self.scale))
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

    def _factors(self, shape: torch.Size, seed: int, module: str) -> tuple[Tensor, Tensor]:
        """Return all B_i, (h, out, p), and A_i, (h, p, in), of a layer of ``shape``."""
        out, width = shape
        count = self.heads * self.rank
        B = _drawn(out, count, self.start, seed, f"{module}:B").T  # (h p, out)
        A = _drawn(width, count, self.start, seed, f"{module}:A").T  # (h p, in)
        left = B.view(self.heads, self.rank, out).mT
        return left, A.view(self.heads, self.rank, width)


@lru_cache(maxsize=1024)
def _drawn(length: int, count: int, start: Start, seed: int, name: str) -> Tensor:
    """Return ``count`` random vectors, (length, count); drawn once, for reading only."""
    with torch.inference_mode(mode=False):
        draw = torch.randn(length, count, generator=generator(seed, "ravan", name))
        if start == "normal":
            return draw / math.sqrt(length)
        basis: Tensor = torch.linalg.qr(draw.to(torch.float64)).Q
        return basis.float()


def _others(chosen: Tensor, heads: int) -> Tensor:
    """Return which of ``heads`` are not ``chosen``, (K, m) -> (K, heads - m), ascending."""
    taken = torch.zeros(len(chosen), heads, dtype=torch.bool, device=chosen.device)
    taken.scatter_(1, chosen, value=True)
    # A stable sort of False before True: what is not taken comes first, in order.
    order = taken.to(torch.int8).argsort(dim=1, stable=True)
    return order[:, : heads - chosen.shape[1]]


def _picked(stack: Tensor, heads: Tensor) -> Tensor:
    """Return those ``heads``, (K, m), of a stack of cores: (K, h, p, p) -> (K, m, p, p)."""
    rows = torch.arange(len(stack), device=stack.device).unsqueeze(1)
    return stack[rows, heads]


def _side_by_side(module: str, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """Return the factors of m heads, (K, m, out, p) and (K, m, p, in), as a branch of rank m p."""
    left = B.permute(0, 2, 1, 3).flatten(2)  # (K, out, m p)
    return {f"{module}:B": left, f"{module}:A": A.flatten(1, 2)}
