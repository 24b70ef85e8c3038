"""How unlike clients are: label entropy, total variation, and sizes of their shards.

``p_k`` is the distribution of groups (labels, clusters or keys) among the train rows of client k,
``p`` that of all rows that a client holds.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.partitions import Groups, Partition, groupings
from fedpeft.data.rows import Dataset
from fedpeft.seeds import derive

MOST_EXACT = 300
"""Clients up to which all pairs are compared; of more, as many pairs as these have are drawn."""
CHUNK = 1 << 20
"""Numbers of which differences of drawn pairs are taken at once, 8 MB."""


@dataclass(frozen=True)
class Sizes:
    """How many train rows clients hold; ``gini``: 0 for equal sizes, towards 1 for one holder."""

    clients: int
    rows: int
    min: int
    median: float
    max: int
    gini: float


@dataclass(frozen=True)
class Skew:
    """How unlike clients are in one respect.

    ``what``: ``label``, ``cluster`` or ``key``. ``groups``: how many there are of it. ``entropy``:
    mean over clients of H(p_k), and ``entropy_of_all`` is H(p), in bits. ``total_variation``: mean
    over pairs of clients.
    """

    what: str
    groups: int
    entropy: float
    entropy_of_all: float
    total_variation: float


@dataclass(frozen=True)
class Heterogeneity:
    """The summary of a partition."""

    sizes: Sizes
    skews: tuple[Skew, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as what ``json`` writes: ``sizes``, and a skew under each of its words."""
        skews: dict[str, Any] = {}
        for skew in self.skews:
            figures = asdict(skew)
            skews[figures.pop("what")] = figures
        return {"sizes": asdict(self.sizes), **skews}

    def lines(self) -> list[str]:
        """Return it in words, a line each."""
        sizes = self.sizes
        said = [
            f"train rows a client: {sizes.min} to {sizes.max}, median {sizes.median:g}, "
            f"Gini {sizes.gini:.2f}"
        ]
        for skew in self.skews:
            said.append(
                f"{skew.what} ({skew.groups}): entropy {skew.entropy:.2f} bits a client, "
                f"{skew.entropy_of_all:.2f} of all; "
                f"total variation of two clients {skew.total_variation:.2f}"
            )
        return said


def heterogeneity(dataset: Dataset, partition: Partition) -> Heterogeneity:
    """Return the summary of who holds which train rows."""
    skews: list[Skew] = []
    for groups in groupings(dataset, partition):
        skews.append(_skew(groups))
    rows = np.array([len(client_rows) for client_rows in partition.train])
    sizes = Sizes(
        clients=len(rows),
        rows=int(rows.sum()),
        min=int(rows.min()),
        median=float(np.median(rows)),
        max=int(rows.max()),
        gini=gini(rows),
    )
    return Heterogeneity(sizes, tuple(skews))


def _skew(groups: Groups) -> Skew:
    held = groups.held.astype(np.float64)
    distributions = held / held.sum(axis=1, keepdims=True)  # every client has a row
    return Skew(
        what=groups.what,
        groups=len(groups.names),
        entropy=float(entropy(distributions).mean()),
        entropy_of_all=float(entropy(held.sum(axis=0) / held.sum())),
        total_variation=total_variation(distributions),
    )


def entropy(distributions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return H(p) = -sum_g p_g log2 p_g in bits, over the last axis; 0 log 0 is 0.

    >>> entropy(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    # The logarithm of 1 stands in where there is nothing.
    logs = np.log2(np.where(distributions > 0, distributions, 1.0))
    bits: NDArray[np.float64] = np.abs((distributions * logs).sum(axis=-1))  # abs gives no -0.0
    return bits


def total_variation(distributions: NDArray[np.float64], seed: int = 0) -> float:
    """Return the mean of TV(p_j, p_k) = 1/2 sum_g |p_jg - p_kg| over all pairs j < k.

    ``distributions``: (clients, groups). Of more than ``MOST_EXACT`` clients, pairs of two
    different ones are drawn from ``seed``. It is 0 for a single client.

    >>> total_variation(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))  # 1, 1 and 0
    0.6666666666666666
    """
    clients = len(distributions)
    if clients < 2:
        return 0.0
    total = 0.0
    if clients <= MOST_EXACT:
        for client in range(clients - 1):
            others = distributions[client + 1 :]
            total += float(np.abs(others - distributions[client]).sum()) / 2
        return total / (clients * (clients - 1) / 2)
    pairs = MOST_EXACT * (MOST_EXACT - 1) // 2
    rng = np.random.default_rng(derive(seed, "pairs"))
    first = rng.integers(clients, size=pairs)
    # A step of 1 to clients - 1 around the circle leads to any other client equally often.
    second = (first + rng.integers(1, clients, size=pairs)) % clients
    # Not all pairs at once: these would be (pairs, groups) numbers, several times over.
    at_once = max(1, CHUNK // distributions.shape[1])
    for start in range(0, pairs, at_once):
        chosen = slice(start, start + at_once)
        differences = distributions[first[chosen]] - distributions[second[chosen]]
        total += float(np.abs(differences).sum()) / 2
    return total / pairs


def gini(sizes: NDArray[np.int64]) -> float:
    """Return the Gini coefficient, sum_jk |n_j - n_k| / (2 K sum_k n_k) for K clients.

    >>> gini(np.array([5, 5])), gini(np.array([0, 0, 0, 12]))
    (0.0, 0.75)
    """
    ascending = np.sort(sizes)
    clients = len(sizes)
    # With sizes in ascending order, n_k stands k - 1 times above and K - k times below another.
    weights = 2 * np.arange(1, clients + 1) - clients - 1
    return float((weights * ascending).sum() / (clients * sizes.sum()))
