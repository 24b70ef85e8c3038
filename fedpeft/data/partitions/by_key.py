"""Partitions by natural keys: a client a key, or keys in groups."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedpeft.data.partitions.partition import Indices, Partition, ascending
from fedpeft.data.rows import Dataset, Rows
from fedpeft.errors import BadInput


def by_key(dataset: Dataset, clients: int | None = None, *, group: bool = False) -> Partition:
    """Make each distinct key of train a client with that key's rows of train and of test.

    With ``clients``, the keys with the most train rows are kept (the first by name among equals)
    and the rows of all others are not used. Clients are in the order of their names.

    With ``group``, all keys are dealt to ``clients`` groups of like size, and a client is a group:
    the keys come from the one with the most rows down, and each joins the group that has the fewest
    so far (Graham 1969, "longest processing time first"). So two groups differ at most by the rows
    of one key. Test rows of keys that train lacks are not used.

    Raises BadInput when the data has no keys, or fewer than ``clients``.
    """
    rows = Counter(dataset.train.keys)
    if not rows:
        raise BadInput(
            "partition.kind = 'by_key': the data has no keys; "
            "name the column that holds them in data.key"
        )
    if clients is not None and not 1 <= clients <= len(rows):
        raise BadInput(
            f"partition.clients = {clients}: train has {len(rows)} keys; "
            f"choose 1 to {len(rows)} clients"
        )
    # Not Counter.most_common: among equals it depends on the order of the rows.
    largest_first = sorted(rows, key=lambda name: (-rows[name], name))
    if group:
        groups = _groups(largest_first, rows, clients or len(rows))
        return ascending(_holding(dataset.train, groups), _holding(dataset.test, groups))
    names = sorted(largest_first[:clients])
    alone = [[name] for name in names]
    return ascending(_holding(dataset.train, alone), _holding(dataset.test, alone), names)


def _groups(largest_first: Sequence[str], rows: Counter[str], number: int) -> list[list[str]]:
    """Deal keys to ``number`` groups of like size; ``rows``: how many each key has."""
    groups: list[list[str]] = [[] for _ in range(number)]
    sizes = [0] * number
    for name in largest_first:
        smallest = sizes.index(min(sizes))  # the first among equals
        groups[smallest].append(name)
        sizes[smallest] += rows[name]
    return groups


def _holding(split: Rows, clients: Sequence[Sequence[str]]) -> list[Indices]:
    """Return, for each client, the rows of ``split`` that have one of its keys."""
    client_of: dict[str, int] = {}
    for client, names in enumerate(clients):
        for name in names:
            client_of[name] = client
    rows: list[list[int]] = [[] for _ in clients]
    for row, key in enumerate(split.keys):
        if key in client_of:
            rows[client_of[key]].append(row)
    return [np.array(client_rows, dtype=np.int64) for client_rows in rows]
