"""Buckets of rows of like length, each of which goes through the model together.

Little of a bucket is padding, and its shape is one of few.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import numpy as np

Edges = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Numbers of rows, ascending from 0: where a bucket of sorted rows may begin or end."""


@final
@dataclass(frozen=True)
class Buckets:
    """What a bucket may hold and what it costs.

    ``max_tokens``: tokens in a bucket, padding included, unless one row alone has more.
    ``overhead_tokens``: what a bucket costs by itself, in tokens.
    ``pad_to_multiple_of``: texts are padded to a multiple of it. Numbers of rows are multiples of
    it, too, so that the same shapes come again and again. There are two exceptions: the bucket of
    the shortest rows, and buckets whose rows are so long that this many exceed ``max_tokens``.
    """

    max_tokens: int
    overhead_tokens: int
    pad_to_multiple_of: int = 1

    def padded(self, length: int) -> int:
        """Return ``length`` rounded up to a multiple of ``pad_to_multiple_of``.

        >>> Buckets(100, 5, pad_to_multiple_of=4).padded(6)
        8
        """
        multiples = -(-length // self.pad_to_multiple_of)  # rounded up
        return multiples * self.pad_to_multiple_of

    def cost(self, lengths: Sequence[int]) -> int:
        """Return what a bucket of rows with ``lengths`` costs, in tokens.

        >>> Buckets(100, overhead_tokens=5).cost([3, 6])  # two rows of 6, and 5
        17
        """
        return len(lengths) * self.padded(max(lengths)) + self.overhead_tokens

    def cheapest(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the rows with ``lengths`` in the buckets that cost least together.

        A row is given by its index in ``lengths``. The dearest bucket comes first.

        >>> Buckets(max_tokens=100, overhead_tokens=5).cheapest([9, 2, 10, 3])
        [[0, 2], [1, 3]]
        >>> Buckets(max_tokens=100, overhead_tokens=50).cheapest([9, 2, 10, 3])
        [[1, 3, 0, 2]]
        """
        if not lengths:
            return []
        # Rows of like length go together: a bucket is a run of rows in this order.
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        all_in_one = len(order) * self.padded(max(lengths))
        if all_in_one <= min(self.max_tokens, self.overhead_tokens):
            return [order]  # a second bucket costs more than it can save
        ascending = [lengths[row] for row in order]
        edges = self._edges(ascending)
        start = self._cheapest_starts(ascending, edges)
        # Walk back from the last edge: each bucket ends where the one after it begins.
        buckets: list[list[int]] = []
        end = len(edges) - 1
        while end > 0:
            buckets.append(order[edges[start[end]] : edges[end]])
            end = start[end]
        # Longest processing time first: the threads then end at about the same time.
        return sorted(buckets, key=partial(self._cost_of_rows, lengths), reverse=True)

    def _cost_of_rows(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        """Return what a bucket of ``rows`` costs; ``lengths``: of all rows."""
        return self.cost([lengths[row] for row in rows])

    def _cheapest_starts(self, ascending: Sequence[int], edges: Edges) -> list[int]:
        """Return for every edge where the last bucket before it begins, in the cheapest grouping.

        ``ascending``: the lengths of the sorted rows. An edge is given by its index in ``edges``.
        """
        # Dynamic programming over rows sorted by length. cost[i]: the least cost of the first
        # edges[i] rows; start[i]: the index of the edge where the last of their buckets begins.
        cost = np.zeros(len(edges))
        start = [0]
        for end in range(1, len(edges)):
            length = self.padded(ascending[edges[end] - 1])  # of the bucket's longest row
            most_rows = self.max_tokens // length
            earliest = int(np.searchsorted(edges, edges[end] - most_rows))
            earliest = min(earliest, end - 1)  # a row beyond max_tokens has its own bucket
            num_rows = edges[end] - edges[earliest:end]  # for each edge where it may begin
            costs = cost[earliest:end] + num_rows * float(length) + self.overhead_tokens
            start.append(earliest + int(costs.argmin()))
            cost[end] = costs.min()
        return start

    def _edges(self, ascending: Sequence[int]) -> Edges:
        """Return where a bucket of rows with ``ascending`` lengths may begin or end."""
        step = self.pad_to_multiple_of
        # Of the short rows, ``step`` fit into a bucket, and the bucket of the shortest takes the
        # remainder. Longer rows stand alone or in any number.
        num_short = 0
        for length in ascending:
            if step * self.padded(length) <= self.max_tokens:
                num_short += 1
        among_short = range(num_short % step or step, num_short + 1, step)
        among_long = range(num_short + 1, len(ascending) + 1)
        return np.array([0, *among_short, *among_long])

    def dealt(self, lengths: Sequence[int], threads: int) -> list[list[int]]:
        """Return the rows in the buckets with which ``threads`` threads are done first.

        Buckets of ``max_tokens`` tokens are compared with somewhat smaller ones.

        >>> [len(rows) for rows in Buckets(80, 1).dealt([10] * 24, threads=2)]
        [6, 6, 6, 6]
        """

        def finish(buckets: list[list[int]]) -> int:
            """Return when the last thread is done; each takes a bucket as soon as it is free."""
            busy = [0] * threads
            for rows in buckets:
                first_free = busy.index(min(busy))
                busy[first_free] += self._cost_of_rows(lengths, rows)
            return max(busy)

        # From the full size down to five eighths of it; one thread gains nothing by smaller ones.
        eighths = (8, 7, 6, 5) if threads > 1 else (8,)
        choices: list[list[list[int]]] = []
        for share in eighths:
            smaller = replace(self, max_tokens=self.max_tokens * share // 8)
            choices.append(smaller.cheapest(lengths))
        # Of equal choices ``min`` takes the first, that of the largest buckets.
        return min(choices, key=finish)
