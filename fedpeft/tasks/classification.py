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
        """Return rows whose labels say nothing."""
        return Rows(tuple(texts), (self.labels[0],) * len(texts))

    def encode(self, rows: Rows) -> Encoded:
        """Return texts and labels as numbers, tokenised once."""
        number = {label: index for index, label in enumerate(self.labels)}
        labels = torch.tensor([number[label] for label in rows.labels]).long()
        if not rows.texts:
            return Encoded([], [])
        tokens = self.tokenizer(list(rows.texts), truncation=True, max_length=self.max_length)
        ids: list[Tensor] = []
        for text in tokens["input_ids"]:
            # A text may have no tokens at all; a model needs one.
            ids.append(torch.tensor(text or [self.tokenizer.pad_token_id], dtype=torch.int64))
        return Encoded(ids, labels.unbind())

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a batch padded to its longest text: input_ids, attention_mask (n, L), labels (n,).

        L is the next multiple of ``pad_to_multiple_of``, but no more than ``max_length``, unless a
        text is longer.
        """
        padding = self.tokenizer.pad_token_id
        ids = pad_sequence(list(examples.ids), batch_first=True, padding_value=padding)
        longest = ids.shape[1]
        rounded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        width = min(rounded, max(longest, self.max_length))
        ids = functional.pad(ids, (0, width - longest), value=padding)
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
        """Count texts by label: ``labels``, (3, C) int64, has those right, those said, those there."""
        if not predictions:
            return self.no_counts()
        logits = torch.stack([prediction["logits"] for prediction in predictions])
        there = torch.stack(list(examples.labels))
        said = logits.argmax(dim=1)
        size = len(self.labels)
        right = torch.bincount(there[said == there], minlength=size)
        counts = torch.stack(
            [right, torch.bincount(said, minlength=size), torch.bincount(there, minlength=size)]
        )
        loss = functional.cross_entropy(logits, there, reduction="sum")
        return {
            "examples": torch.tensor(len(predictions)),
            "labels": counts,
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

        Macro-F1 is the mean, over the labels that occur, of F1 = 2 right / (said + there).
        """
        examples = max(1, int(counts["examples"]))
        right, said, there = counts["labels"].to(torch.float64)
        f1 = 2 * right / (said + there).clamp(min=1)
        occurs = there > 0
        return {
            "accuracy": float(counts["labels"][0].sum()) / examples,
            "macro_f1": float(f1[occurs].mean()) if bool(occurs.any()) else 0.0,
            "loss": float(counts["loss"]) / examples,
        }

    def fault(self, counts: Counts) -> str:
        """Return why counts cannot be true: more right than said or there, or other totals."""
        examples, labels = int(counts["examples"]), counts["labels"]
        right, said, there = labels
        sound = bool((labels >= 0).all()) and bool((right <= said.minimum(there)).all())
        if sound and int(said.sum()) == int(there.sum()) == examples:
            return ""
        return f"counts = {labels.tolist()}: are no scores of {examples} examples"

    def trivial(self, dataset: Dataset, scored: Encoded) -> float:
        """Return the accuracy of always saying the label that is commonest in train."""
        return dataset.majority([self.labels[int(label)] for label in scored.labels])

    def answers(self, predictions: Sequence[Prediction]) -> list[Label]:
        """Return the likeliest label of every text and its probability."""
        found: list[Label] = []
        for prediction in predictions:
            best = prediction["logits"].softmax(dim=0).max(dim=0)
            found.append(Label(self.labels[int(best.indices)], float(best.values)))
        return found
