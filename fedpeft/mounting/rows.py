"""Whose rows a batch holds: the clients of the cohort that take part in the forward pass under way."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_CLIENTS: ContextVar[slice] = ContextVar("clients", default=slice(None))


@contextmanager
def rows_of(clients: slice) -> Iterator[None]:
    """Say, for the length of a ``with``, that a batch's rows belong to ``clients``, in order and in equal numbers."""
    token = _CLIENTS.set(clients)
    try:
        yield
    finally:
        _CLIENTS.reset(token)


def present(stack: Tensor) -> Tensor:
    """Return the part of a (K, ...) stack whose clients take part; all K unless ``rows_of`` says otherwise."""
    return stack[_CLIENTS.get()]
