"""Several forward passes at once in one process, each in a thread of its own.

They use the cores better than many threads within one pass: small products leave threads idle.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""As Python's ``map`` of one iterable."""


@contextmanager
def thread_map(count: int, leaves: Sequence[Tensor] = ()) -> Iterator[Map]:
    """Yield a ``map`` that computes ``count`` items at once and gives the results in order.

    The threads share torch's threads evenly. With a count of one it is Python's own ``map``, in the
    calling thread. New threads begin with torch's defaults: the mapped function itself has to set
    modes such as autocast or inference, and context variables. ``leaves``: all the tensors by which
    the threads differentiate.

    >>> with thread_map(2) as parallel_map:
    ...     list(parallel_map(abs, [-3, 4]))
    [3, 4]
    """
    if count <= 1:
        yield map
        return
    torch_threads = torch.get_num_threads()
    # A leaf's AccumulateGrad node is made when a graph first needs it, under the leaf's mutex, and
    # making it takes the GIL: a thread with the mutex and one with the GIL would wait for each
    # other for good. A view makes the node here, and keeps it.
    views = [leaf.view_as(leaf) for leaf in leaves]
    each = max(1, torch_threads // count)
    try:
        with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, each)) as pool:
            yield pool.map
    finally:
        del views
        # A thread that sets its number of torch threads also sets that of all threads to come.
        torch.set_num_threads(torch_threads)
