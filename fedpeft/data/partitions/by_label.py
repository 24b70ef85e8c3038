"""Partitions by label: Dirichlet shares of labels, labels of each client, shards."""

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.dirichlet import shares
from fedpeft.data.partitions.partition import (
    Indices,
    Partition,
    ascending,
    check_concentration,
    check_numbers,
    codes,
    deal,
    follow,
)
from fedpeft.data.rows import Dataset
from fedpeft.errors import BadInput
from fedpeft.seeds import derive


def dirichlet(
    dataset: Dataset, clients: int, seed: int, *, alpha: float, min_examples: int = 1
) -> Partition:
    """Deal each label's rows, of train and of test, by shares drawn from Dir(alpha) over clients.

    The smaller ``alpha``, the fewer clients hold most of a label. The law is the same as of
    redrawing until every client has ``min_examples`` train rows (see ``data/dirichlet.py``).
    Source: Yurochkin et al. 2019, section 4. ``label_skew`` draws the labels of each client.

    Raises BadInput for a number out of range, or so extreme that no draw gives every client
    ``min_examples``, and where rows have no labels.
    """
    check_numbers(dataset, clients, "min_examples", min_examples)
    check_concentration("alpha", alpha)
    train, test = _labels(dataset, "dirichlet")
    # One draw, (labels, clients), for both splits: a client's test rows have its own mix of labels.
    share = shares(np.bincount(train), clients, alpha, min_examples, seed)
    rng = np.random.default_rng(derive(seed, "dirichlet", "rows"))
    return ascending(deal(train, share, rng), deal(test, share, rng))


def label_skew(dataset: Dataset, clients: int, seed: int, *, alpha: float) -> Partition:
    """Let every client draw a distribution of labels from Dir(alpha x prior), and rows by it.

    ``prior``: the shares of the labels in train. Clients get equally many rows; sizes differ by one
    at most. The smaller ``alpha``, the nearer a client is to one label; the larger, the nearer to
    the prior. Where a label runs out, its last rows are dealt by lot among those who drew it, and
    the others draw again from what is left (see ``_drawn``). Of each label, a client's share of the
    test rows is its share of the train rows. Sources: Hsu et al. 2019, section 3; Lin et al. 2022
    (FedNLP), "Non-IID Label Distributions".

    Raises BadInput for a number out of range, and where rows have no labels.
    """
    check_numbers(dataset, clients)
    check_concentration("alpha", alpha)
    labels, test_labels = _labels(dataset, "label_skew")
    stock = np.bincount(labels)  # (labels,)
    rng = np.random.default_rng(derive(seed, "label_skew"))
    wishes = rng.dirichlet(alpha * stock / stock.sum(), size=clients)  # (clients, labels)
    sizes = np.diff(np.arange(clients + 1) * len(labels) // clients)  # (clients,), sums to all
    held = _drawn(wishes, rng.permutation(sizes), stock, rng)
    share = (held / stock).T  # (labels, clients), whole rows, so nothing is left to round
    train = deal(labels, share, rng)
    return ascending(train, follow(train, labels, test_labels, rng))


def _drawn(
    wishes: NDArray[np.float64], sizes: Indices, stock: Indices, rng: np.random.Generator
) -> Indices:
    """Return how many rows of each label each client draws, (clients, labels).

    All clients draw at once, by ``wishes`` (clients, labels), as many rows as they still lack of
    ``sizes`` (clients,). A label that more rows are drawn of than ``stock`` (labels,) has left goes
    by lot to those who drew it. Who lacks rows then draws again, by its wishes among the labels
    that are left. So no client comes before another. Every turn empties a label or is the last.
    """
    held = np.zeros_like(wishes, dtype=np.int64)
    while (lacking := sizes - held.sum(axis=1)).any():
        left = stock - held.sum(axis=0)
        chances = wishes * (left > 0)
        # Where the wishes give nothing to any label that is left, its stock decides.
        wishless = chances.sum(axis=1) < 1e-12
        chances[wishless] = left
        chances /= chances.sum(axis=1, keepdims=True)
        drawn = rng.multinomial(lacking, chances)  # (clients, labels)
        for label in np.flatnonzero(drawn.sum(axis=0) > left):
            # By lot and without replacement among the rows that were drawn.
            lots = rng.multivariate_hypergeometric(drawn[:, label], left[label])
            drawn[:, label] = lots
        held += drawn
    return held


def shards(dataset: Dataset, clients: int, seed: int, *, shards_per_client: int = 2) -> Partition:
    """Sort train by label, cut it into equal shards and deal each client a few of them at random.

    So a client sees few labels. Of each label, a client's share of the test rows is its share of
    the train rows. Source: McMahan et al. 2017, section 3 (the "pathological non-IID partition").

    Raises BadInput for a number out of range, for more shards than train has examples, and where
    rows have no labels.
    """
    check_numbers(dataset, clients, "shards_per_client", shards_per_client)
    labels, test_labels = _labels(dataset, "shards")
    rng = np.random.default_rng(derive(seed, "shards"))
    shuffled = rng.permutation(len(dataset.train))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]  # shuffled within each label
    shard_rows = np.array_split(by_label, clients * shards_per_client)
    dealt = rng.permutation(len(shard_rows)).reshape(clients, shards_per_client)
    train: list[Indices] = []
    for shards_of_client in dealt:
        train.append(np.concatenate([shard_rows[shard] for shard in shards_of_client]))
    return ascending(train, follow(train, labels, test_labels, rng))


def _labels(dataset: Dataset, kind: str) -> tuple[Indices, Indices]:
    """Return the number of each row's label, of train and of test; BadInput where there are none.

    Labels are in the order of ``Dataset.labels``.
    """
    if not dataset.train.labels:
        raise BadInput(
            f"partition.kind = {kind!r}: the data has no labels; name a column in data.label, "
            'or choose kind = "cluster", "by_key", "quantity" or "iid"'
        )
    return codes(dataset.train.labels, dataset.labels), codes(dataset.test.labels, dataset.labels)
