"""What is learnt: rows -> examples -> batches -> losses and predictions -> counts -> metrics."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from fedpeft.tasks.classification import Classification
from fedpeft.tasks.task import (
    Batch,
    Counts,
    Encoded,
    Metric,
    ModelForm,
    Prediction,
    Task,
    examples_in,
)


class MakesTask(Protocol):
    """Makes a task from the names of its labels and the length of the longest text, in tokens."""

    def __call__(self, labels: tuple[str, ...], max_length: int) -> Task:
        """Return the task, without a tokenizer yet."""
        ...


TASKS: Mapping[str, MakesTask] = {"classification": Classification}
"""Every task that ``task.kind`` can name."""


def make_task(kind: str, labels: Sequence[str], max_length: int) -> Task:
    """Return the task called ``kind``; its tokenizer comes with its model."""
    return TASKS[kind](tuple(labels), max_length)


__all__ = [
    "TASKS",
    "Batch",
    "Classification",
    "Counts",
    "Encoded",
    "Metric",
    "ModelForm",
    "Prediction",
    "Task",
    "examples_in",
    "make_task",
]
