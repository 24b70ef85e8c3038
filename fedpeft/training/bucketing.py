"""Rows of like length in buckets, which go through the model one by one: little padding, few shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np


@final
@dataclass(frozen=True)
class Buckets:
    """What a bucket may hold and what it costs.

    ``max_tokens``: tokens, padding included, unless one row is longer. ``overhead_tokens``: what a bucket costs by itself, in tokens.
    ``pad_to_multiple_of``: texts are padded to a multiple of it, and numbers of rows are multiples, too, but for the bucket of the
    shortest and for rows so long that ``pad_to_multiple_of`` of them exceed ``max_tokens``. So the same shapes come again and again.
    """

    max_tokens: int
    overhead_tokens: int
    pad_to_multiple_of: int = 1

    def padded(self, length: int) -> int:
        """Return ``length`` as a multiple of the pad_to_multiple_of."""
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def cost(self, lengths: Sequence[int]) -> int:
        """Return what a bucket of rows with ``lengths`` costs, in tokens."""
        return len(lengths) * self.padded(max(lengths)) + self.overhead_tokens

    def cheapest(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the rows with ``lengths`` in the buckets that cost least together, the dearest first."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        if len(order) * self.padded(max(lengths, default=0)) <= min(
            self.max_tokens, self.overhead_tokens
        ):
            return [order] if order else []  # a second bucket costs more than it can save
        edges = self._edges([lengths[row] for row in order])
        least, begins = np.zeros(len(edges)), [0]
        for number in range(1, len(edges)):
            length = self.padded(lengths[order[edges[number] - 1]])
            first = min(
                int(np.searchsorted(edges, edges[number] - self.max_tokens // length)), number - 1
            )
            costs = (
                least[first:number]
                + (edges[number] - edges[first:number]) * float(length)
                + self.overhead_tokens
            )
            begins.append(first + int(costs.argmin()))
            least[number] = costs.min()
        found = []
        number = len(edges) - 1
        while number:
            found.append(order[edges[begins[number]] : edges[number]])
            number = begins[number]
        return sorted(
            found, key=lambda rows: self.cost([lengths[row] for row in rows]), reverse=True
        )

    def _edges(self, lengths: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return where a bucket of rows with ascending ``lengths`` may begin or end."""
        short = sum(
            self.pad_to_multiple_of * self.padded(length) <= self.max_tokens for length in lengths
        )
        in_grains = range(
            short % self.pad_to_multiple_of or self.pad_to_multiple_of,
            short + 1,
            self.pad_to_multiple_of,
        )
        return np.array([0, *in_grains, *range(short + 1, len(lengths) + 1)])

    def dealt(self, lengths: Sequence[int], lanes: int) -> list[list[int]]:
        """Return the rows in buckets of ``max_tokens`` tokens or somewhat fewer: those that ``lanes`` end first."""

        def longest(buckets: list[list[int]]) -> int:
            busy = [0] * lanes
            for rows in buckets:
                busy[busy.index(min(busy))] += self.cost([lengths[row] for row in rows])
            return max(busy)

        eighths = (8, 7, 6, 5) if lanes > 1 else (8,)
        return min(
            (
                replace(self, max_tokens=self.max_tokens * share // 8).cheapest(lengths)
                for share in eighths
            ),
            key=longest,
        )
