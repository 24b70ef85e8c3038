"""Passes computed at once in one process, a thread each: they use the cores better than the threads within one pass."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def lanes(count: int) -> Iterator[Map]:
    """Yield a ``map`` that computes ``count`` items at once, on torch threads shared evenly, and gives results in order.

    One lane is Python's own ``map``, in the calling thread. A lane has the thread's own defaults: modes such as autocast or
    inference, and context variables, are for the mapped function to set.
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, max(1, threads // count))) as pool:
        yield pool.map
    torch.set_num_threads(threads)  # a lane changes what threads to come begin with


def by_length(lengths: Sequence[int], tokens: int, count: int) -> list[list[int]]:
    """Return the rows with ``lengths``, shortest first, in runs of about ``tokens`` for ``count`` lanes.

    All runs have about equally many tokens, and are a multiple of ``count``, so that no lane waits for long; fewer where
    rows are few.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = list(accumulate(lengths[row] for row in order))
    total = ends[-1] if ends else 0
    number = count * max(1, round(total / tokens / count))
    cuts = [bisect_right(ends, total * cut // number) for cut in range(number + 1)]
    return [order[start:stop] for start, stop in pairwise(cuts) if stop > start]
