"""What a task is to everything else: texts in, numbers out, and how good an answer was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from fedpeft.data.rows import Dataset, Rows

Batch = Mapping[str, Tensor]
"""What one pass of the model takes, padded, on its device: ``input_ids``, ``attention_mask``, ..."""

Prediction = Mapping[str, Tensor]
"""What a model says about one example: named tensors of the task's own."""

Counts = Mapping[str, Tensor]
"""What scoring counts: named sums. Those of two groups of examples add up to those of both."""


@dataclass(frozen=True)
class Encoded:
    """Examples as numbers.

    ``ids``: the token ids of each, (length,) int64. ``labels``: what is to be said about each,
    int64 of the task's own shape; of a classification one number, ().
    """

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> "Encoded":
        """Return the examples at ``rows``, in that order."""
        return Encoded([self.ids[row] for row in rows], [self.labels[row] for row in rows])


@dataclass(frozen=True)
class Metric:
    """A figure by which models are compared: its name, and which way is better.

    ``share``: whether it is a share of 1, which reports write in per cent, as they then do the
    other metrics that the task gives beside it, all but ``loss``.
    """

    name: str
    higher_is_better: bool = True
    share: bool = True


@dataclass(frozen=True)
class ModelForm:
    """The kind of model that a task runs on.

    ``auto_class``: name of the class of transformers that loads it. ``labels``: the names of what
    it can say, in order; ``outputs``: how many numbers it gives where it says something.
    ``peft_type``: what peft calls the task. ``reads``: the positions that the head reads, where the
    family lets it choose: one that sums a text up, or every one.
    """

    auto_class: str
    labels: tuple[str, ...]
    outputs: int
    peft_type: str
    reads: Literal["summary", "every"]


class Task(Protocol):
    """What is learnt. A frozen dataclass; nothing outside ``tasks/`` knows which one it is.

    Rows become ``Encoded`` examples once; batches of them go through the model; training asks for a
    loss of every example; evaluation asks for predictions, counts how good they are, and turns
    counts into metrics.
    """

    @property
    def labels(self) -> Sequence[str]:
        """The names of what can be said, in the order of the model's outputs."""
        ...

    @property
    def metric(self) -> Metric:
        """The primary metric: by it runs are compared, targets set and sweeps decided."""
        ...

    @property
    def form(self) -> ModelForm:
        """The kind of model that the task runs on."""
        ...

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the task with the tokenizer that was loaded with its model."""
        ...

    def unanswered(self, texts: Sequence[str]) -> Rows:
        """Return rows of which only the question is known, as a user gives them to predict."""
        ...

    def encode(self, rows: Rows) -> Encoded:
        """Return rows as numbers, tokenised once."""
        ...

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a batch padded to its longest text, or beyond it to a multiple of a number."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of every example, (n,), for training."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return what the model says: named tensors with the n examples along the first axis."""
        ...

    def score(self, predictions: Sequence[Prediction], examples: Encoded) -> Counts:
        """Count how good predictions are."""
        ...

    def no_counts(self) -> Counts:
        """Return the counts of no example, which have the shapes of any client's."""
        ...

    def metrics(self, counts: Counts) -> Mapping[str, float]:
        """Return the metrics of what was counted: the primary one, then others, and ``loss``."""
        ...

    def fault(self, counts: Counts) -> str:
        """Return why ``counts``, from a client, cannot be true; empty where they can."""
        ...

    def trivial(self, dataset: Dataset, scored: Encoded) -> float | None:
        """Return the primary metric of an answer that ignores the text; None where there is none."""
        ...

    def answers(self, predictions: Sequence[Prediction]) -> Sequence[tuple[Any, ...]]:
        """Return each prediction for people to read, as a named tuple."""
        ...


def examples_in(counts: Counts) -> int:
    """Return how many examples were counted; every task counts them under ``examples``."""
    return int(counts["examples"])
