"""Text classification: one label a text, cross-entropy, accuracy and macro-F1."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

Batch = Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class Encoded:
    """Texts as token ids, each (length,) int64, and labels, (n,) int64."""

    ids: Sequence[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> "Encoded":
        """Return the examples at ``rows``."""
        return Encoded(
            [self.ids[row] for row in rows], self.labels[torch.as_tensor(rows, dtype=torch.int64)]
        )


@final
@dataclass(frozen=True)
class Scores:
    """What an evaluation counted: ``counts`` (3, C) int64 of (right, said, is) per label, and the summed loss."""

    counts: Tensor
    loss_sum: float

    @property
    def examples(self) -> int:
        """Return the number of examples scored."""
        return int(self.counts[2].sum())

    @property
    def loss(self) -> float:
        """Return the mean loss."""
        return self.loss_sum / max(1, self.examples)

    @property
    def accuracy(self) -> float:
        """Return the share of examples whose label was said."""
        return float(self.counts[0].sum()) / max(1, self.examples)

    @property
    def macro_f1(self) -> float:
        """Return the mean over the labels that occur of F1 = 2 right / (said + is)."""
        right, said, there = self.counts.to(torch.float64)
        occurs = there > 0
        return (
            float((2 * right / (said + there).clamp(min=1))[occurs].mean())
            if bool(occurs.any())
            else 0.0
        )


@final
@dataclass(frozen=True)
class Classification:
    """Classify texts of at most ``max_length`` tokens into ``labels``; ``tokenizer`` is a transformers tokenizer."""

    labels: tuple[str, ...]
    tokenizer: Any
    max_length: int

    def encode(self, texts: Sequence[str], labels: Sequence[str]) -> Encoded:
        """Return texts and labels as numbers, tokenised once."""
        number = {label: index for index, label in enumerate(self.labels)}
        ids = (
            self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
            if texts
            else []
        )
        return Encoded(
            [torch.tensor(row or [self.tokenizer.pad_token_id], dtype=torch.int64) for row in ids],
            torch.tensor([number[label] for label in labels]).long(),
        )

    def collate(
        self, examples: Encoded, device: torch.device, pad_to_multiple_of: int = 1
    ) -> Batch:
        """Return a batch padded to its longest text: input_ids, attention_mask (n, L) and labels (n,).

        ``pad_to_multiple_of``: L is the next multiple of it, but no more than ``max_length``, unless a text is longer.
        """
        padding = self.tokenizer.pad_token_id
        ids = pad_sequence(list(examples.ids), batch_first=True, padding_value=padding)
        longest = min(
            -(-ids.shape[1] // pad_to_multiple_of) * pad_to_multiple_of,
            max(ids.shape[1], self.max_length),
        )
        ids = functional.pad(ids, (0, longest - ids.shape[1]), value=padding)
        lengths = torch.tensor([len(row) for row in examples.ids])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": examples.labels}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's (n, C) logits in float32."""
        out: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        return out.float()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of every example, (n,)."""
        return functional.cross_entropy(
            self.logits(model, batch), batch["labels"], reduction="none"
        )

    def score(self, logits: Tensor, there: Tensor) -> Scores:
        """Count what (n, C) ``logits`` say about texts with labels ``there``, (n,)."""
        said, size = logits.argmax(dim=1), len(self.labels)
        rows = (there[said == there], said, there)
        counts = torch.stack([torch.bincount(row, minlength=size) for row in rows])
        return Scores(counts, float(functional.cross_entropy(logits, there, reduction="sum")))
