"""Labelled texts as values: the rows of a split, and a data set of three splits."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from fedpeft.data.integers import ordered
from fedpeft.seeds import derive


@dataclass(frozen=True)
class Rows:
    """Labelled texts, one label each.

    ``keys``: the name of each row's natural client; empty where there is none. ``numbers``: each
    row's position in the file of train, counted from 0; empty where that is not known. Numbers do
    not count in comparisons: rows that differ in nothing else are equal.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    keys: tuple[str, ...] = ()
    numbers: tuple[int, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> "Rows":
        """Return the rows at ``indices``, in that order."""
        chosen = tuple(indices)
        return Rows(
            texts=tuple(self.texts[row] for row in chosen),
            labels=tuple(self.labels[row] for row in chosen),
            keys=tuple(self.keys[row] for row in chosen) if self.keys else (),
            numbers=tuple(self.numbers[row] for row in chosen) if self.numbers else (),
        )


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, to choose models by (``validation``), to judge them by (``test``)."""

    name: str
    train: Rows
    validation: Rows
    test: Rows

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of train's labels; class ``i`` of a classifier is ``labels[i]``.

        They are sorted, by value where all are whole numbers.
        """
        return ordered(self.train.labels)

    def digest(self) -> str:
        """Return 16 hex digits of the SHA-256 of all rows in order.

        Equal digests mean equal data; the name does not matter.
        """
        splits: list[list[Sequence[str]]] = []
        for split in (self.train, self.validation, self.test):
            splits.append([split.texts, split.labels, split.keys])
        return sha256(json.dumps(splits).encode()).hexdigest()[:16]

    def majority(self, labels: Sequence[str]) -> float:
        """Return the accuracy, on texts with ``labels``, of always predicting train's commonest.

        ``labels``: at least one. Among equally common labels, the first counts.
        """
        counts = Counter(self.train.labels)
        commonest = max(self.labels, key=counts.__getitem__)
        return labels.count(commonest) / len(labels)


def stratified(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split ``rows`` by label into (kept, taken), each in the order of ``rows``.

    Of a label's n rows, round(``fraction`` * n) are taken, but at least one, and one is always
    left. Which ones are taken depends on ``seed`` and on the label's set of texts, not on their
    order.
    """
    quota: dict[str, int] = {}
    for label, size in Counter(rows.labels).items():
        quota[label] = min(max(1, round(fraction * size)), size - 1)
    taken = set[int]()
    # Each text draws its own place in the queue, so the order of the file does not matter.
    for row in sorted(range(len(rows)), key=lambda row: derive(seed, rows.texts[row])):
        label = rows.labels[row]
        if quota[label] > 0:
            quota[label] -= 1
            taken.add(row)
    kept = sorted(set(range(len(rows))) - taken)
    return rows.take(kept), rows.take(sorted(taken))
