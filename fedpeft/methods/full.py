"""Full fine-tuning: every parameter is trained, sent and averaged.

FedAvg: McMahan et al. 2017, algorithm 1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.errors import BadInput
from fedpeft.mounting import detached, mounted, specs, trainable
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
