"""FedYogi: Yogi on the server (Reddi et al. 2021, algorithm 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedpeft.types import Method
from fedpeft.wrappers.server_optimizer import ServerOptimizer


@final
@dataclass(frozen=True)
class FedYogi:
    """Let the server take Yogi's step, with the step to the mean as its gradient.

    m <- beta1 m + (1 - beta1) delta, v <- v - (1 - beta2) delta^2 sign(v - delta^2), and
    w <- w + rate m / (sqrt(v) + tau): as FedAdam, but v grows and shrinks by limited amounts.
    """

    paper: ClassVar[str] = "FedYogi: Reddi et al. 2021, arXiv 2003.00295"
    rate: Annotated[float, Gt(0)] = 0.01
    """The server's learning rate, about the largest step of one number. Reconstruction: the paper
    tunes it for each task."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the mean of steps that goes on."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """1 minus the share of a squared step by which v changes at most."""
    tau: Annotated[float, Gt(0)] = 1e-3
    """What is added to the root: steps far below it are damped."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Return those of m and of v."""
        return ("m/", "v/")

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with Yogi on its server."""
        return ServerOptimizer(method, owner, self)

    def step(
        self, before: Tensor, delta: Tensor, kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a step; m and v begin at 0, as in Flower."""
        rest, square = torch.zeros_like(delta), delta.square()
        m = self.beta1 * kept.get("m/", rest) + (1 - self.beta1) * delta
        v = kept.get("v/", rest)
        v = v - (1 - self.beta2) * square * (v - square).sign()
        return before + self.rate * m / (v.sqrt() + self.tau), {"m/": m, "v/": v}
