"""Whose rows a batch holds: the clients of the stack that take part in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fedpeft.errors import NotStackable

RowOwners = slice | Tensor
"""The clients of a batch: a slice of the stack, in order and with equally many rows each; or the
client of every row, (rows,)."""

# Context variables and not globals: micro-batches of several threads go through one model at once.
_OWNERS: ContextVar[RowOwners] = ContextVar("owners", default=slice(None))
_ROWS: ContextVar[int | None] = ContextVar("rows", default=None)


@contextmanager
def row_owners(owners: RowOwners, rows: int | None = None) -> Iterator[None]:
    """Say, for the length of a ``with``, which clients the rows of a batch belong to.

    ``rows``: how many rows there are, if known.
    """
    tokens = _OWNERS.set(owners), _ROWS.set(rows)
    try:
        yield
    finally:
        _OWNERS.reset(tokens[0])
        _ROWS.reset(tokens[1])


def select_clients(stack: Tensor) -> Tensor:
    """Return the entries of a (K, ...) stack that the batch needs: one a client, or one a row.

    One a row where the rows of clients mix.
    """
    owners = _OWNERS.get()
    # A slice is a view; ``index_select`` adds up gradients of rows into their client's entry.
    return stack[owners] if isinstance(owners, slice) else stack.index_select(0, owners)


def group_by_client(x: Tensor, parts: int) -> Tensor:
    """Return x, (parts * b, ..., in), as (parts, b * ..., in), for ``parts`` entries of a stack.

    A layer whose rows are not those of the batch raises NotStackable, unless there is one part.
    """
    rows = _ROWS.get()
    # A model may turn (rows, length) round inside, or feed a layer with rows of its own: nobody
    # knows then which client they are of. With one client it does not matter.
    if parts > 1 and (x.shape[0] % parts or (rows is not None and x.shape[0] != rows)):
        raise _other_rows(x)
    return x.reshape(parts, -1, x.shape[-1])


def by_client(x: Tensor, clients: int) -> list[tuple[int, Tensor]]:
    """Return x, (rows, ..., in), cut into runs of one client's rows, in order: (client, rows).

    ``clients``: K. A client is given by its place in the stack. A layer whose rows are not those of
    the batch raises NotStackable, unless the whole batch is one client's.
    """
    owners, rows = _OWNERS.get(), _ROWS.get()
    if isinstance(owners, slice):
        present = range(clients)[owners]
        # (n, b, ..., in): grouping checks the number of rows, and the view gives back their axes.
        runs = group_by_client(x, len(present)).view(len(present), -1, *x.shape[1:])
        return list(zip(present, runs, strict=True))
    if len(owners) != x.shape[0] or (rows is not None and x.shape[0] != rows):
        raise _other_rows(x)
    # Owners ascend (see ``micro_batches``), so each client has one run.
    run_owners, lengths = torch.unique_consecutive(owners, return_counts=True)
    runs_of_rows = torch.split(x, lengths.tolist())
    return list(zip(run_owners.tolist(), runs_of_rows, strict=True))


def _other_rows(x: Tensor) -> NotStackable:
    """Return the error for a layer that sees other rows than the batch has."""
    return NotStackable(
        f"a layer sees {x.shape[0]} rows, which are not those of the stack's batch; "
        "use a stack of 1"
    )
