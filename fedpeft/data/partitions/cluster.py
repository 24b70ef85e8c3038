"""Partitions by clusters of what texts say, for tasks without labels."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.dirichlet import shares
from fedpeft.data.partitions.partition import (
    Indices,
    Partition,
    ascending,
    check_concentration,
    check_numbers,
    deal,
)
from fedpeft.data.rows import Dataset, Rows
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

Embed = Callable[[Sequence[Rows]], Sequence[NDArray[np.float32]]]
"""Gives every row of several splits a vector that is near those of rows which say the like.

The vectors of a split are (rows, width).
"""

STARTS = 4
"""Times that k-means starts anew; the tightest clusters are kept."""


def cluster(
    dataset: Dataset,
    clients: int,
    seed: int,
    *,
    embed: Embed,
    clusters: int,
    alpha: float,
    min_examples: int = 1,
) -> Partition:
    """Deal the rows of each cluster by shares drawn from Dir(alpha) over clients.

    Clusters are those of k-means on the embeddings of the train rows, of length 1 each; a test row
    belongs to the cluster whose centre is nearest. Then they stand for labels, as in ``dirichlet``:
    every client has ``min_examples`` train rows at least. Source: Lin et al. 2022 (FedNLP),
    "Controlling non-IID Features".

    Raises BadInput for a number out of range, for more clusters than train has examples, and
    without scikit-learn.
    """
    check_numbers(dataset, clients, "min_examples", min_examples)
    check_concentration("alpha", alpha)
    examples = len(dataset.train)
    if not 1 <= clusters <= examples:
        raise BadInput(
            f"partition.clusters = {clusters}: train has {examples} examples; "
            f"choose 1 to {examples} clusters"
        )
    train, test = _clusters(dataset, embed, clusters, seed)
    # Of rows that say the same there may be fewer different ones than clusters: some are empty.
    sizes = np.bincount(train, minlength=clusters)
    filled = sizes > 0
    share = np.zeros((clusters, clients))
    share[filled] = shares(sizes[filled], clients, alpha, min_examples, seed)
    share[~filled, 0] = 1.0  # of no row
    rng = np.random.default_rng(derive(seed, "cluster", "rows"))
    divided = ascending(deal(train, share, rng), deal(test, share, rng))
    return replace(divided, clusters=train)


def _clusters(dataset: Dataset, embed: Embed, clusters: int, seed: int) -> tuple[Indices, Indices]:
    """Return the cluster of every row, of train and of test."""
    try:
        from sklearn.cluster import KMeans  # noqa: PLC0415
        from threadpoolctl import threadpool_limits  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise BadInput(
            "partition.kind = 'cluster' needs scikit-learn; "
            "get it with: pip install 'fedpeft[data]'"
        ) from error
    train, test = embed([dataset.train, dataset.test])
    random_state = derive(seed, "cluster") % 2**32  # scikit-learn takes 32 bits
    # One thread: the order in which several add up decides the last digits of a centre. And no
    # warning where fewer rows differ than there are clusters: then some clusters stay empty.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = KMeans(clusters, n_init=STARTS, random_state=random_state).fit(_of_length_1(train))
        test_codes = np.empty(0, dtype=np.int64)
        if len(test):
            test_codes = means.predict(_of_length_1(test))
    return means.labels_.astype(np.int64), test_codes.astype(np.int64)


def _of_length_1(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return vectors, (rows, width), scaled to length 1, so that distances are those of angles."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: NDArray[np.float64] = vectors / np.maximum(lengths, 1e-12)
    return unit
