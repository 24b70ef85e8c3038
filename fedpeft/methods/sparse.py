"""Sparse fine-tuning under one random mask: SLoRA's first stage, alone.

Babakniya et al. 2023, section 4.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import by_module
from fedpeft.algebra.masks import Masked, positions, scatter
from fedpeft.errors import WireError
from fedpeft.mounting import (
    Targets,
    check_alone,
    check_dtypes,
    dense_shape,
    detached,
    mounted,
    plain_parameters,
    select,
    shifted,
    specs,
    trainable,
)
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class Sparse:
    """Train the differences to W_0 at random positions.

    They are drawn from the seed, the same for all clients and rounds, so no indices travel.
    """

    paper: ClassVar[str] = "SFT, stage 1 of SLoRA: Babakniya et al. 2023, arXiv 2308.06522"
    targets: Targets = "all-linear"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    density: Annotated[float, Gt(0), Le(1)] = 0.10
    """Share of each matrix that is trained; the 10 % that SLoRA prints for its first stage."""
    weighting: Weighting = "uniform"
    """How clients are averaged: all alike, as in SLoRA, or by their examples."""

    def init(self, base: Base, seed: int) -> State:
        """Start from differences of 0, so that the model is unchanged.

        The server keeps the seed of the mask and the shapes of the layers.
        """
        layers = select(base, self.targets)
        start: dict[str, Tensor] = {}
        # What the server needs later to redraw the mask without the model.
        mask = {"seed": torch.tensor(seed)}
        for name, weight in layers.items():
            where = positions(weight.shape, self.density, seed, name)
            start[f"{name}:values"] = weight.new_zeros(len(where))  # (n,), n = density * out * in
            mask[f"{name}:shape"] = torch.tensor(weight.shape)
        return State(0, start | base.heads(), server=mask)

    def differences(self, state: State) -> dict[str, Tensor]:
        """Return the (out, in) difference of every masked layer, by module name."""
        seed = int(state.server["seed"])
        differences: dict[str, Tensor] = {}
        for name, entries in by_module(state.shared).items():
            shape = torch.Size(state.server[f"{name}:shape"].tolist())
            where = positions(shape, self.density, seed, name)
            differences[name] = scatter(entries["values"], where, shape)  # W_t - W_0
        return differences

    def head(self, state: State) -> dict[str, Tensor]:
        """Return the parameters of the head."""
        return plain_parameters(state.shared)

    def send(self, state: State, client: Client) -> Payload:
        """Send the differences and the head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Let W_0 + difference stand in for every masked matrix.

        One client at a time, as whole matrices change: more raise NotStackable.
        """
        del memory
        check_alone(context, "sparse values")
        check_dtypes(model, down)
        trained = trainable(down)  # values (1, n), head (1, ...)
        masked: dict[str, Masked] = {}
        differences: dict[str, Callable[[], Tensor]] = {}
        for name in by_module(down):
            values = trained[f"{name}:values"]
            shape = dense_shape(model, name)
            # Redrawn from the run's seed this is the server's mask, and no indices travel.
            where = positions(shape, self.density, context.seed, name).to(values.device)
            if values.shape[1:] != where.shape:
                size, fitting = tuple(values.shape), tuple(where.shape)
                raise WireError(f"{name}:values is {size}; {fitting} after a client axis would fit")
            masked[name] = Masked(values, where, shape)
            differences[name] = partial(_matrix, masked[name])
        head = plain_parameters(trained)
        # W_0 + difference is made anew in every pass, so the gradient comes to the values alone.
        with shifted(model, differences), mounted(model, head):
            yield LocalTask(trained, lambda: (detached(trained), {}), lambda: masked)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect the differences and the head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the differences and the head."""
        # All clients train the same entries: the mean of the values is that of the matrices.
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)


def _matrix(delta: Masked) -> Tensor:
    """Return a difference as a matrix, (out, in)."""
    return delta.dense()[0]
