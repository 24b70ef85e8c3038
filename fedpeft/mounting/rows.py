"""Whose rows a batch holds: the clients of the cohort that take part in the forward pass under way."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from fedpeft.types import WireError

_CLIENTS: ContextVar[slice] = ContextVar("clients", default=slice(None))
_ROWS: ContextVar[int | None] = ContextVar("rows", default=None)


@contextmanager
def rows_of(clients: slice, rows: int | None = None) -> Iterator[None]:
    """Say, for the length of a ``with``, that a batch's rows belong to ``clients``, in order and in equal numbers.

    ``rows``: how many rows the batch has, where it is known.
    """
    tokens = _CLIENTS.set(clients), _ROWS.set(rows)
    try:
        yield
    finally:
        _CLIENTS.reset(tokens[0])
        _ROWS.reset(tokens[1])


def by_client(x: Tensor, clients: int) -> Tensor:
    """Return x, (k*b, ..., in), as (k, b * ..., in); a layer that several clients feed with other rows raises WireError."""
    rows = _ROWS.get()
    if clients > 1 and (x.shape[0] % clients or (rows is not None and x.shape[0] != rows)):
        raise WireError(f"a layer sees {x.shape[0]} rows, which are not those of {clients} clients' batch; use cohorts of 1")
    return x.reshape(clients, -1, x.shape[-1])


def present(stack: Tensor) -> Tensor:
    """Return the part of a (K, ...) stack whose clients take part; all K unless ``rows_of`` says otherwise."""
    return stack[_CLIENTS.get()]
