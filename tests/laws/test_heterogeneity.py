"""The summary of a partition agrees with its formulas, written out plainly."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data import Dataset, Partition, Rows, iid
from fedpeft.data import heterogeneity as module
from fedpeft.data.heterogeneity import MOST_EXACT, gini, heterogeneity, total_variation
from fedpeft.seeds import derive


def of_labels(clients: list[list[str]]) -> tuple[Dataset, Partition]:
    """Return data and a partition in which each client holds rows of the given labels."""
    labels = [label for held in clients for label in held]
    rows = Rows.of_texts([str(row) for row in range(len(labels))], labels)
    borders = np.cumsum([0, *map(len, clients)])
    train = tuple(np.arange(start, end) for start, end in zip(borders, borders[1:], strict=False))
    nothing = (np.empty(0, dtype=np.int64),) * len(clients)
    names = tuple(f"client {client}" for client in range(len(clients)))
    return Dataset("made", rows, rows.take([]), rows.take([])), Partition(train, nothing, names)


def shares(labels: list[str]) -> dict[str, float]:
    return {label: count / len(labels) for label, count in Counter(labels).items()}


def entropy(labels: list[str]) -> float:
    return -sum(share * math.log2(share) for share in shares(labels).values())


def variation(one: list[str], other: list[str]) -> float:
    first, second = shares(one), shares(other)
    return sum(abs(first.get(x, 0) - second.get(x, 0)) for x in {*first, *second}) / 2


clients = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=20), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(clients=clients)
def test_the_figures_are_those_of_their_formulas(clients: list[list[str]]) -> None:
    summary = heterogeneity(*of_labels(clients))
    [skew] = summary.skews
    everything = [label for held in clients for label in held]
    assert skew.what == "label"
    assert skew.groups == len(set(everything))
    assert skew.entropy == pytest.approx(np.mean([entropy(held) for held in clients]))
    assert skew.entropy_of_all == pytest.approx(entropy(everything))
    pairs = [variation(one, other) for one, other in combinations(clients, 2)]
    assert skew.total_variation == pytest.approx(np.mean(pairs) if pairs else 0.0)
    sizes = list(map(len, clients))
    differences = [abs(one - other) for one in sizes for other in sizes]
    assert summary.sizes.gini == pytest.approx(sum(differences) / (2 * len(sizes) * sum(sizes)))
    assert (summary.sizes.min, summary.sizes.max) == (min(sizes), max(sizes))
    assert summary.sizes.median == np.median(sizes)
    assert (summary.sizes.clients, summary.sizes.rows) == (len(sizes), sum(sizes))


def test_of_many_clients_a_sample_of_pairs_is_near_all_of_them() -> None:
    rng = np.random.default_rng(0)
    distributions = rng.dirichlet([0.3] * 5, size=2 * MOST_EXACT)
    exact = np.mean(
        [np.abs(one - other).sum() / 2 for one, other in combinations(distributions, 2)]
    )
    assert total_variation(distributions) == pytest.approx(exact, rel=0.01)
    assert total_variation(distributions) == total_variation(distributions)
    # No client is compared with itself: of two kinds in equal numbers, half of the pairs differ.
    assert total_variation(np.eye(2 * MOST_EXACT)) == 1.0


@pytest.mark.parametrize("chunk", [1, 7, 10**9])
def test_pairs_at_once_are_pairs_one_by_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are taken at once; the pairs are those that the seed draws."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "MOST_EXACT", 6)
    distributions = np.random.default_rng(1).dirichlet([0.3] * 3, size=9)
    pairs = 6 * 5 // 2
    draw = np.random.default_rng(derive(5, "pairs"))
    first = draw.integers(9, size=pairs)
    second = (first + draw.integers(1, 9, size=pairs)) % 9
    alone = [
        np.abs(distributions[one] - distributions[other]).sum() / 2
        for one, other in zip(first, second, strict=True)
    ]
    assert total_variation(distributions, seed=5) == pytest.approx(np.mean(alone), rel=1e-12)


def test_the_ends_of_the_scales() -> None:
    alike = heterogeneity(*of_labels([list("abab"), list("abab")]))
    assert (alike.skews[0].total_variation, alike.sizes.gini) == (0.0, 0.0)
    apart = heterogeneity(*of_labels([list("aaaa"), list("b")]))
    assert (apart.skews[0].total_variation, apart.skews[0].entropy) == (1.0, 0.0)
    assert math.copysign(1, apart.skews[0].entropy) == 1  # no -0.0 in a table
    assert gini(np.array([3, 1])) == 0.25


def test_keys_count_where_there_are_no_labels() -> None:
    rows = Rows({"text": ("a", "b", "c", "d")}, keys=("x", "x", "y", "y"))
    data = Dataset("made", rows, rows.take([]), rows.take([]))
    summary = heterogeneity(data, iid(data, 1, 0))
    assert [skew.what for skew in summary.skews] == ["key"]
    assert summary.to_json()["key"]["entropy_of_all"] == 1.0
    nothing = Rows({"text": ("a", "b", "c", "d")})
    data = Dataset("made", nothing, nothing.take([]), nothing.take([]))
    summary = heterogeneity(data, iid(data, 2, 0))
    assert summary.skews == ()
    assert summary.lines() == ["train rows a client: 2 to 2, median 2, Gini 0.00"]
