"""Full fine-tuning: every parameter is trained, sent and averaged.

FedAvg: McMahan et al. 2017, algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.algebra.lowrank import by_module
from fedpeft.errors import BadInput
from fedpeft.mounting import Targets, detached, mounted, select, specs, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class Full:
    """Train, send and average every parameter of the model.

    The yardstick in accuracy and the worst case in bytes.
    """

    paper: ClassVar[str] = "FedAvg: McMahan et al. 2017, arXiv 1602.05629"
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from the pre-trained parameters and the head drawn from the seed.

        A base whose weights take 4 or 8 bits raises BadInput.
        """
        del seed  # the head in ``base`` has been drawn from it already
        if base.packed:
            raise BadInput(
                "method.name = 'full' trains every weight, and model.bits keeps those of dense "
                "layers in a few bits; choose 'lora', or leave model.bits out"
            )
        return State(0, dict(base.parameters))

    def send(self, state: State, client: Client) -> Payload:
        """Send every parameter."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Put the sent parameters in the place of the model's; all are trained and go up."""
        del memory, context
        trained = trainable(down)  # (K, ...): w_t of ClientUpdate(k, w_t)
        with mounted(model, trained):
            yield LocalTask(trained, lambda: (detached(trained), {}))

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect every parameter back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the parameters."""
        # Algorithm 1, last line of a round: w_{t+1} = sum_k n_k / n * w_{t+1}^k.
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)


@final
@dataclass(frozen=True)
class FullStage:
    """Full fine-tuning as a first stage, of which the server can tell how far matrices have moved.

    It keeps W_0 of the layers that ``targets`` choose, (out, in), whether the model stores the
    transpose, the names of the head, and the seed.
    """

    paper: ClassVar[str] = Full.paper
    targets: Targets
    weighting: Weighting

    @property
    def whole(self) -> Full:
        """Return the method that trains every parameter."""
        return Full(self.weighting)

    def init(self, base: Base, seed: int) -> State:
        """Start from the pre-trained parameters; BadInput where they take a few bits."""
        if base.packed:
            raise BadInput(
                "method.stage1_method = 'full' trains every weight, and model.bits keeps those of "
                "dense layers in a few bits; choose 'sparse', or leave model.bits out"
            )
        server = {"seed": torch.tensor(seed)}
        for name, matrix in select(base, self.targets).items():
            stored = base.parameters[f"{name}.weight"]
            server[f"{name}:W0"] = matrix
            server[f"{name}:transposed"] = torch.tensor(not torch.equal(stored, matrix))
        for name in sorted(base.head):
            server[f"{name}:head"] = torch.empty(0)
        return replace(self.whole.init(base, seed), server=server)

    def differences(self, state: State) -> dict[str, Tensor]:
        """Return the (out, in) difference of every adapted layer to W_0, by module name."""
        differences: dict[str, Tensor] = {}
        for name, kept in by_module(state.server).items():
            if "W0" in kept:
                stored = state.shared[f"{name}.weight"]
                matrix = stored.t() if kept["transposed"] else stored
                differences[name] = matrix - kept["W0"]
        return differences

    def head(self, state: State) -> dict[str, Tensor]:
        """Return the parameters of the head."""
        return {n: tensor for n, tensor in state.shared.items() if f"{n}:head" in state.server}

    def send(self, state: State, client: Client) -> Payload:
        """Send every parameter."""
        return self.whole.send(state, client)

    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> AbstractContextManager[LocalTask]:
        """Put the sent parameters in the place of the model's."""
        return self.whole.mount(model, down, memory, context)

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect every parameter back."""
        return self.whole.expects(state, down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the parameters."""
        return self.whole.receive(state, updates)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        return self.whole.mean_merge(round_number)
