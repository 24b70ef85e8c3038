"""Sparse fine-tuning under one random mask: SLoRA's first stage, alone (Babakniya et al. 2023, section 4)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from fedpeft.algebra.averaging import Weighting, averaged
from fedpeft.algebra.lowrank import by_module
from fedpeft.algebra.masks import positions, scatter
from fedpeft.errors import NotStackable
from fedpeft.mounting import (
    Targets,
    dense_layer,
    detached,
    mounted,
    oriented,
    replaced,
    select,
    specs,
    trainable,
)
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class Masked:
    """The difference of one layer: ``values``, (1, n), at flat positions ``where`` of an (out, in) matrix of 0."""

    values: Tensor
    where: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """Return the difference, (1, out, in)."""
        return scatter(self.values.squeeze(0), self.where, self.shape).unsqueeze(0)

    def factors(self) -> None:
        """Return None: a sparse difference has no factors of low rank."""
        return


@final
@dataclass(frozen=True)
class Sparse:
    """Train the differences to W_0 at seeded random positions, the same everywhere; no indices travel."""

    paper: ClassVar[str] = "SFT, stage 1 of SLoRA: Babakniya et al. 2023, arXiv 2308.06522"
    targets: Targets = "all-linear"
    """Which dense layers are adapted: `attention`, `all-linear`, a pattern or a list of endings."""
    density: Annotated[float, Gt(0), Le(1)] = 0.10
    """Share of each matrix that is trained; the 10 % that SLoRA prints for its first stage."""
    weighting: Weighting = "uniform"
    """How clients are averaged: all alike, as in SLoRA, or by their examples."""

    def init(self, base: Base, seed: int) -> State:
        """All differences are 0, so the model starts unchanged; the server keeps the seed of the mask and the shapes."""
        layers = select(base, self.targets)
        start = {
            f"{name}:values": weight.new_zeros(
                len(positions(weight.shape, self.density, seed, name))
            )
            for name, weight in layers.items()
        }
        extent = {f"{name}:shape": torch.tensor(weight.shape) for name, weight in layers.items()}
        return State(0, start | base.heads(), server={"seed": torch.tensor(seed), **extent})

    def differences(self, state: State) -> dict[str, Tensor]:
        """Return the (out, in) difference of every masked layer, by module name."""
        seed = int(state.server["seed"])
        found = {}
        for name, parts in by_module(state.shared).items():
            shape = torch.Size(state.server[f"{name}:shape"].tolist())
            found[name] = scatter(
                parts["values"], positions(shape, self.density, seed, name), shape
            )
        return found

    def send(self, state: State, client: Client) -> Payload:
        """Send the differences and the head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Let W_0 + difference stand in for every masked matrix; one client at a time, as whole matrices change."""
        del memory
        if len(context.clients) > 1:
            raise NotStackable(
                "sparse values cannot carry several clients at once; use a stack of 1"
            )
        trained = trainable(down)
        masked: dict[str, Masked] = {}
        for name in by_module(down):
            shape = dense_layer(model, name).shape
            where = positions(shape, self.density, context.seed, name).to(
                trained[f"{name}:values"].device
            )
            masked[name] = Masked(trained[f"{name}:values"], where, shape)
        weights = {
            f"{name}.weight": partial(_tuned, model, name, delta) for name, delta in masked.items()
        }
        head = {name: tensor for name, tensor in trained.items() if ":" not in name}
        with replaced(model, weights), mounted(model, head):
            yield LocalTask(trained, lambda: (detached(trained), {}), lambda: masked)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect the differences and the head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the differences and the head."""
        return averaged(state, updates, self.weighting)


def _tuned(model: nn.Module, name: str, delta: Masked, weight: Tensor) -> Tensor:
    """Return W_0 + difference, the way round in which the layer stores its ``weight`` W_0."""
    return weight + oriented(model, name, delta.dense()[0])
