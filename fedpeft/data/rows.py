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

    ``keys`` names each row's natural client and is empty where there is none. ``numbers``: where
    each row stood in the file of train, counted from 0; empty where that is not known. They are no
    part of what the rows are: rows with other numbers are equal.
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
    """What a federation trains on (``train``), chooses by (``validation``) and is judged by (``test``)."""

    name: str
    train: Rows
    validation: Rows
    test: Rows

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names of train: class ``i`` of a classifier is ``labels[i]``.

        Sorted; by value where all are whole numbers.
        """
        return ordered(self.train.labels)

    def digest(self) -> str:
        """Return 16 hex digits of the SHA-256 of all rows in order: equal digests mean equal data, under any name."""
        splits = [
            [split.texts, split.labels, split.keys]
            for split in (self.train, self.validation, self.test)
        ]
        return sha256(json.dumps(splits).encode()).hexdigest()[:16]

    def majority(self, labels: Sequence[str]) -> float:
        """Return the accuracy on one or more texts with ``labels`` of always saying train's commonest (first of equals)."""
        counts = Counter(self.train.labels)
        return labels.count(max(self.labels, key=counts.__getitem__)) / len(labels)


def stratified(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split ``rows`` by label into (kept, taken), each in the order of ``rows``.

    Of a label's n rows, round(``fraction`` * n) are taken, but at least one and never the last.
    Which ones depends on ``seed`` and on the label's set of texts, not on their order.
    """
    quota = {
        label: min(max(1, round(fraction * size)), size - 1)
        for label, size in Counter(rows.labels).items()
    }
    taken = set[int]()
    for row in sorted(range(len(rows)), key=lambda row: derive(seed, rows.texts[row])):
        if quota[rows.labels[row]] > 0:
            quota[rows.labels[row]] -= 1
            taken.add(row)
    return rows.take(row for row in range(len(rows)) if row not in taken), rows.take(sorted(taken))
