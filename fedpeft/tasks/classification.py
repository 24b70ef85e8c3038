"""Text classification: one label a text, cross-entropy, accuracy and macro-F1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedpeft.data.rows import Dataset, Rows
from fedpeft.tasks.task import Batch, Counts, Encoded, Metric, ModelForm, Prediction


class Label(NamedTuple):
    """The likeliest label of a text and its probability."""

    label: str
    probability: float


@final
@dataclass(frozen=True)
class Classification:
    """Classify texts of at most ``max_length`` tokens into ``labels``."""

    labels: tuple[str, ...]
    max_length: int
    tokenizer: Any = None

    @property
    def metric(self) -> Metric:
        """Accuracy."""
        return Metric("accuracy")

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

    def unanswered(self, texts: Sequence[str]) -> Rows:
        """Return rows of ``texts`` with a placeholder for the label."""
        # ``encode`` needs some label; predicting ignores it.
        return Rows(tuple(texts), (self.labels[0],) * len(texts))

    def encode(self, rows: Rows) -> Encoded:
        """Return texts and labels as numbers, tokenised once."""
        if not rows.texts:
            return Encoded([], [])
        class_of = {label: index for index, label in enumerate(self.labels)}
        labels = torch.tensor([class_of[label] for label in rows.labels])  # (n,) int64
        tokens = self.tokenizer(list(rows.texts), truncation=True, max_length=self.max_length)
        ids: list[Tensor] = []
        for text in tokens["input_ids"]:
            # An empty text may have no token at all, but a model needs one position to read.
            ids.append(torch.tensor(text or [self.tokenizer.pad_token_id], dtype=torch.int64))
        return Encoded(ids, labels.unbind())

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a batch padded to its longest text: input_ids, attention_mask (n, L), labels (n,).

        L is the longest length, rounded up to a multiple of ``pad_to_multiple_of``, but not beyond
        ``max_length``. A text longer than that keeps its length.
        """
        padding = self.tokenizer.pad_token_id
        ids = pad_sequence(list(examples.ids), batch_first=True, padding_value=padding)
        longest = ids.shape[1]
        rounded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of  # -(-a // b) rounds up
        width = min(rounded, max(longest, self.max_length))
        ids = functional.pad(ids, (0, width - longest), value=padding)
        # From the lengths, since the padding token may also occur inside a text.
        lengths = torch.tensor([len(text) for text in examples.ids])
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.stack(list(examples.labels)),
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's (n, C) logits in float32."""
        out: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
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
        truth = torch.stack(list(examples.labels))  # (n,)
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
        """Return ``accuracy``, ``macro_f1`` and the mean ``loss``.

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

    def trivial(self, dataset: Dataset, scored: Encoded) -> float:
        """Return the accuracy of always predicting the commonest label of train."""
        return dataset.majority([self.labels[int(label)] for label in scored.labels])

    def answers(self, predictions: Sequence[Prediction]) -> list[Label]:
        """Return the likeliest label of every text and its probability."""
        likeliest: list[Label] = []
        for prediction in predictions:
            best = prediction["logits"].softmax(dim=0).max(dim=0)
            likeliest.append(Label(self.labels[int(best.indices)], float(best.values)))
        return likeliest
