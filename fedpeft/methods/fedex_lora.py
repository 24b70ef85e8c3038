"""FedEx-LoRA: averaged factors, and what these miss goes into the base (Singhal et al. 2024)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.increments import (
    held,
    is_increment,
    missing,
    nothing_added,
    with_factors,
    with_matrices,
)
from fedpeft.algebra.products import ProductMean, mean_products
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import (
    Targets,
    detached,
    mounted,
    mounted_deltas,
    select,
    specs,
    trainable,
)
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class FedExLoRA:
    """Average A and B, and add mean(B A) - mean(B) mean(A) to every client's weights.

    So the average is exact, at the price of a residual that goes down with the rank of all clients
    together.
    """

    paper: ClassVar[str] = "FedEx-LoRA: Singhal et al. 2024, arXiv 2410.09432"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method whose start this one has."""
        return LoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does; nothing has been added to the base."""
        state = self.lora.init(base, seed)
        return replace(state, server=nothing_added(select(base, self.targets)))

    def send(self, state: State, client: Client) -> Payload:
        """Send A, B and head, and the residuals that the client has not added yet."""
        lacking = missing(state, client.memory)
        return {**state.shared, **lacking} if lacking else state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount the sum of all residuals, frozen, beside A and B; it stays with the client."""
        del context
        totals, is_new = held(down, memory)
        trained = trainable({n: tensor for n, tensor in down.items() if not is_increment(n)})
        branches: dict[str, Tensor] = dict(trained)  # A (K, r, in), B (K, out, r), head (K, ...)
        for name, total in totals.items():
            branches[name.replace(":total", ":dense")] = total  # (K, out, in)
        stays = totals if is_new else {}
        difference = partial(mounted_deltas, branches, self.scale)
        # W_0 + s (R + B A), R being the sum of the residuals.
        with mounted(model, branches, self.scale):
            yield LocalTask(trained, lambda: (detached(trained), stays), difference)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        del state
        return {name: spec for name, spec in specs(down).items() if not is_increment(name)}

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, and note by how much the product of the means is off."""
        means, weights = Mean(), list[float]()

        def noted() -> Iterator[Update]:
            """Pass on the updates, and average their factors on the way."""
            for update in updates:
                weights.append(weight_of(update, self.weighting))
                means.add(update.payload, weights[-1])
                yield update

        products, _ = mean_products(noted(), self.weighting)
        merged = means.result()
        if not merged:
            return replace(state, round=state.round + 1)
        shares = torch.tensor(weights) / sum(weights)  # p_k
        server = _with_residuals(state, products, merged, shares)
        shared = {**state.shared, **merged}
        return replace(state, round=state.round + 1, shared=shared, server=server)


def _with_residuals(
    state: State, products: dict[str, ProductMean], means: Payload, shares: Tensor
) -> dict[str, Tensor]:
    """Return what the server keeps with sum_k p_k B_k A_k - mean(B) mean(A) added to every layer.

    As factors while these are smaller than the matrices. ``shares``: p_k, (K,).
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for module, product in products.items():
        stack = product.factors()
        if stack is None:
            break
        B, A = stack  # [B_1 ... B_K], (out, K r), and [p_1 A_1; ...; p_K A_K], (K r, in)
        # mean(B) is [B_1 ... B_K] [p_1 I; ...], so p_k A_k - p_k mean(A) takes its product off.
        mean_A = means[f"{module}:A"]
        centred = A.view(len(shares), *mean_A.shape) - shares.view(-1, 1, 1) * mean_A
        factors[module] = B, centred.flatten(0, 1)
    if len(factors) == len(products):
        return with_factors(state, factors)
    matrices: dict[str, Tensor] = {}
    for module, product in products.items():
        matrices[module] = product.dense() - means[f"{module}:B"] @ means[f"{module}:A"]
    return with_matrices(state, matrices)
