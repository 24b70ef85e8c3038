"""The seam of tasks: how texts become numbers, and how good a model's answers are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, Self, overload

import torch
from torch import Tensor, nn

from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Schema
from fedpeft.errors import BadInput
from fedpeft.tasks.choice import TaskSection

Batch = Mapping[str, Tensor]
"""Padded input of a forward pass, on the model's device: ``input_ids``, ``attention_mask``, ..."""

Prediction = Mapping[str, Tensor]
"""What a model says about one example: named tensors of the task's own."""

TRIAL = ("a", "some more words, so that the first text is padded")
"""Texts on which a model is tried: two of unequal length, so that padding is tried as well."""

Counts = Mapping[str, Tensor]
"""What scoring counts: named sums. The sums of two groups of examples add up to those of both."""


@dataclass(frozen=True)
class Example:
    """A passage of text as numbers: one row of a batch.

    ``ids``: its token ids, (length,) int64. ``labels``: the right answer, int64 of the task's own
    shape; in a classification a single number, (). ``row``: the row of the split that it comes
    from; a task may cut a long row into several examples. ``segments``: for each token which of two
    texts it belongs to, (length,); None where the model makes no difference. ``weight``: how much
    its loss counts in the mean of a step; as in transformers the number of its labels where each
    token may have one. ``source``: what the task needs to judge an answer besides numbers.
    """

    ids: Tensor
    labels: Tensor
    row: int = 0
    segments: Tensor | None = None
    weight: int = 1
    source: Any = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded(Sequence[Example]):
    """The examples of a split, of a client or of a batch.

    ``notes``: what the user should know of rows that were passed over, a line each.

    >>> first, second = (Example(torch.tensor([1]), torch.tensor(0), row) for row in (0, 1))
    >>> [example.row for example in Encoded([first, second]).of_rows([1])]
    [1]
    """

    examples: Sequence[Example]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Encoded": ...
    def __getitem__(self, index: int | slice) -> "Example | Encoded":
        if isinstance(index, slice):
            return Encoded(self.examples[index])
        return self.examples[index]

    def take(self, indices: Iterable[int]) -> "Encoded":
        """Return the examples at ``indices``, in that order."""
        return Encoded([self.examples[index] for index in indices])

    def of_rows(self, rows: Iterable[int]) -> "Encoded":
        """Return the examples that come from ``rows`` of the split, in that order."""
        chosen: list[Example] = []
        for row in rows:
            chosen += self._by_row.get(row, [])
        return Encoded(chosen)

    @property
    def num_rows(self) -> int:
        """From how many rows of the split they come."""
        return len(self._by_row)

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each."""
        return [len(example) for example in self.examples]

    @cached_property
    def _by_row(self) -> dict[int, list[Example]]:
        by_row: dict[int, list[Example]] = {}
        for example in self.examples:
            by_row.setdefault(example.row, []).append(example)
        return by_row


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
    possible answers, in order; empty where answers have no names. ``outputs``: how many numbers it
    returns at a position that the head reads. ``peft_type``: what peft calls the task. ``reads``:
    which positions the head reads, where the model family lets one choose: one that summarises the
    text, or every one. ``head_is_trained``: whether the output module belongs to the task, which
    trains it; otherwise it belongs to the frozen base, as that of a language model does.
    """

    auto_class: str
    labels: tuple[str, ...]
    outputs: int
    peft_type: str
    reads: Literal["summary", "every"]
    head_is_trained: bool = True


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

    def unanswered(self, texts: Sequence[str], context: str | None = None) -> Rows:
        """Return rows of texts without known answers, as a user gives them for prediction.

        ``context``: the second text of a pair, or the passage that answers are in. BadInput where
        the task needs one and there is none, or the other way round.
        """
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
        """Return the mean loss of every example, (n,), for training."""
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

    def to_score(self, examples: Encoded) -> Encoded:
        """Return what is predicted and scored for ``examples``: these, and maybe others of theirs.

        Such as prompts alone, where responses are generated.
        """
        ...

    def trial(self, model: nn.Module, device: torch.device) -> str:
        """Return what is wrong with what ``model`` says of two short texts, empty if nothing.

        It tells users to choose another model. Errors of the model are raised.
        """
        ...

    def answers(
        self, predictions: Sequence[Prediction], examples: Encoded
    ) -> Sequence[tuple[Any, ...]]:
        """Return what is predicted of each row, for people to read, as a named tuple."""
        ...


class MakeTask(Protocol):
    """What makes a task."""

    def __call__(self, choice: TaskSection, names: tuple[str, ...], max_length: int) -> Task:
        """Return the task without a tokenizer yet; BadInput where it cannot be as ``choice`` says.

        ``names``: of its possible answers, in order. ``max_length``: of a text, in tokens.
        """
        ...


@dataclass(frozen=True)
class SourceForm:
    """How the sources of examples are kept in a file, so that encodings can be.

    ``pack``: sources, in order -> a value that JSON can hold, and tensors of whole numbers by name.
    ``unpack``: these -> the sources.
    """

    pack: Callable[[Sequence[Any]], tuple[Any, Mapping[str, Tensor]]]
    unpack: Callable[[Any, Mapping[str, Tensor]], Sequence[Any]]


@dataclass(frozen=True)
class TaskKind:
    """What can be known of a kind of task before there is a model.

    ``schema``: the columns that it reads. ``names``: a data set -> the names of the possible
    answers, in the order of the model's outputs; BadInput where they make no task.
    ``sources``: how these are kept in a file; None where examples have none.
    """

    schema: Schema
    names: Callable[[Dataset], tuple[str, ...]]
    make: MakeTask
    sources: SourceForm | None = None


def primary(choice: TaskSection, metrics: Sequence[Metric]) -> Metric:
    """Return which of ``metrics`` the settings choose, by default the first."""
    for metric in metrics:
        if choice.metric in (None, metric.name):
            return metric
    names = ", ".join(metric.name for metric in metrics)
    raise BadInput(f"task.metric = {choice.metric!r}: a {choice.kind} task has {names}")


def check_fast(tokenizer: Any, kind: str, knows: str) -> None:
    """Raise BadInput for a tokenizer without a fast version.

    ``kind``: the task that needs one, as it alone says what ``knows`` names.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"task.kind = {kind!r}: {type(tokenizer).__name__} has no fast version, which alone "
            f"says {knows}; choose another model"
        )


def misfit(
    task: Task, model: nn.Module, device: torch.device, kind: str, context: str | None = None
) -> str:
    """Return what is wrong where ``model`` has no output for each answer, of two short texts.

    ``kind``: of the model that the task needs. ``context``: beside the texts, where it needs one.
    """
    examples = task.encode(task.unanswered(TRIAL, context))
    # Has it a row for each text and a column for each answer, (2, ..., outputs)?
    for name, tensor in task.predict(model, task.collate(examples, device)).items():
        if len(tensor) != len(examples) or tensor.shape[-1] != task.form.outputs:
            shape = f"{tuple(tensor.shape)} {name}"
            why = f"it gives {shape} for {len(examples)} texts and {task.form.outputs} labels"
            return f"{why}; choose {kind}"
    return ""


def examples_in(counts: Counts) -> int:
    """Return how many examples were counted; every task counts them under ``examples``."""
    return int(counts["examples"])
