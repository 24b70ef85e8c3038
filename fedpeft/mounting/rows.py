"""Whose rows a batch holds: the clients of the stack that take part in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fedpeft.errors import NotStackable

RowOwners = slice | Tensor
"""The clients of a batch: a slice of the stack, with equally many rows each, in order; or every row's
client, (rows,)."""

_OWNERS: ContextVar[RowOwners] = ContextVar("owners", default=slice(None))
_ROWS: ContextVar[int | None] = ContextVar("rows", default=None)


@contextmanager
def row_owners(owners: RowOwners, rows: int | None = None) -> Iterator[None]:
    """Say, for the length of a ``with``, whose the rows of a batch are; ``rows``: how many, if known."""
    tokens = _OWNERS.set(owners), _ROWS.set(rows)
    try:
        yield
    finally:
        _OWNERS.reset(tokens[0])
        _ROWS.reset(tokens[1])


def select_clients(stack: Tensor) -> Tensor:
    """Return what the batch needs of a (K, ...) stack: an entry a client, or where they mix, a row."""
    owners = _OWNERS.get()
    return stack[owners] if isinstance(owners, slice) else stack.index_select(0, owners)


def group_by_client(x: Tensor, parts: int) -> Tensor:
    """Return x, (parts * b, ..., in), as (parts, b * ..., in), to go with ``parts`` entries of a stack.

    A layer that several clients feed with other rows than the batch's raises NotStackable.
    """
    rows = _ROWS.get()
    if parts > 1 and (x.shape[0] % parts or (rows is not None and x.shape[0] != rows)):
        raise _strange(x)
    return x.reshape(parts, -1, x.shape[-1])


def by_client(x: Tensor, clients: int) -> list[tuple[int, Tensor]]:
    """Return x, (rows, ..., in), cut into runs of one client's rows, in order: (its number, rows).

    ``clients``: K. A layer that several clients feed with other rows than the batch's raises
    NotStackable.
    """
    owners, rows = _OWNERS.get(), _ROWS.get()
    if isinstance(owners, slice):
        numbers = range(clients)[owners]
        runs = group_by_client(x, len(numbers)).view(len(numbers), -1, *x.shape[1:])
        return list(zip(numbers, runs, strict=True))
    if len(owners) != x.shape[0] or (rows is not None and x.shape[0] != rows):
        raise _strange(x)
    of, lengths = torch.unique_consecutive(owners, return_counts=True)
    return list(zip(of.tolist(), torch.split(x, lengths.tolist()), strict=True))


def _strange(x: Tensor) -> NotStackable:
    return NotStackable(
        f"a layer sees {x.shape[0]} rows, which are not those of the stack's batch; "
        "use a stack of 1"
    )
