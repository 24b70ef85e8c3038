"""FLoRA: the adapters of all clients, of any rank, are stacked into the base (Wang et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting
from fedpeft.algebra.increments import held, missing, nothing_added, with_factors, with_matrices
from fedpeft.algebra.lowrank import check_ranks, uniform
from fedpeft.algebra.products import ProductMean, mean_products
from fedpeft.algebra.ranks import share_of
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
from fedpeft.seeds import derive
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FLoRA:
    """Start a fresh adapter every round and add the mean of the clients' products to their weights.

    Exact for unequal ranks: a client's rank is its capacity's share of ``rank``. What goes down
    grows with the number of clients, and a late joiner needs all that was ever added.
    """

    paper: ClassVar[str] = "FLoRA: Wang et al. 2024, arXiv 2409.05976"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of a client of full capacity."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r, the same for all ranks."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from the head alone; nothing has been added to the base."""
        del seed  # clients draw their adapters from it themselves
        layers = select(base, self.targets)
        check_ranks(layers, self.rank)
        return State(0, base.heads(), server=nothing_added(layers))

    def send(self, state: State, client: Client) -> Payload:
        """Send the client's rank, the head, and the stacks that the client has not added yet."""
        # A shape says which layers are adapted and at which rank, and clients of unequal ranks do
        # not train as one stack: ``<module>:rank``, (r, 0), holds no number at all.
        rank = share_of(client, self.rank)
        ranks: dict[str, Tensor] = {}
        for name in state.server:
            module, _, entry = name.partition(":")
            if entry == "total":
                ranks[f"{module}:rank"] = _marker(rank)
        return {**state.shared, **ranks, **missing(state, client.memory)}

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Add what was sent to the total that the client keeps; mount it beside a fresh adapter."""
        totals, is_new = held(down, memory)
        head = plain_parameters(down)
        fresh: dict[str, Tensor] = {}
        for name, tensor in down.items():
            module, _, entry = name.partition(":")
            if entry == "rank":
                rank = tensor.shape[1]  # (K, r, 0)
                A, B = _fresh(module, dense_shape(model, module), rank, context)
                fresh |= {f"{module}:A": A.to(tensor.device), f"{module}:B": B.to(tensor.device)}
        trained = trainable({**fresh, **head})  # A (K, r, in), B (K, out, r), head (K, ...)
        branches: dict[str, Tensor] = dict(trained)
        for name, total in totals.items():
            branches[name.replace(":total", ":dense")] = total  # (K, out, in)
        stays = totals if is_new else {}
        difference = partial(mounted_deltas, branches, self.scale)
        with mounted(model, branches, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), stays), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect a head, and A and B of the client's rank."""
        expected = specs(plain_parameters(down))
        for name, tensor in down.items():
            module, _, entry = name.partition(":")
            if entry == "rank":
                out, width = state.server[f"{module}:total"].shape
                rank = len(tensor)
                expected[f"{module}:A"] = torch.empty(rank, width, device="meta")
                expected[f"{module}:B"] = torch.empty(out, rank, device="meta")
        return expected

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the head; stack B_k and p_k A_k of all clients."""
        products, others = mean_products(updates, self.weighting)
        if not products:
            return replace(state, round=state.round + 1)
        server = _with_products(state, products)
        shared = {**state.shared, **others}
        return replace(state, round=state.round + 1, shared=shared, server=server)


@cache
def _marker(rank: int) -> Tensor:
    """Return the tensor that says which rank a client trains, (rank, 0), without a number in it."""
    return torch.zeros(rank, 0)


def _fresh(module: str, shape: torch.Size, rank: int, context: Context) -> tuple[Tensor, Tensor]:
    """Return (A, B) of every client's new adapter, (K, rank, in) and (K, out, rank), B = 0.

    Each client has another A, so that their stack has the sum of their ranks.
    """
    out, width = shape
    drawn: list[Tensor] = []
    for client in context.clients:
        seed = derive(context.seed, "flora", client, context.round)
        drawn.append(uniform(rank, width, seed, module))
    A = torch.stack(drawn)
    return A, A.new_zeros(len(A), out, rank)


def _with_products(state: State, products: dict[str, ProductMean]) -> dict[str, Tensor]:
    """Return what the server keeps with the mean product added to every layer."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module, product in products.items():
        stack = product.factors()
        if stack is not None:
            factors[module] = stack
    if len(factors) == len(products):
        return with_factors(state, factors)
    return with_matrices(state, {module: mean.dense() for module, mean in products.items()})
