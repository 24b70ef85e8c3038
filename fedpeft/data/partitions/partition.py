"""A partition as a value, and the steps that several ways of dividing share."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.dirichlet import counts
from fedpeft.data.rows import Dataset
from fedpeft.errors import BadInput

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """The rows of each client.

    ``train[k]`` and ``test[k]``: ascending row numbers of client k; ``names[k]``: its name.
    ``test`` is for scores per client and may be empty for some. ``notes``: what the user should
    know about the partition, a line each. ``clusters``: the cluster of every train row, (rows,),
    where the rows were divided by clusters; otherwise None.
    """

    train: tuple[Indices, ...]
    test: tuple[Indices, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    clusters: Indices | None = None

    def digest(self) -> str:
        """Return 16 hex digits of the SHA-256 of who holds what.

        Equal digests mean equal partitions; the clients' names do not matter.
        """
        hashed = sha256()
        for rows in (*self.train, *self.test):
            # The length first: rows must not count as those of the next client.
            hashed.update(len(rows).to_bytes(8, "little"))
            hashed.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
        return hashed.hexdigest()[:16]


def ascending(
    train: Sequence[Indices], test: Sequence[Indices] = (), names: Sequence[str] = ()
) -> Partition:
    """Return the partition with the rows of every client sorted.

    Without ``test``, no client has test rows; without ``names``, the clients are numbered.
    """
    if not test:
        test = [np.empty(0, dtype=np.int64)] * len(train)
    if not names:
        names = [f"client {client}" for client in range(len(train))]
    return Partition(tuple(map(np.sort, train)), tuple(map(np.sort, test)), tuple(names))


def check_numbers(dataset: Dataset, clients: int, field: str = "clients", each: int = 1) -> None:
    """Raise BadInput for numbers below 1 and for more clients than train has rows for.

    ``field``: the setting that says how many rows, or shards, every client needs; ``each``: its
    value.
    """
    examples = len(dataset.train)
    if clients < 1 or each < 1:
        name, value = ("clients", clients) if clients < 1 else (field, each)
        raise BadInput(f"partition.{name} = {value}: must be 1 or more")
    if clients > examples:
        raise BadInput(
            f"partition.clients = {clients}: train has only {examples} examples; "
            f"at most {examples} clients"
        )
    if clients * each > examples:
        most = examples // clients
        raise BadInput(
            f"partition.{field} = {each}: train has only {examples} examples "
            f"for {clients} clients; at most {most} each"
        )


def check_concentration(field: str, value: float) -> None:
    """Raise BadInput for a parameter of a Dirichlet law that is too small, infinite or NaN."""
    if not 0.001 <= value < np.inf:  # smaller Gamma numbers vanish in float64
        raise BadInput(
            f"partition.{field} = {value}: must be a number from 0.001 up, as 0.1 or 1.0"
        )


def codes(values: Sequence[str], names: Sequence[str]) -> Indices:
    """Return the position of each of ``values`` in ``names``, (values,); -1 where it is not there.

    >>> codes(["b", "a", "c"], ["a", "b"]).tolist()
    [1, 0, -1]
    """
    code_of = {name: code for code, name in enumerate(names)}
    return np.array([code_of.get(value, -1) for value in values], dtype=np.int64)


def deal(group: Indices, share: NDArray[np.float64], rng: np.random.Generator) -> list[Indices]:
    """Shuffle the rows of each group, deal them by ``share`` and return the rows of each client.

    ``group``: the group of every row, such as its label, (rows,); rows of group -1 are dealt to
    nobody. ``share``: what of each group each client gets, (groups, clients), rows sum to 1.
    """
    clients = share.shape[1]
    pieces: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = np.bincount(group[group >= 0], minlength=len(share))
    for code, counts_of_group in enumerate(counts(share, sizes)):
        rows = rng.permutation(np.flatnonzero(group == code))
        # ``np.split`` wants the inner borders; the last piece goes to the end.
        cuts = np.cumsum(counts_of_group)[:-1]
        for client, piece in enumerate(np.split(rows, cuts)):
            pieces[client].append(piece)
    return [np.concatenate(client_pieces) for client_pieces in pieces]


def follow(
    train: Sequence[Indices], group: Indices, test_group: Indices, rng: np.random.Generator
) -> list[Indices]:
    """Deal the test rows of each group as its train rows lie; return those of each client.

    ``train``: the train rows of each client. ``group`` and ``test_group``: the group of every row,
    (rows,). Test rows of a group of which no client holds a train row are dealt to nobody.
    """
    num_groups = 1 + max(group.max(initial=-1), test_group.max(initial=-1))
    held = counts_by_client(train, group, num_groups)  # (clients, groups)
    totals = held.sum(axis=0)
    share = (held / np.maximum(totals, 1)).T  # (groups, clients)
    has_holder = np.append(totals > 0, False)  # the last entry is read by group -1
    return deal(np.where(has_holder[test_group], test_group, -1), share, rng)


def counts_by_client(rows: Sequence[Indices], group: Indices, num_groups: int) -> Indices:
    """Return how many of ``rows`` of each client are of each group, (clients, groups).

    ``group``: the group of every row of the split, (rows,).
    """
    held: list[Indices] = []
    for client_rows in rows:
        held.append(np.bincount(group[client_rows], minlength=num_groups))
    return np.stack(held)
