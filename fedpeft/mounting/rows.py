"""Whose rows a batch holds: the clients of the stack that take part in a forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fedpeft.errors import NotStackable

RowOwners = slice | Tensor
"""The clients of a batch: a slice of the stack, in order and with equally many rows each; or the
client of every row, (rows,)."""


@final
@dataclass(frozen=True)
class Copies:
    """What one client trains, once for each of R parts of its batch: a gradient for each comes out.

    ``parts``: R; each has equally many neighbouring rows of the batch. ``of``: a stack that is
    trained, (K, ...) -> its copies, (R, ...).
    """

    parts: int
    of: Mapping[Tensor, Tensor]  # tensors hash by identity


# Context variables and not globals: micro-batches of several threads go through one model at once.
_OWNERS: ContextVar[RowOwners] = ContextVar("owners", default=slice(None))
_ROWS: ContextVar[int | None] = ContextVar("rows", default=None)
_COPIES: ContextVar[Copies | None] = ContextVar("copies", default=None)
_FOR_COPIES: ContextVar[bool] = ContextVar("for_copies", default=False)


@contextmanager
def row_owners(
    owners: RowOwners, rows: int | None = None, copies: Copies | None = None
) -> Iterator[None]:
    """Say, for the length of a ``with``, which clients the rows of a batch belong to.

    ``rows``: how many rows there are, if known. ``copies``: what stands in for the parameters of
    the batch's only client, which ``owners`` is then the slice of.
    """
    tokens = _OWNERS.set(owners), _ROWS.set(rows), _COPIES.set(copies)
    try:
        yield
    finally:
        _OWNERS.reset(tokens[0])
        _ROWS.reset(tokens[1])
        _COPIES.reset(tokens[2])


@contextmanager
def mounting_for_copies() -> Iterator[None]:
    """Let what is mounted in a ``with`` be such that ``Copies`` can stand in for it.

    What cannot be mounted so raises NotStackable, as it does for several clients.
    """
    token = _FOR_COPIES.set(True)
    try:
        yield
    finally:
        _FOR_COPIES.reset(token)


def is_for_copies() -> bool:
    """Return whether this is inside of a ``with mounting_for_copies()``."""
    return _FOR_COPIES.get()


def select_clients(stack: Tensor, *, transposed: bool = False) -> Tensor:
    """Return the entries of a (K, ...) stack that the batch needs, maybe ``transposed`` matrices.

    There is one entry a client, or one a row where the rows of clients mix, or one a copy.
    """
    owners, copies = _OWNERS.get(), _COPIES.get()
    if copies is not None:
        entries = copies.of.get(stack)
        if entries is None:  # frozen: the client's own serves all parts
            entries = stack[owners].expand(copies.parts, *stack.shape[1:])
        return entries.mT if transposed else entries
    # Transposed before rows are gathered: what comes back to be added up is contiguous.
    stack = stack.mT if transposed else stack
    # A slice is a view; ``index_select`` adds up gradients of rows into their client's entry.
    return stack[owners] if isinstance(owners, slice) else stack.index_select(0, owners)


def group_by_client(x: Tensor, parts: int) -> Tensor:
    """Return x, (parts * b, ..., in), as (parts, b * ..., in), for ``parts`` entries of a stack.

    A layer whose rows are not those of the batch raises NotStackable, unless there is one part.
    With copies so does one where another axis is as long.
    """
    rows = _ROWS.get()
    # A model may turn (rows, length) round inside, or feed a layer with rows of its own: nobody
    # knows then which client they are of. With one client it does not matter.
    if parts > 1 and (x.shape[0] % parts or (rows is not None and x.shape[0] != rows)):
        raise _other_rows(x)
    # Turned round, (length, rows) looks like (rows, length) where both are the same number. A row's
    # bound holds for its own copy alone, so what is ambiguous is refused.
    if parts > 1 and _COPIES.get() is not None and x.shape[0] in x.shape[1:-1]:
        raise NotStackable(f"a layer sees {x.shape[0]} rows in either of two axes")
    return x.reshape(parts, -1, x.shape[-1])


def by_client(x: Tensor, stack: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return x, (rows, ..., in), cut into runs of one client's rows, in order: (entry, rows).

    ``stack``: (K, ...), of which a run has its client's entry, or its copy. A layer whose rows are
    not those of the batch raises NotStackable, unless the whole batch is one client's.
    """
    owners, rows, copies = _OWNERS.get(), _ROWS.get(), _COPIES.get()
    copied = None if copies is None else copies.of.get(stack)
    # Unbound as a whole: the gradients of all entries come back as one stack.
    entries = (stack if copied is None else copied).unbind()
    if isinstance(owners, slice):
        present = entries[owners] if copied is None else entries
        # (n, b, ..., in): grouping checks the number of rows, and the view gives back their axes.
        runs = group_by_client(x, len(present)).view(len(present), -1, *x.shape[1:])
        return list(zip(present, runs, strict=True))
    if len(owners) != x.shape[0] or (rows is not None and x.shape[0] != rows):
        raise _other_rows(x)
    # Owners ascend (see ``micro_batches``), so each client has one run.
    run_owners, lengths = torch.unique_consecutive(owners, return_counts=True)
    runs_of_rows = torch.split(x, lengths.tolist())
    of_runs = [entries[owner] for owner in run_owners.tolist()]
    return list(zip(of_runs, runs_of_rows, strict=True))


def _other_rows(x: Tensor) -> NotStackable:
    """Return the error for a layer that sees other rows than the batch has."""
    return NotStackable(
        f"a layer sees {x.shape[0]} rows, which are not those of the stack's batch; "
        "use a stack of 1"
    )
