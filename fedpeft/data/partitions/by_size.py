"""Partitions that look at no row: even ones, and ones in which sizes differ."""

import numpy as np

from fedpeft.data.dirichlet import shares
from fedpeft.data.partitions.partition import (
    Partition,
    ascending,
    check_concentration,
    check_numbers,
    deal,
)
from fedpeft.data.rows import Dataset
from fedpeft.seeds import derive


def iid(dataset: Dataset, clients: int, seed: int) -> Partition:
    """Shuffle the rows and deal them evenly: sizes differ by one at most, in train and in test.

    Raises BadInput for fewer than one client and for more than train has examples.
    """
    check_numbers(dataset, clients)
    rng = np.random.default_rng(derive(seed, "iid"))
    train = np.array_split(rng.permutation(len(dataset.train)), clients)
    test = np.array_split(rng.permutation(len(dataset.test)), clients)
    return ascending(train, test)


def quantity(
    dataset: Dataset, clients: int, seed: int, *, beta: float, min_examples: int = 1
) -> Partition:
    """Shuffle the rows and deal them by shares of all of them that are drawn from Dir(beta).

    The smaller ``beta``, the more sizes differ; what a client's rows are like does not depend on
    it. A client has the same share of train and of test, and at least ``min_examples`` train rows
    (see ``data/dirichlet.py``). Source: Lin et al. 2022 (FedNLP), quantity shift.

    Raises BadInput for a number out of range, or so extreme that no draw gives every client
    ``min_examples``.
    """
    check_numbers(dataset, clients, "min_examples", min_examples)
    check_concentration("beta", beta)
    size = np.array([len(dataset.train)])
    share = shares(size, clients, beta, min_examples, seed, field="beta")  # (1, clients)
    rng = np.random.default_rng(derive(seed, "quantity"))
    # All rows are of one group, so they are dealt without a look at their labels.
    train = deal(np.zeros(len(dataset.train), dtype=np.int64), share, rng)
    test = deal(np.zeros(len(dataset.test), dtype=np.int64), share, rng)
    return ascending(train, test)
