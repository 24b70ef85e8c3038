"""The micro-batches of a step: which rows of K clients' batches go through the model together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple, final

import torch
from torch import Tensor

from fedpeft.tasks import Encoded, Example
from fedpeft.training import private
from fedpeft.training.bucketing import Buckets
from fedpeft.training.hardware import Hardware


@dataclass(frozen=True)
class Share:
    """What one client trains on in one round.

    ``steps``: the rows of ``examples`` in each of its optimizer steps. ``states``: the cached
    hidden states of every example, (length, width), or None where they are not cached.
    """

    examples: Encoded
    steps: Sequence[Sequence[int]]
    states: Sequence[Tensor] | None = None


@final
@dataclass(frozen=True)
class MicroBatch:
    """Some rows of one step of a stack, which go through the model together.

    ``clients``: the place in the stack of each row's client, (n,). ``owners``: the same in the form
    that ``row_owners`` takes. ``weights``: the weight of each row in its client's mean loss, (n,).
    ``states``: the cached hidden states of each row; None unless the whole step has them.
    ``copies``: of how many rows of the data the examples are, equally many of each, all of one
    client, where each is to have a gradient of its own.
    """

    examples: Encoded
    states: Sequence[Tensor] | None
    clients: Tensor
    owners: slice | Tensor
    weights: Tensor
    copies: int | None = None


Batch = tuple[Share, Sequence[int]]
"""A client's share, and the indices of its examples in one step."""


class Row(NamedTuple):
    """One row of a step: its share, the place of its client in the stack, its example's index."""

    share: Share
    client: int
    example: int


def micro_batches(batches: Sequence[Batch], buckets: Buckets, threads: int) -> Iterator[MicroBatch]:
    """Yield the K clients' batches of one step in micro-batches of rows of like length.

    A micro-batch may hold rows of several clients, and those of one client are neighbours in it.
    Gradients are per client whatever the grouping. ``threads``: how many micro-batches are computed
    at once.
    """
    rows: list[Row] = []
    for client, (share, indices) in enumerate(batches):
        rows += [Row(share, client, example) for example in indices]
    lengths = [row.share.examples.lengths[row.example] for row in rows]
    totals: list[int] = []
    for share, indices in batches:
        totals.append(sum(share.examples[index].weight for index in indices))
    # One pass begins at one block: with the states of some rows only, all begin at the first.
    cached = all(share.states is not None for share, _ in batches)
    for bucket in buckets.dealt(lengths, threads):
        bucket_rows = [rows[index] for index in bucket]
        # A stable sort: the rows of a client stay in the order of the bucket.
        by_client = sorted(bucket_rows, key=attrgetter("client"))
        yield _micro_batch(by_client, [totals[row.client] for row in by_client], cached)


def row_batches(batches: Sequence[Batch], buckets: Buckets, most_rows: int) -> Iterator[MicroBatch]:
    """Yield the K clients' batches of one step in micro-batches of rows of one client's data.

    ``most_rows``: the most in one; their gradients are then taken apart by copies. The weights in a
    micro-batch are those of each row's mean loss. Which rows go together depends on nothing but the
    client's own batch.
    """
    # Rows of the data, not texts: hooks that take the gradients of texts apart, as opacus has them
    # for modules, do not see what is mounted here.
    cached = all(share.states is not None for share, _ in batches)
    for client, (share, indices) in enumerate(batches):
        for together in private.alike(share.examples, indices, buckets, most_rows):
            rows: list[Row] = []
            totals: list[int] = []
            for of_row in together:
                rows += [Row(share, client, index) for index in of_row]
                total = sum(share.examples[index].weight for index in of_row)
                totals += [total] * len(of_row)
            copies = len(together) if len(together) > 1 else None
            yield _micro_batch(rows, totals, cached, copies)


def _micro_batch(
    rows: Sequence[Row], totals: Sequence[int], cached: bool, copies: int | None = None
) -> MicroBatch:
    """Return ``rows``, sorted by client, as a micro-batch.

    ``totals``: for each row, the weights together that are those of its mean loss. ``cached``:
    whether every share has hidden states. ``copies``: see ``MicroBatch``.
    """
    examples: list[Example] = []
    states: list[Tensor] = []
    row_clients: list[int] = []
    row_weights: list[float] = []
    for (share, client, example), total in zip(rows, totals, strict=True):
        row_clients.append(client)
        examples.append(share.examples[example])
        # A step may have no weight at all, as one of sentences without words: it teaches nothing.
        row_weights.append(share.examples[example].weight / max(1, total))
        if share.states is not None:
            states.append(share.states[example])
    clients = torch.tensor(row_clients)
    return MicroBatch(
        examples=Encoded(examples),
        states=states if cached else None,
        clients=clients,
        owners=_owners(clients),
        weights=torch.tensor(row_weights),
        copies=copies,
    )


def grouping(shares: Sequence[Share], hardware: Hardware) -> tuple[Buckets, int]:
    """Return how a step is cut into micro-batches, and how many of these are computed at once.

    A client alone has few micro-batches, one after another.
    """
    if len(shares) == 1:
        # It may train whole weights. Their gradients take long to add up, so a bucket more costs as
        # much as a full one. And they stand in for the model's own, of which there is one set, so
        # two threads cannot go through the model at once.
        return replace(hardware.buckets, overhead_tokens=hardware.tokens), 1
    return hardware.buckets, _num_parallel(shares, hardware, hardware.buckets)


def _num_parallel(shares: Sequence[Share], hardware: Hardware, buckets: Buckets) -> int:
    """Return how many micro-batches are computed at once: all, as far as there are threads."""
    # Judged by the first step, in which all clients take part.
    lengths: list[int] = []
    for share in shares:
        lengths += [share.examples.lengths[row] for row in share.steps[0]]
    return max(1, min(hardware.threads, len(buckets.cheapest(lengths))))


def _owners(clients: Tensor) -> slice | Tensor:
    """Return the clients of the rows in the form that ``row_owners`` takes.

    ``clients``, (n,), ascending: the client of each row. The result is a slice where they are
    neighbours in the stack and have equally many rows each: factors are then not gathered for every
    row. Otherwise it is ``clients``.
    """
    present, counts = torch.unique_consecutive(clients, return_counts=True)
    first, last = int(present[0]), int(present[-1])
    neighbours = last - first + 1 == len(present)
    if neighbours and bool((counts == counts[0]).all()):
        return slice(first, last + 1)
    return clients
