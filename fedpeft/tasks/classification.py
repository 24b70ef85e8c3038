"""Classification of a text, or of a pair of texts: one label each, cross-entropy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpeft.data.rows import Dataset, Rows
from fedpeft.data.schema import Column, Schema, text
from fedpeft.errors import BadInput
from fedpeft.tasks.choice import TaskSection
from fedpeft.tasks.padding import inputs, read_by_model, width_of
from fedpeft.tasks.task import (
    Batch,
    Counts,
    Encoded,
    Example,
    Metric,
    ModelForm,
    Prediction,
    TaskKind,
    misfit,
    primary,
)

METRICS: Final = (Metric("accuracy"), Metric("macro_f1"), Metric("matthews"))
"""Shares of 1, the last from -1 to 1."""


class Label(NamedTuple):
    """The likeliest label of a text and its probability."""

    label: str
    probability: float


@final
@dataclass(frozen=True)
class Classification:
    """Classify texts, or pairs of texts, of at most ``max_length`` tokens into ``labels``."""

    labels: tuple[str, ...]
    max_length: int
    metric: Metric = METRICS[0]
    tokenizer: Any = None

    @property
    def form(self) -> ModelForm:
        """A classifier of sequences with our labels, whose head reads one position."""
        return ModelForm(
            auto_class="AutoModelForSequenceClassification",
            labels=self.labels,
            outputs=len(self.labels),
            peft_type="SEQ_CLS",
            reads="summary",
        )

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Return the task with the tokenizer that was loaded with its model."""
        return replace(self, tokenizer=tokenizer)

    def unanswered(self, texts: Sequence[str], context: str | None = None) -> Rows:
        """Return rows of ``texts``, each paired with ``context`` if there is one.

        Their labels say nothing.
        """
        columns = {"text": tuple(texts)}
        if context is not None:
            columns["text2"] = (context,) * len(texts)
        return Rows(columns, (self.labels[0],) * len(texts))

    def encode(self, rows: Rows) -> Encoded:
        """Return texts and labels as numbers, tokenised once."""
        if not len(rows):
            return Encoded([])
        class_of = {label: index for index, label in enumerate(self.labels)}
        columns = [list(column) for column in rows.columns.values()]  # text, and text2 of pairs
        tokens = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        examples: list[Example] = []
        for row, label in enumerate(rows.labels):
            # An empty text may have no token at all, but a model needs one position to read.
            ids = tokens["input_ids"][row] or [self.tokenizer.pad_token_id]
            segments = None
            if len(columns) == 2 and "token_type_ids" in tokens:
                segments = torch.tensor(tokens["token_type_ids"][row])
            examples.append(
                Example(torch.tensor(ids), torch.tensor(class_of[label]), row, segments)
            )
        return Encoded(examples)

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a batch padded to its longest text: input_ids, attention_mask (n, L), labels (n,).

        L is the longest length, rounded up to a multiple of ``pad_to_multiple_of``, but not beyond
        ``max_length``. A text longer than that keeps its length.
        """
        width = width_of(max(examples.lengths), pad_to_multiple_of, self.max_length)
        batch = inputs(examples, width, self.tokenizer.pad_token_id)
        batch["labels"] = torch.stack([example.labels for example in examples])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's (n, C) logits in float32."""
        out: Tensor = model(**read_by_model(batch)).logits
        return out.float()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of every text, (n,)."""
        logits = self.logits(model, batch)
        return functional.cross_entropy(logits, batch["labels"], reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Return ``logits``, (n, C)."""
        return {"logits": self.logits(model, batch)}

    def score(self, predictions: Sequence[Prediction], examples: Encoded) -> Counts:
        """Count texts by label.

        ``labels``, (3, C) int64, counts for every label the texts predicted correctly, the texts
        predicted to have it, and the texts that have it. ``loss`` is a sum.
        """
        if not predictions:
            return self.no_counts()
        logits = torch.stack([prediction["logits"] for prediction in predictions])  # (n, C)
        truth = torch.stack([example.labels for example in examples])  # (n,)
        predicted = logits.argmax(dim=1)
        counts: list[Tensor] = []
        # ``minlength``, so that labels which do not occur count 0 and all rows have length C.
        for classes in (truth[predicted == truth], predicted, truth):
            counts.append(torch.bincount(classes, minlength=len(self.labels)))
        # Sums, not means: the counts of two groups of examples must add up.
        loss = functional.cross_entropy(logits, truth, reduction="sum")
        return {
            "examples": torch.tensor(len(predictions)),
            "labels": torch.stack(counts),
            "loss": loss.to(torch.float64),
        }

    def no_counts(self) -> Counts:
        """Return the counts of no text."""
        return {
            "examples": torch.tensor(0),
            "labels": torch.zeros(3, len(self.labels), dtype=torch.int64),
            "loss": torch.tensor(0.0, dtype=torch.float64),
        }

    def metrics(self, counts: Counts) -> Mapping[str, float]:
        """Return ``accuracy``, ``macro_f1``, ``matthews`` and the mean ``loss``.

        Macro-F1 is the mean, over the labels that occur, of F1 = 2 correct / (predicted + true).
        """
        examples = max(1, int(counts["examples"]))  # of no example, all metrics are 0
        correct, predicted, true = counts["labels"].to(torch.float64)  # (C,) each
        # A label neither predicted nor true has 0 / 0; it does not occur, so its F1 is not used.
        f1 = 2 * correct / (predicted + true).clamp(min=1)
        occurs = true > 0
        return {
            "accuracy": float(counts["labels"][0].sum()) / examples,
            "macro_f1": float(f1[occurs].mean()) if bool(occurs.any()) else 0.0,
            "matthews": _matthews(correct, predicted, true),
            "loss": float(counts["loss"]) / examples,
        }

    def fault(self, counts: Counts) -> str:
        """Return why counts cannot be true, empty where they can.

        Of a label, no more can be correct than were predicted or are true; the totals of both are
        the number of examples.
        """
        examples, labels = int(counts["examples"]), counts["labels"]
        correct, predicted, true = labels
        sound = bool((labels >= 0).all()) and bool((correct <= predicted.minimum(true)).all())
        if sound and int(predicted.sum()) == int(true.sum()) == examples:
            return ""
        return f"counts = {labels.tolist()}: are no scores of {examples} examples"

    def trivial(self, dataset: Dataset, scored: Encoded) -> float | None:
        """Return the accuracy of always predicting the commonest label of train."""
        if self.metric.name != "accuracy":
            return None
        return dataset.majority([self.labels[int(example.labels)] for example in scored])

    def to_score(self, examples: Encoded) -> Encoded:
        """Return ``examples`` themselves."""
        return examples

    def trial(self, model: nn.Module, device: torch.device) -> str:
        """Return what is wrong where ``model`` cannot tell the labels of two short texts."""
        return misfit(self, model, device, "a text classifier")

    def answers(self, predictions: Sequence[Prediction], examples: Encoded) -> list[Label]:
        """Return the likeliest label of every text and its probability."""
        del examples
        likeliest: list[Label] = []
        for prediction in predictions:
            best = prediction["logits"].softmax(dim=0).max(dim=0)
            likeliest.append(Label(self.labels[int(best.indices)], float(best.values)))
        return likeliest


def _matthews(correct: Tensor, predicted: Tensor, true: Tensor) -> float:
    """Return the correlation of Matthews from counts of each of C classes, (C,) float64.

    In Gorodkin's form for any number of classes (2004, equation 8): with c correct among s texts,
    (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)). It is 0 where everything is
    predicted, or is, of one class.
    """
    total = true.sum()
    covariance = correct.sum() * total - (predicted * true).sum()
    spread = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0


def _names(dataset: Dataset) -> tuple[str, ...]:
    """Return the labels that the user lists, else those of train; BadInput for one only."""
    names = dataset.listed or dataset.labels
    if len(names) == 1:
        raise BadInput(
            f"{dataset.name}: every row has label {names[0]!r}; a classifier needs two or more"
        )
    return names


def _make(choice: TaskSection, names: tuple[str, ...], max_length: int) -> Classification:
    return Classification(names, max_length, primary(choice, METRICS))


KIND: Final = TaskKind(
    schema=Schema((Column("text", text), Column("text2", text))),
    names=_names,
    make=_make,
)
