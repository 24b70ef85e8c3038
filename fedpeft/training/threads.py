"""Passes computed at once in one process, a thread each: they use the cores better than the threads within one pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def thread_map(count: int, leaves: Sequence[Tensor] = ()) -> Iterator[Map]:
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
        with ThreadPoolExecutor(
            count, initializer=partial(torch.set_num_threads, max(1, threads // count))
        ) as pool:
            yield pool.map
    finally:
        del views
        torch.set_num_threads(threads)  # a lane changes what threads to come begin with
