"""Only the head is trained: a whole federated method in one file, explained in CONTRIBUTING.md."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from fedpeft.method_kit import (
    BadInput,
    Base,
    Client,
    Context,
    LocalTask,
    MeanMerge,
    Payload,
    State,
    Update,
    Weighting,
    averaged,
    detached,
    mounted,
    plain_mean,
    specs,
    trainable,
)


@final
@dataclass(frozen=True)
class HeadOnly:
    """Train, send and average the head alone; the pre-trained model stays a feature extractor."""

    paper: ClassVar[str] = "linear probing, from no paper"
    weighting: Weighting = "examples"
    """How clients are averaged: by their examples, or all alike."""

    def init(self, base: Base, seed: int) -> State:
        """Start from the head that was drawn from the seed."""
        del seed
        if not base.heads():
            raise BadInput("method.name: a language model has no head to train; choose 'lora'")
        return State(0, base.heads())

    def send(self, state: State, client: Client) -> Payload:
        """Send the head."""
        del client
        return state.shared

    @contextmanager
    def mount(
        self, model: nn.Module, down: Payload, memory: Payload, context: Context
    ) -> Iterator[LocalTask]:
        """Put the sent head in the place of the model's; it is trained and goes up."""
        del memory, context
        trained = trainable(down)
        with mounted(model, trained):
            yield LocalTask(trained, lambda: (detached(trained), {}))

    def expects(self, state: State, down: Payload) -> Payload:
        """Expect the head back."""
        del state
        return specs(down)

    def receive(self, state: State, updates: Iterable[Update]) -> State:
        """Average the heads."""
        return averaged(state, updates, self.weighting)

    def mean_merge(self, round_number: int) -> MeanMerge:
        """Return ``receive`` as a merge of means, around which every wrapper can go."""
        del round_number
        return plain_mean(self.weighting)
