"""The seam of tasks: how texts become numbers, and how good a model's answers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from fedpeft.data.rows import Dataset, Rows

Batch = Mapping[str, Tensor]
"""Padded input of a forward pass, on the model's device: ``input_ids``, ``attention_mask``, ..."""

Prediction = Mapping[str, Tensor]
"""What a model says about one example: named tensors of the task's own."""

Counts = Mapping[str, Tensor]
"""What scoring counts: named sums. The sums of two groups of examples add up to those of both."""


@dataclass(frozen=True)
class Encoded:
    """Examples as numbers.

    ``ids``: the token ids of each, (length,) int64. ``labels``: the right answer to each, int64 of
    the task's own shape; in classification a single number, ().
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
    """A figure by which models are compared: its name, and which direction is better.

    ``share``: whether it and the task's other metrics, all but ``loss``, are shares of 1. Reports
    then write them in per cent.
    """

    name: str
    higher_is_better: bool = True
    share: bool = True


@dataclass(frozen=True)
class ModelForm:
    """The kind of model that a task runs on.

    ``auto_class``: name of the class of transformers that loads it. ``labels``: the names of its
    possible answers, in order. ``outputs``: how many numbers it returns at a position that the head
    reads. ``peft_type``: what peft calls the task. ``reads``: which positions the head reads, where
    the model family lets one choose: one that summarises the text, or every one.
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
        """The names of the possible answers, in the order of the model's outputs."""
        ...

    @property
    def metric(self) -> Metric:
        """The primary metric: it compares runs, sets targets and decides sweeps."""
        ...

    @property
    def form(self) -> ModelForm:
        """The kind of model that the task runs on."""
        ...

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the task with the tokenizer that was loaded with its model."""
        ...

    def unanswered(self, texts: Sequence[str]) -> Rows:
        """Return rows of texts without known answers, as a user gives them for prediction."""
        ...

    def encode(self, rows: Rows) -> Encoded:
        """Return rows as numbers, tokenised once."""
        ...

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a batch padded to its longest text, rounded up to ``pad_to_multiple_of``."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of every example, (n,), for training."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return the model's predictions: named tensors with the n examples on the first axis."""
        ...

    def score(self, predictions: Sequence[Prediction], examples: Encoded) -> Counts:
        """Count how good predictions are."""
        ...

    def no_counts(self) -> Counts:
        """Return the counts of no example; their shapes are those of any client's counts."""
        ...

    def metrics(self, counts: Counts) -> Mapping[str, float]:
        """Return the metrics that follow from ``counts``: the primary one, others, and ``loss``."""
        ...

    def fault(self, counts: Counts) -> str:
        """Return why ``counts``, from a client, cannot be true; empty where they can."""
        ...

    def trivial(self, dataset: Dataset, scored: Encoded) -> float | None:
        """Return the primary metric of an answer that ignores the text, None if there is none."""
        ...

    def answers(self, predictions: Sequence[Prediction]) -> Sequence[tuple[Any, ...]]:
        """Return each prediction for people to read, as a named tuple."""
        ...


def examples_in(counts: Counts) -> int:
    """Return how many examples were counted; every task counts them under ``examples``."""
    return int(counts["examples"])
