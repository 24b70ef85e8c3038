"""Fed-SB: only a square core between two frozen factors is trained (Singhal et al. 2025)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting, averaged
from fedpeft.algebra.lowrank import by_module, check_ranks, deltas
from fedpeft.algebra.products import mean_products
from fedpeft.algebra.svd import largest
from fedpeft.mounting import (
    Targets,
    dense_shape,
    detached,
    mounted,
    mounted_deltas,
    plain_parameters,
    select,
    specs,
    trainable,
)
from fedpeft.types import NO_MEMORY, Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedSB:
    """Train R of W + scale * B R A, r x r a layer, and average it: exact, and few bytes.

    B and A are singular vectors of the mean update of a first round, in which whole matrices are
    trained. Of these a client sends the r largest components. The paper takes an update or gradient
    from some data; that the clients make it in a round is a reconstruction.
    """

    paper: ClassVar[str] = "Fed-SB: Singhal et al. 2025, arXiv 2502.15436"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 32
    """Rank r: R has r x r entries. Reconstruction; other methods' ranks are much smaller at equal
    bytes."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B R A is multiplied by."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from the head alone; the server keeps the shapes of the layers."""
        del seed  # nothing is drawn
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        shapes = {f"{name}:shape": torch.tensor(weight.shape) for name, weight in layers.items()}
        return State(0, base.heads(), server=shapes)

    def send(self, state: State, client: Client) -> Payload:
        """Send R and head, and B and A to a client that does not remember them.

        Before there are any, the head and the names of the layers.
        """
        if not by_module(state.shared):
            # Shapes say it all: ``<module>:rank`` is (r, 0), without any number in it.
            empty = torch.zeros(self.rank, 0)
            modules = by_module(state.server)
            return {**state.shared, **{f"{module}:rank": empty for module in modules}}
        if client.memory == NO_MEMORY:
            return {**state.shared, **_frozen(state.server)}
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount R between B and A, which stay with the client; at first, whole matrices."""
        del context
        sent = _frozen(down)
        moving = {name: tensor for name, tensor in down.items() if name not in sent}
        if any(name.endswith(":rank") for name in down):
            with _whole_matrices(model, moving) as task:
                yield task
            return
        trained = trainable(moving)  # R as H (K, 1, r, r), head (K, ...)
        branches = trained | (sent or _frozen(memory))  # A (K, r, in), B (K, out, r)
        difference = partial(deltas, branches, self.scale)
        with mounted(model, branches, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), sent), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect R and head back, or in the first round factors of rank r of every layer."""
        expected = specs(plain_parameters(down))
        for module, entries in by_module(down).items():
            if "rank" in entries:
                out, width = state.server[f"{module}:shape"].tolist()
                expected[f"{module}:A"] = torch.empty(self.rank, width, device="meta")
                expected[f"{module}:B"] = torch.empty(out, self.rank, device="meta")
            else:
                expected[f"{module}:H"] = torch.empty(1, self.rank, self.rank, device="meta")
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average R and head; after the first round, find B and A."""
        if by_module(state.shared):
            # Exact: sum_k p_k (B R_k A) = B (sum_k p_k R_k) A, as all clients share B and A.
            return averaged(state, updates, self.weighting)
        products, others = mean_products(updates, self.weighting, compress=True)
        cores: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        for module, product in products.items():
            left, values, right = (tensor.float() for tensor in product.svd())
            # dW = U S V^T: B = U_r, A = V_r^T, and R starts as S_r.
            frozen[f"{module}:B"] = left[:, : self.rank].contiguous()
            frozen[f"{module}:A"] = right[: self.rank].contiguous()
            core = torch.diag(values[: self.rank] / self.scale)
            cores[f"{module}:H"] = core.unsqueeze(0)  # one head: (1, r, r)
        shared = {**state.shared, **others, **cores}
        server = {**state.server, **frozen}
        return replace(state, round=state.round + 1, shared=shared, server=server)


@contextmanager
def _whole_matrices(model: nn.Module, down: Payload) -> Iterator[LocalTask]:
    """Train a difference to every layer, from 0, and reply with its largest components.

    ``down``: ``<module>:rank``, (K, r, 0), and the head.
    """
    ranks: dict[str, int] = {}
    whole: dict[str, Tensor] = {}
    for module, entries in by_module(down).items():
        clients, ranks[module], _ = entries["rank"].shape
        shape = dense_shape(model, module)  # (out, in)
        whole[f"{module}:dense"] = torch.zeros(clients, *shape, device=entries["rank"].device)
    trained = trainable({**whole, **plain_parameters(down)})

    def reply() -> tuple[Payload, Payload]:
        up = detached(plain_parameters(trained))
        for module, rank in ranks.items():
            whole = trained[f"{module}:dense"].detach()
            up[f"{module}:B"], up[f"{module}:A"] = largest(whole, rank)
        return up, {}

    with mounted(model, trained):
        yield LocalTask(trained, reply, partial(mounted_deltas, trained, 1.0))


def _frozen(payload: Payload) -> dict[str, Tensor]:
    """Return the factors B and A in a payload."""
    return {name: tensor for name, tensor in payload.items() if name.endswith((":A", ":B"))}
