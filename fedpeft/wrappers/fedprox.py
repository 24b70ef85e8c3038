"""FedProx: a pull back to the parameters that the server sent (Li et al. 2020, equation 2)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, mean_merge
from fedpeft.types import Base, Client, Context, LocalTask, Method, Payload, State, Update


@final
@dataclass(frozen=True)
class FedProx:
    """Add mu / 2 * |w - w_0|^2 to every client's loss, w_0 being what it began the round with."""

    paper: ClassVar[str] = "FedProx: Li et al. 2020, arXiv 1812.06127"
    mu: Annotated[float, Ge(0)] = 0.01
    """Weight of the term; 0 changes nothing. The paper tries 0.001 to 1."""

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with the proximal term in its clients' training."""
        del owner  # nothing is kept on the server
        return Proximal(method, self.mu)


@final
@dataclass(frozen=True)
class Proximal:
    """A method whose clients are pulled back to the parameters that they began the round with."""

    paper: ClassVar[str] = FedProx.paper
    inner: Method
    mu: float

    def init(self, base: Base, seed: int) -> State:
        """Begin as the method inside does."""
        return self.inner.init(base, seed)

    def send(self, state: State, client: Client) -> Payload:
        """Send what the method inside sends."""
        return self.inner.send(state, client)

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Mount as the method inside does; add the term's gradient after every backward pass."""
        with self.inner.mount(model, down, memory, context) as task:
            # w_0, (K, ...) each; copies, since training changes the parameters in place.
            begin = {name: tensor.detach().clone() for name, tensor in task.trainable.items()}

            def after_backward(active: slice) -> None:
                # Before the method's own hook, which may read the gradients (FedARA's scores do).
                pull(task.trainable, begin, active, self.mu)
                task.after_backward(active)

            yield replace(task, after_backward=after_backward)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        return self.inner.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the method inside does."""
        return self.inner.receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Merge as the method inside does."""
        return mean_merge(self.inner, round_number)


@torch.no_grad()
def pull(
    trainable: Mapping[str, nn.Parameter], begin: Mapping[str, Tensor], active: slice, mu: float
) -> None:
    """Add mu * (w - w_0), the term's gradient, to the gradients of the ``active`` clients.

    A tensor without a gradient, such as one that the loss does not reach, is left alone.
    """
    for name, parameter in trainable.items():
        if parameter.grad is not None:
            distance = parameter[active] - begin[name][active]
            parameter.grad[active] += mu * distance
