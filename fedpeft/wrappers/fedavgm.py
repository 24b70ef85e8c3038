"""FedAvgM: momentum on the server (Hsu et al. 2019, section 4.3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedpeft.types import Method
from fedpeft.wrappers.server_optimizer import ServerOptimizer


@final
@dataclass(frozen=True)
class FedAvgM:
    """Let the server step along v <- momentum * v + (mean - w) instead of to the mean."""

    paper: ClassVar[str] = "FedAvgM: Hsu et al. 2019, arXiv 1909.06335"
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last step that goes on; 0 with rate 1 is the method inside."""
    rate: Annotated[float, Gt(0)] = 1.0
    """The server's learning rate."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Return the one of the velocity, which stands under the tensor's own name."""
        return ("",)

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with momentum on its server."""
        return ServerOptimizer(method, owner, self)

    def step(
        self, before: Tensor, delta: Tensor, kept: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Step along the velocity: Hsu et al. subtract one of w - mean, this adds mean - w."""
        velocity = delta + self.momentum * kept[""] if kept else delta
        return before + self.rate * velocity, {"": velocity}
