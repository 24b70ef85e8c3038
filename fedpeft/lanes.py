"""Passes computed at once in one process, a thread each: they use the cores better than the threads within one pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def lanes(count: int, leaves: Sequence[Tensor] = ()) -> Iterator[Map]:
    """Yield a ``map`` that computes ``count`` items at once, on torch threads shared evenly, and gives results in order.

    One lane is Python's own ``map``, in the calling thread. A lane has the thread's own defaults: modes such as autocast or
    inference, and context variables, are for the mapped function to set. ``leaves``: all that lanes differentiate by.
    """
    if count <= 1:
        yield map
        return
    threads = torch.get_num_threads()
    # A leaf's AccumulateGrad node is made when a graph first needs it, under the leaf's mutex, and making it takes the GIL: a
    # lane with the mutex and one with the GIL would wait for each other for good. A view makes the node here, and keeps it.
    views = [leaf.view_as(leaf) for leaf in leaves]
    try:
        with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, max(1, threads // count))) as pool:
            yield pool.map
    finally:
        del views
        torch.set_num_threads(threads)  # a lane changes what threads to come begin with


def by_length(lengths: Sequence[int], most: int, overhead: int) -> list[list[int]]:
    """Return the rows with ``lengths`` in runs of like length that cost least together, the dearest first.

    A run costs its tokens once padded, which are at most ``most`` unless a row is longer, and ``overhead`` tokens more.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if len(order) * max(lengths, default=0) <= min(most, overhead):
        return [order] if order else []  # a second run costs more than it can save
    least, starts = np.zeros(len(order) + 1), [0]
    for stop, row in enumerate(order, start=1):
        first = max(0, min(stop - 1, stop - most // lengths[row]))
        costs = least[first:stop] + (stop - np.arange(first, stop)) * float(lengths[row]) + overhead
        starts.append(first + int(costs.argmin()))
        least[stop] = costs.min()
    runs = []
    stop = len(order)
    while stop:
        runs.append(order[starts[stop] : stop])
        stop = starts[stop]
    return sorted(runs, key=lambda run: len(run) * lengths[run[-1]], reverse=True)


def dealt(lengths: Sequence[int], most: int, overhead: int, count: int) -> list[list[int]]:
    """Return the rows in runs as ``by_length`` does, of ``most`` tokens or somewhat fewer: what ``count`` lanes end first."""

    def longest(runs: list[list[int]]) -> int:
        lanes = [0] * count
        for run in runs:
            lanes[lanes.index(min(lanes))] += len(run) * lengths[run[-1]] + overhead
        return max(lanes)

    eighths = (8, 7, 6, 5) if count > 1 else (8,)
    return min((by_length(lengths, most * share // 8, overhead) for share in eighths), key=longest)
