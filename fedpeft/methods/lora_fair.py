"""LoRA-FAIR: the averaged B is corrected so that its product is nearer to the true one.

Bian et al. 2024.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fedpeft.algebra.averaging import Mean, Weighting, weight_of
from fedpeft.algebra.products import ProductMean, mean_products
from fedpeft.methods.lora import LoRA
from fedpeft.mounting import Targets
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class LoRAFAIR:
    """Average A and B, then let the server move B so that B mean(A) comes near the mean of B A.

    The correction is the least-squares one, with a penalty on its size. Reconstruction: the paper
    measures nearness by an angle and descends on it.
    """

    paper: ClassVar[str] = "LoRA-FAIR: Bian et al. 2024, arXiv 2411.14961"
    targets: Targets = "attention"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    rank: Annotated[int, Ge(1)] = 8
    """Rank r of the adapters."""
    scale: Annotated[float, Gt(0)] = 1.0
    """What B A is multiplied by: alpha / r."""
    penalty: Annotated[float, Gt(0)] = 0.01
    """Weight of the correction's squared norm, as a share of the mean squared norm of A's rows.
    Reconstruction; the paper's weight is 0.01."""
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    @cached_property
    def lora(self) -> LoRA:
        """Return the method that this one is but for its merge."""
        return LoRA(self.targets, self.rank, self.scale, self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start as LoRA does: A random, B = 0."""
        return self.lora.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send mean(A), the corrected B, and the head."""
        return self.lora.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Mount as LoRA does; all factors and the head are trained and go up."""
        return self.lora.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect A, B and head back."""
        return self.lora.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average A, B and head, and correct B."""
        means = Mean()

        def noted() -> Iterator[Update]:
            """Pass on the updates, and average their factors on the way."""
            for update in updates:
                means.add(update.payload, weight_of(update, self.weighting))
                yield update

        products, _ = mean_products(noted(), self.weighting, compress=True)
        merged = means.result()
        for module, product in products.items():
            name = f"{module}:B"
            merged[name] = _corrected(product, merged[name], merged[f"{module}:A"], self.penalty)
        return replace(state, round=state.round + 1, shared={**state.shared, **merged})


def _corrected(product: ProductMean, B: Tensor, A: Tensor, penalty: float) -> Tensor:
    """Return B + dB, (out, r), with dB the minimum of |M - (B + dB) A|^2 + weight |dB|^2.

    M is the mean product, (out, in). As dB = 0 is among the candidates, |M - (B + dB) A| is never
    larger than |M - B A|. Ridge regression: dB = (M - B A) A^T (A A^T + weight I)^-1.
    """
    wide_B, wide_A = B.to(torch.float64), A.to(torch.float64)
    gram = wide_A @ wide_A.T  # (r, r)
    weight = penalty * gram.diagonal().mean()
    residual = product.times(wide_A.T) - wide_B @ gram  # (M - B A) A^T, (out, r)
    ridge = gram + weight * torch.eye(len(gram), dtype=gram.dtype)
    correction: Tensor = torch.linalg.solve(ridge, residual.T).T  # the ridge is symmetric
    return (wide_B + correction).to(B.dtype).contiguous()
