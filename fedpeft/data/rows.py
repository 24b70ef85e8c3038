"""Examples as users have them: the rows of a split, and a data set of three splits."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from fedpeft.data.integers import ordered
from fedpeft.seeds import derive


@dataclass(frozen=True)
class Rows:
    """The examples of a split, column by column.

    ``columns``: role -> the value of each row, such as ``text`` of a classification; see
    ``schema.py``. There is one column at least. ``labels``: the label of each row, by which
    partitions divide; empty where there is none. In a classification it is the answer, too.
    ``keys``: the name of each row's natural client; empty where there is none. ``numbers``: each
    row's position in the file of train, counted from 0; empty where that is not known. Numbers do
    not count in comparisons: rows that differ in nothing else are equal.
    """

    columns: Mapping[str, tuple[Any, ...]]
    labels: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    numbers: tuple[int, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @classmethod
    def of_texts(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        keys: Sequence[str] = (),
        numbers: Sequence[int] = (),
    ) -> "Rows":
        """Return rows of one text each.

        >>> Rows.of_texts(["good", "bad"], ["positive", "negative"]).columns
        {'text': ('good', 'bad')}
        """
        return cls({"text": tuple(texts)}, tuple(labels), tuple(keys), tuple(numbers))

    @property
    def texts(self) -> tuple[str, ...]:
        """The column ``text``."""
        return self.columns["text"]

    def name_of(self, row: int) -> str:
        """Return what tells a row from others: its text, or all its columns as JSON."""
        values = [column[row] for column in self.columns.values()]
        return values[0] if self.columns.keys() == {"text"} else json.dumps(values)

    def record_of(self, row: int) -> int:
        """Return the place of a row among the records of its file, counted from 1.

        >>> held_out = Rows.of_texts(["a", "b"], ["x", "x"], numbers=[4, 9])
        >>> held_out.record_of(1)
        10
        """
        return 1 + (self.numbers[row] if self.numbers else row)

    def take(self, indices: Iterable[int]) -> "Rows":
        """Return the rows at ``indices``, in that order."""
        chosen = tuple(indices)
        return Rows(
            columns={
                role: tuple(column[row] for row in chosen) for role, column in self.columns.items()
            },
            labels=tuple(self.labels[row] for row in chosen) if self.labels else (),
            keys=tuple(self.keys[row] for row in chosen) if self.keys else (),
            numbers=tuple(self.numbers[row] for row in chosen) if self.numbers else (),
        )


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, to choose models by (``validation``), to judge them by (``test``).

    ``listed``: the names of the possible answers where the user lists them (``data.labels``), in
    the order of the model's outputs; they may be more than occur.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    listed: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of train's labels, by which partitions divide.

        They stand in the order in which the user lists them, otherwise sorted, by value where all
        are whole numbers.
        """
        present = set(self.train.labels)
        if present <= set(self.listed):
            return tuple(label for label in self.listed if label in present)
        return ordered(present)

    def digest(self) -> str:
        """Return 16 hex digits of the SHA-256 of all rows in order.

        Equal digests mean equal data; the name does not matter.
        """
        splits: list[list[Sequence[Any]]] = []
        for split in (self.train, self.validation, self.test):
            splits.append([*split.columns.values(), split.labels, split.keys])
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
    order. Rows without labels are split as if they had one in common.
    """
    labels = rows.labels or ("",) * len(rows)
    quota: dict[str, int] = {}
    for label, size in Counter(labels).items():
        quota[label] = min(max(1, round(fraction * size)), size - 1)
    taken = set[int]()
    # Each text draws its own place in the queue, so the order of the file does not matter.
    for row in sorted(range(len(rows)), key=lambda row: derive(seed, rows.name_of(row))):
        label = labels[row]
        if quota[label] > 0:
            quota[label] -= 1
            taken.add(row)
    kept = sorted(set(range(len(rows))) - taken)
    return rows.take(kept), rows.take(sorted(taken))
