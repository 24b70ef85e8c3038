"""What the rows of a partition can be counted by: labels, clusters, keys."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.data.integers import ordered
from fedpeft.data.partitions.partition import Indices, Partition, codes, counts_by_client
from fedpeft.data.rows import Dataset, Rows


@dataclass(frozen=True)
class Groups:
    """A count of every client's train rows by what they have in common.

    ``what``: the word for a group, ``label``, ``cluster`` or ``key``. ``names``: of the groups.
    ``held``: train rows of each group that each client holds, (clients, groups).
    """

    what: str
    names: tuple[str, ...]
    held: Indices


def groupings(dataset: Dataset, partition: Partition) -> list[Groups]:
    """Return every count that the data and the partition allow: by label, by cluster, by key."""
    found: list[Groups] = []
    if dataset.train.labels:
        found.append(_count("label", dataset.train.labels, partition))
    if partition.clusters is not None:
        clusters = [str(code) for code in partition.clusters]
        found.append(_count("cluster", clusters, partition))
    if dataset.train.keys:
        found.append(_count("key", dataset.train.keys, partition))
    return found


def label_counts(rows: Rows, partition: Partition) -> Indices:
    """Return how many train rows of each label each client holds, (clients, labels).

    Labels are those of ``rows``, sorted as by ``ordered``.
    """
    return _count("label", rows.labels, partition).held


def _count(what: str, values: Sequence[str], partition: Partition) -> Groups:
    names = ordered(values)
    return Groups(what, names, counts_by_client(partition.train, codes(values, names), len(names)))
