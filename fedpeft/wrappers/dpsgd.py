"""Differential privacy of single rows: bounded gradients and noise in every step (DP-SGD).

It is the client that adds the noise, so that nothing that leaves it tells of a single row. Source:
Abadi et al. 2016, algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Gt, Lt
from torch import nn

from fedpeft.algebra.averaging import MeanMerge, mean_merge
from fedpeft.errors import NotStackable, WireError
from fedpeft.mounting import mounting_for_copies
from fedpeft.privacy.accountant import Promise
from fedpeft.types import (
    Base,
    Client,
    Context,
    LocalTask,
    Method,
    Payload,
    RowNoise,
    State,
    Update,
)


@final
@dataclass(frozen=True)
class DPSGD:
    """Differential privacy of each row of a client's data, by noise in every step of its training.

    For every method. `training.steps` has to be set, and `training.batch_size` is what is expected
    of a step: each row is in it by itself, drawn from the operating system's randomness. The
    gradient of every row is bounded by itself. The epsilon so far of the client with the largest
    is in the ledger and in reports; it needs the extra `privacy`.
    """

    paper: ClassVar[str] = "DP-SGD: Abadi et al. 2016, arXiv 1607.00133"
    noise: Annotated[float, Gt(0)] = 1.0
    """Noise multiplier: standard deviation of the noise in a step's sum of gradients over `clip`.
    More noise, smaller epsilon."""
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    """The delta at which epsilon is told; well below 1 / rows of a client."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest L2 norm of the gradient of one row, all tensors together."""

    @property
    def promise(self) -> Promise:
        """Return what is accounted for."""
        return Promise("example", self.noise, self.delta, sampled=True)

    def around(self, method: Method, owner: str) -> Method:
        """Return ``method`` with noise in its clients' steps."""
        del owner  # nothing is kept on the server
        return Noisy(method, RowNoise(self.clip, self.noise))


@final
@dataclass(frozen=True)
class Noisy:
    """A method whose clients' steps hide the rows that they are made of."""

    paper: ClassVar[str] = DPSGD.paper
    inner: Method
    rows: RowNoise

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
        """Mount as the method inside does; the loop bounds gradients and adds noise.

        Where somebody trains and the method's tensors can be stacked, the rows of a pass may have
        copies of them.
        """
        with ExitStack() as undo:
            task: LocalTask | None = None
            if context.examples:
                try:
                    with mounting_for_copies():
                        inner = self.inner.mount(model, down, memory, context)
                        task = replace(undo.enter_context(inner), copies=True)
                except NotStackable:
                    pass  # one row after another
            if task is None:
                task = undo.enter_context(self.inner.mount(model, down, memory, context))
            _check_exact(task)
            yield replace(task, rows=self.rows)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect what the method inside expects."""
        return self.inner.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the method inside does."""
        return self.inner.receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge | None:
        """Merge as the method inside does."""
        return mean_merge(self.inner, round_number)


def _check_exact(task: LocalTask) -> None:
    """Raise WireError for what is trained in few digits: rounded, a row can exceed its bound."""
    for name, parameter in task.trainable.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise WireError(f"tensor {name!r} is {parameter.dtype}; dpsgd trains in float32")
