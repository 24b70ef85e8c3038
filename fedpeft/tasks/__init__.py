"""What is learnt: rows -> examples -> batches -> losses and predictions -> counts -> metrics."""

from collections.abc import Mapping, Sequence

from fedpeft.tasks import causal_lm, classification, qa, tagging
from fedpeft.tasks.causal_lm import CausalLM
from fedpeft.tasks.choice import TaskSection
from fedpeft.tasks.classification import Classification
from fedpeft.tasks.qa import QuestionAnswering
from fedpeft.tasks.tagging import Tagging
from fedpeft.tasks.task import (
    Batch,
    Counts,
    Encoded,
    Example,
    Metric,
    ModelForm,
    Prediction,
    SourceForm,
    Task,
    TaskKind,
    examples_in,
)
from fedpeft.tasks.token_cache import TokenCache

TASKS: Mapping[str, TaskKind] = {
    "classification": classification.KIND,
    "tagging": tagging.KIND,
    "qa": qa.KIND,
    "causal_lm": causal_lm.KIND,
}
"""Every task that ``task.kind`` can name."""


def make_task(choice: TaskSection, names: Sequence[str], max_length: int) -> Task:
    """Return the task that the settings choose; its tokenizer comes with its model.

    ``names``: of its possible answers, in order. ``max_length``: of a text, in tokens.
    """
    return TASKS[choice.kind].make(choice, tuple(names), max_length)


__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Classification",
    "Counts",
    "Encoded",
    "Example",
    "Metric",
    "ModelForm",
    "Prediction",
    "QuestionAnswering",
    "SourceForm",
    "Tagging",
    "Task",
    "TaskKind",
    "TaskSection",
    "TokenCache",
    "examples_in",
    "make_task",
]
