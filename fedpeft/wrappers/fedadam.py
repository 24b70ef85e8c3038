"""FedAdam: Adam on the server (Reddi et al. 2021, algorithm 2)."""

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
class FedAdam:
    """Let the server take Adam's step, with the step to the mean as its gradient.

    m <- beta1 m + (1 - beta1) delta, v <- beta2 v + (1 - beta2) delta^2, and
    w <- w + rate' m / (sqrt(v) + tau).
    """

    paper: ClassVar[str] = "FedAdam: Reddi et al. 2021, arXiv 2003.00295"
    rate: Annotated[float, Gt(0)] = 0.01
    """The server's learning rate, about the largest step of one number. Reconstruction: the paper
    tunes it for each task."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the mean of steps that goes on."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Share of the mean of their squares that goes on."""
    tau: Annotated[float, Gt(0)] = 1e-3
    """What is added to the root: steps far below it are damped."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Return those of m, of v and of the number of steps."""
        return ("m/", "v/", "t/")

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with Adam on its server."""
        return ServerOptimizer(method, owner, self)

    def step(
        self, before: Tensor, delta: Tensor, kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a step; its rate is corrected as Flower does, which the paper leaves out.

        rate' = rate sqrt(1 - beta2^(t + 1)) / (1 - beta1^(t + 1)) in step t = 1, 2, ...
        """
        rest = torch.zeros_like(delta)
        m = self.beta1 * kept.get("m/", rest) + (1 - self.beta1) * delta
        v = self.beta2 * kept.get("v/", rest) + (1 - self.beta2) * delta.square()
        t = kept.get("t/", torch.tensor(0)) + 1
        power = int(t) + 1
        rate = self.rate * (1 - self.beta2**power) ** 0.5 / (1 - self.beta1**power)
        return before + rate * m / (v.sqrt() + self.tau), {"m/": m, "v/": v, "t/": t}
