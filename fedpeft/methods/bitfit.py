"""BitFit: only the biases and the head are trained (Ben Zaken et al. 2021).

FeDeRA's comparison calls it FedBF.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from fedpeft.algebra.averaging import MeanMerge, Weighting, averaged, plain_mean
from fedpeft.errors import BadInput
from fedpeft.mounting import detached, mounted, specs, trainable
from fedpeft.types import Base, Client, Context, LocalTask, Payload, State, Update


@final
@dataclass(frozen=True)
class BitFit:
    """Train, send and average the bias vectors and the head."""

    paper: ClassVar[str] = "BitFit: Ben Zaken et al. 2021, arXiv 2106.10199"
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples (FedAvg), or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from the pre-trained biases; a model without any raises BadInput."""
        del seed
        biases: dict[str, Tensor] = {}
        for name, parameter in base.parameters.items():
            if name.endswith(".bias"):
                biases[name] = parameter
        # The head is trained whatever the method is: its bias alone would not be BitFit.
        if not biases.keys() - base.head:
            raise BadInput(
                "method.name = 'bitfit' matches nothing: the model has no biases; "
                "choose 'lora' or 'full'"
            )
        return State(0, biases | base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send biases and head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Put the sent biases in the place of the model's; all are trained and go up."""
        del memory, context
        trained = trainable(down)  # biases (K, width), head (K, ...)
        with mounted(model, trained):
            yield LocalTask(trained, lambda: (detached(trained), {}))

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect biases and head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average biases and head."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means."""
        del round_number
        return plain_mean(self.weighting)
