"""Laws of partitions: every row has one holder, the shares follow the law they are drawn from, nonsense is refused."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.data import (
    Dataset,
    Partition,
    Rows,
    by_key,
    cluster,
    dirichlet,
    from_file,
    groupings,
    iid,
    label_counts,
    label_skew,
    quantity,
    shards,
)
from fedpeft.data.dirichlet import counts, shares
from fedpeft.data.rows import stratified
from fedpeft.errors import BadInput

Deal = Callable[[Dataset, int, int], Partition]


def vectors(splits: Sequence[Rows]) -> list[NDArray[np.float32]]:
    """Embed rows so that those of one label lie together: a corner each, and a little beside it."""
    embedded = []
    for rows in splits:
        place = np.zeros((len(rows), 12), dtype=np.float32)
        for row, (text, label) in enumerate(zip(rows.texts, rows.labels, strict=True)):
            place[row, int(label.split()[1])] = 1.0
            place[row, 8 + int(text.split()[1]) % 4] = 0.1
        embedded.append(place)
    return embedded


def clustered(
    data: Dataset, clients: int, seed: int, *, alpha: float = 5.0, min_examples: int = 1
) -> Partition:
    return cluster(
        data,
        clients,
        seed,
        embed=vectors,
        clusters=3,
        alpha=alpha,
        min_examples=min_examples,
    )


DEALS: dict[str, Deal] = {
    "iid": iid,
    "quantity": lambda data, clients, seed: quantity(data, clients, seed, beta=5.0),
    "label_skew": lambda data, clients, seed: label_skew(data, clients, seed, alpha=5.0),
    "cluster": clustered,
    "dirichlet": lambda data, clients, seed: dirichlet(data, clients, seed, alpha=5.0),
    "shards": lambda data, clients, seed: shards(data, clients, seed, shards_per_client=2),
}


def row_owners(labels: list[int], keys: list[int] | None = None) -> Rows:
    return Rows.of_texts(
        texts=[f"text {n}" for n in range(len(labels))],
        labels=[f"label {label}" for label in labels],
        keys=[f"key {key}" for key in keys or []],
    )


def dataset(train: Rows, test: Rows) -> Dataset:
    return Dataset("made", train, Rows.of_texts((), ()), test)


def cycle(examples: int, labels: int) -> Rows:
    return row_owners([n % labels for n in range(examples)], [n % 7 for n in range(examples)])


def scattered(labels: int, train: int, test: int, seed: int) -> Dataset:
    """A data set with every label in train, and else labels and keys at random."""
    rng = np.random.default_rng(seed)
    first = [*range(labels), *rng.integers(labels, size=train - labels).tolist()]
    keys = rng.integers(10, size=train + test).tolist()
    return dataset(
        row_owners(first, keys[:train]),
        row_owners(rng.integers(labels, size=test).tolist(), keys[train:]),
    )


datasets = st.builds(
    scattered, st.integers(1, 4), st.integers(40, 80), st.integers(0, 30), st.integers(0, 2**32)
)


def assert_dealt(held: tuple[NDArray[np.int64], ...], size: int) -> None:
    """Every row has one holder, and every holder's rows ascend."""
    assert sorted(np.concatenate(held).tolist()) == list(range(size))
    assert all((np.diff(rows) > 0).all() for rows in held)


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
@settings(max_examples=25, deadline=None)
@given(data=datasets, clients=st.integers(1, 8), seed=st.integers(0, 2**62))
def test_every_row_has_one_holder_and_nobody_is_empty(
    deal: Deal, data: Dataset, clients: int, seed: int
) -> None:
    partition = deal(data, clients, seed)
    assert_dealt(partition.train, len(data.train))
    assert_dealt(partition.test, len(data.test))
    assert min(map(len, partition.train)) >= 1
    assert partition.names == tuple(f"client {client}" for client in range(clients))


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
def test_the_seed_decides(deal: Deal) -> None:
    data = dataset(cycle(200, 4), cycle(100, 4))
    first, again, other = deal(data, 5, 0), deal(data, 5, 0), deal(data, 5, 1)
    assert all(map(np.array_equal, first.train + first.test, again.train + again.test))
    assert not any(map(np.array_equal, first.train + first.test, other.train + other.test))


@settings(max_examples=25, deadline=None)
@given(data=datasets, clients=st.integers(1, 40))
def test_iid_is_even(data: Dataset, clients: int) -> None:
    partition = iid(data, clients, 0)
    for held in (partition.train, partition.test):
        assert max(map(len, held)) - min(map(len, held)) <= 1


@settings(max_examples=25, deadline=None)
@given(data=datasets, clients=st.integers(1, 8))
def test_label_counts_counts(data: Dataset, clients: int) -> None:
    partition = iid(data, clients, 0)
    for client, row in enumerate(label_counts(data.train, partition)):
        found = Counter(data.train.labels[row] for row in partition.train[client])
        assert row.tolist() == [found[label] for label in data.labels]


@pytest.mark.parametrize("name", ["dirichlet", "label_skew", "shards"])
def test_test_rows_follow_the_shares_of_train(name: str) -> None:
    rows = cycle(600, 3)
    partition = DEALS[name](dataset(rows, rows), 7, 0)
    on_test = Partition(partition.test, partition.train, partition.names)
    assert label_counts(rows, partition).tolist() == label_counts(rows, on_test).tolist()
    assert not all(map(np.array_equal, partition.train, partition.test))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    clients=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_rounded_shares_are_whole_and_near(sizes: list[int], clients: int, seed: int) -> None:
    share = np.random.default_rng(seed).dirichlet([0.3] * clients, size=len(sizes))
    whole = counts(share, np.array(sizes))
    assert whole.sum(axis=1).tolist() == sizes
    assert whole.min() >= 0
    assert np.abs(whole - share * np.array(sizes)[:, None]).max() <= 1


def textbook(
    sizes: NDArray[np.int64], clients: int, alpha: float, least: int
) -> NDArray[np.float64]:
    """Draw whole matrices of shares and keep those that give every client enough, (kept, labels, clients)."""
    share = np.random.default_rng(0).dirichlet([alpha] * clients, size=(20_000, len(sizes)))
    whole = np.diff(np.rint(share.cumsum(axis=2) * sizes[:, None]), axis=2, prepend=0)
    enough = (
        np.minimum((share * sizes[:, None]).sum(axis=1), whole.sum(axis=1)).min(axis=1) >= least
    )
    kept: NDArray[np.float64] = share[enough]
    return kept


def features(share: NDArray[np.float64], sizes: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Return numbers in which two laws would differ, (draws,) each: one client, the extremes, how labels go together."""
    load = (share * sizes[:, None]).sum(axis=1)
    extremes = [load.min(axis=1), load.max(axis=1), share.max(axis=(1, 2))]
    return [
        share[:, 0, 0],
        load[:, 0],
        *extremes,
        (share[:, 0] * share[:, -1]).sum(axis=1),
        (share**2).sum(axis=(1, 2)),
    ]


@pytest.mark.parametrize(
    ("sizes", "clients", "alpha", "least"),
    [([40, 60], 4, 0.3, 8), ([30] * 5, 3, 0.1, 10), ([5, 3, 4], 4, 0.5, 1), ([200], 10, 2.0, 8)],
)
def test_shares_follow_the_law_of_redrawing(
    sizes: list[int], clients: int, alpha: float, least: int
) -> None:
    every = np.array(sizes)
    ours = np.stack([shares(every, clients, alpha, least, seed) for seed in range(1500)])
    theirs = textbook(every, clients, alpha, least)
    assert min(counts(share, every).sum(axis=0).min() for share in ours) >= least
    for one, other in zip(features(ours, every), features(theirs, every), strict=True):
        points = np.concatenate([one, other])
        below = [
            np.searchsorted(np.sort(sample), points, side="right") / len(sample)
            for sample in (one, other)
        ]
        # Kolmogorov-Smirnov, two samples: exceeded once in 10,000 comparisons of equal laws.
        assert np.abs(below[0] - below[1]).max() < 2.23 * np.sqrt(1 / len(one) + 1 / len(other))


@pytest.mark.parametrize(
    ("labels", "examples", "alpha", "least"),
    [
        (20, 3800, 0.1, 1),
        (20, 11_000, 0.1, 10),
        (4, 11_000, 0.1, 1),
        (2, 11_000, 0.1, 1),
        (77, 10_000, 0.1, 10),
    ],
)
def test_a_hundred_clients_all_have_enough(
    labels: int, examples: int, alpha: float, least: int
) -> None:
    data = dataset(cycle(examples, labels), cycle(500, labels))
    partition = dirichlet(data, 100, 0, alpha=alpha, min_examples=least)
    assert_dealt(partition.train, examples)
    assert_dealt(partition.test, 500)
    assert min(map(len, partition.train)) >= least


def test_shards_give_a_client_few_labels() -> None:
    data = dataset(
        cycle(400, 10), Rows.of_texts((), ())
    )  # 40 rows a label, 40 shards of 10: every shard has one label
    table = label_counts(data.train, shards(data, 20, 0, shards_per_client=2))
    assert (table.sum(axis=1) == 20).all()
    assert (table % 10 == 0).all()
    assert (table > 0).sum(axis=1).max() == 2


@settings(max_examples=25, deadline=None)
@given(data=datasets)
def test_by_key_gives_a_key_its_rows(data: Dataset) -> None:
    partition = by_key(data)
    assert_dealt(partition.train, len(data.train))
    assert partition.names == tuple(sorted(set(data.train.keys)))
    for name, train, test in zip(partition.names, partition.train, partition.test, strict=True):
        assert train.tolist() == [row for row, key in enumerate(data.train.keys) if key == name]
        assert test.tolist() == [row for row, key in enumerate(data.test.keys) if key == name]


def test_by_key_keeps_the_largest_keys() -> None:
    data = dataset(row_owners([0] * 9, [4, 4, 3, 3, 2, 2, 2, 1, 0]), row_owners([0, 0], [5, 3]))
    partition = by_key(data, 2)
    assert partition.names == ("key 2", "key 3")  # key 3 before key 4, which has as many rows
    assert [rows.tolist() for rows in partition.train] == [[4, 5, 6], [2, 3]]
    assert [rows.tolist() for rows in partition.test] == [[], [1]]


def test_a_file_says_who_holds_what(tmp_path: Path) -> None:
    path = tmp_path / "clients.json"
    path.write_text('{"zoe": [3, 1], "anna": [0]}')
    partition = from_file(dataset(cycle(5, 2), cycle(5, 2)), path)
    assert partition.names == ("zoe", "anna")
    assert [rows.tolist() for rows in partition.train] == [[1, 3], [0]]
    assert [rows.tolist() for rows in partition.test] == [[], []]
    with pytest.raises(BadInput, match=r"no such file; did you mean 'clients\.json'"):
        from_file(dataset(cycle(5, 2), cycle(5, 2)), tmp_path / "client.json")


def in_file(examples: int, validation: float = 0.1, test: float = 0.2) -> Dataset:
    """A data set of whose train rows some are held out; texts say where rows stood in the file."""
    rows = replace(cycle(examples, 2), numbers=tuple(range(examples)))
    rest, tested = stratified(rows, test, 0)
    train, validated = stratified(rest, validation, 1)
    return Dataset("made", train, validated, tested)


@settings(max_examples=50, deadline=None)
@given(examples=st.integers(12, 60), clients=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_file_counts_the_rows_of_trains_file(examples: int, clients: int, seed: int) -> None:
    """Each client has what the file gives it, less what is held out, and the notes say how much."""
    data = in_file(examples)
    order = np.random.default_rng(seed).permutation(examples)[: examples - 2]
    given = {f"c{k}": rows.tolist() for k, rows in enumerate(np.array_split(order, clients))}
    with TemporaryDirectory() as folder:
        path = Path(folder, "clients.json")
        path.write_text(json.dumps(given))
        partition = from_file(data, path)
    trained = set(data.train.texts)
    expected = {}
    for name, rows in given.items():
        texts = [f"text {row}" for row in sorted(rows)]
        expected[name] = [text for text in texts if text in trained]
    held = {
        name: [data.train.texts[row] for row in rows.tolist()]
        for name, rows in zip(partition.names, partition.train, strict=True)
    }
    assert held == {name: texts for name, texts in expected.items() if texts}
    lost = examples - 2 - sum(map(len, held.values()))
    assert len(partition.notes) == (lost > 0) + (len(held) < clients)
    if lost:
        assert f": {lost} of its {examples - 2} rows are held out of train" in partition.notes[0]


def test_a_client_without_a_row_left_is_left_out(tmp_path: Path) -> None:
    data = in_file(40)
    gone = [*data.test.numbers, *data.validation.numbers]
    path = tmp_path / "clients.json"
    some = [*data.train.numbers[:3], gone[1]]
    path.write_text(json.dumps({"a": gone[:1], "b": some, "c": gone[2:]}))
    partition = from_file(data, path)
    assert partition.names == ("b",)
    assert partition.train[0].tolist() == [0, 1, 2]
    assert partition.notes[1] == f"{path}: without a row left and left out: 2 clients ('a', 'c')"
    path.write_text(json.dumps({"a": gone}))
    with pytest.raises(BadInput, match=r"all of its rows are held out of train; to keep them"):
        from_file(data, path)
    path.write_text(json.dumps({"a": [0, 40]}))
    with pytest.raises(BadInput, match=r"client 'a' holds row 40, but train has rows 0 to 39"):
        from_file(data, path)


def test_a_file_of_clients_that_cannot_be_read_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "clients.json"
    path.write_text("{}")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(BadInput, match=r"clients\.json: cannot be read: .*Permission denied"):
        from_file(in_file(12), path)


def test_labels_that_are_numbers_are_counted_in_their_order() -> None:
    data = dataset(Rows.of_texts(("", "", ""), ("10", "9", "9")), Rows.of_texts((), ()))
    assert data.labels == ("9", "10")
    assert label_counts(data.train, iid(data, 1, 0)).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": [0], "b": []}', "client 'b' must hold a list of at least one row number, not []"),
        ('{"a": 3}', "client 'a' must hold a list of at least one row number, not 3"),
        ('{"a": {"0": 1}}', "client 'a' must hold a list of at least one row number"),
        ('{"a": [0, 5]}', "client 'a' holds row 5, but train has rows 0 to 4"),
        ('{"a": [-1]}', "client 'a' holds row -1, but train has rows 0 to 4"),
        ('{"a": [true]}', "client 'a' holds row True, but train has rows 0 to 4"),
        ('{"a": ["1"]}', "client 'a' holds row '1', but train has rows 0 to 4"),
        ('{"a": [0, 1], "b": [2, 1]}', "row 1 is held by 'a' and by 'b'"),
        ('{"a": [0, 0]}', "row 0 is held by 'a' and by 'a'"),
        ('{"a": [0], "a": [1]}', "client 'a' is named twice"),
        ("{}", "must hold a JSON object"),
        ("[[0], [1]]", "must hold a JSON object"),
        ('{"a": [0]', "not JSON: "),
        ("\udcff", "not JSON: "),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "clients.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadInput) as caught:
        from_file(dataset(cycle(5, 2), cycle(5, 2)), path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)
def test_more_clients_than_examples_are_refused(deal: Deal) -> None:
    data = dataset(cycle(512, 2), cycle(5, 2))
    with pytest.raises(BadInput) as caught:
        deal(data, 900, 0)
    assert (
        str(caught.value)
        == "partition.clients = 900: train has only 512 examples; at most 512 clients"
    )
    with pytest.raises(BadInput, match=r"partition\.clients = 0: must be 1 or more"):
        deal(data, 0, 0)


@pytest.mark.parametrize(
    ("deal", "message"),
    [
        (
            lambda data: dirichlet(data, 10, 0, alpha=9e-4),
            "partition.alpha = 0.0009: must be a number from 0.001",
        ),
        (
            lambda data: dirichlet(data, 10, 0, alpha=np.inf),
            "partition.alpha = inf: must be a number from 0.001",
        ),
        (
            lambda data: dirichlet(data, 10, 0, alpha=float("nan")),
            "partition.alpha = nan: must be a number from 0.001",
        ),
        (
            lambda data: dirichlet(data, 10, 0, alpha=1, min_examples=0),
            "partition.min_examples = 0: must be 1 or more",
        ),
        (
            lambda data: dirichlet(data, 3, 0, alpha=0.01, min_examples=33),
            "partition.alpha = 0.01: 10000 draws of shares",
        ),
        (
            lambda data: dirichlet(data, 9, 0, alpha=1, min_examples=12),
            "partition.min_examples = 12: train has only 100",
        ),
        (
            lambda data: label_skew(data, 10, 0, alpha=9e-4),
            "partition.alpha = 0.0009: must be a number from 0.001",
        ),
        (
            lambda data: quantity(data, 10, 0, beta=9e-4),
            "partition.beta = 0.0009: must be a number from 0.001",
        ),
        (
            lambda data: quantity(data, 3, 0, beta=0.01, min_examples=33),
            "partition.beta = 0.01: 10000 draws of shares",
        ),
        (
            lambda data: quantity(data, 9, 0, beta=1, min_examples=12),
            "partition.min_examples = 12: train has only 100",
        ),
        (
            lambda data: clustered(data, 10, 0, alpha=np.inf),
            "partition.alpha = inf: must be a number from 0.001",
        ),
        (
            lambda data: clustered(data, 10, 0, min_examples=11),
            "partition.min_examples = 11: train has only 100",
        ),
        (
            lambda data: cluster(data, 5, 0, embed=vectors, clusters=101, alpha=1),
            "partition.clusters = 101: train has 100 examples; choose 1 to 100 clusters",
        ),
        (
            lambda data: by_key(data, 8, group=True),
            "partition.clients = 8: train has 7 keys; choose 1 to 7 clients",
        ),
        (
            lambda data: shards(data, 60, 0, shards_per_client=2),
            "partition.shards_per_client = 2: train has only 100",
        ),
        (
            lambda data: by_key(data, 8),
            "partition.clients = 8: train has 7 keys; choose 1 to 7 clients",
        ),
        (
            lambda data: by_key(dataset(data.test, data.test)),
            "partition.kind = 'by_key': the data has no keys",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(
    deal: Callable[[Dataset], Partition], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        deal(dataset(cycle(100, 2), row_owners([0, 1])))
    assert str(caught.value).startswith(message)


KINDS_BY_LABEL: dict[str, Deal] = {
    "dirichlet": lambda data, clients, seed: dirichlet(data, clients, seed, alpha=1.0),
    "label_skew": lambda data, clients, seed: label_skew(data, clients, seed, alpha=1.0),
    "shards": shards,
}


@pytest.mark.parametrize("kind", KINDS_BY_LABEL)
def test_rows_without_labels_cannot_be_divided_by_them(kind: str) -> None:
    rows = Rows({"text": tuple(map(str, range(20)))})
    with pytest.raises(BadInput) as caught:
        KINDS_BY_LABEL[kind](dataset(rows, rows), 4, 0)
    assert str(caught.value) == (
        f"partition.kind = {kind!r}: the data has no labels; name a column in data.label, "
        'or choose kind = "cluster", "by_key", "quantity" or "iid"'
    )


def test_rows_without_labels_can_be_divided_otherwise() -> None:
    keys = tuple(f"key {number % 5}" for number in range(20))
    rows = Rows({"text": tuple(map(str, range(20)))}, keys=keys)
    data = dataset(rows, rows)
    random = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    partitions = [
        iid(data, 4, 0),
        quantity(data, 4, 0, beta=1.0),
        by_key(data),
        by_key(data, 2, group=True),
        cluster(data, 4, 0, embed=lambda _: [random, random], clusters=3, alpha=5.0),
    ]
    for partition in partitions:
        assert_dealt(partition.train, 20)
        assert_dealt(partition.test, 20)
        assert [groups.what for groups in groupings(data, partition)][-1] == "key"


def total_variations(data: Dataset, partition: Partition) -> NDArray[np.float64]:
    """Return the total variation between each client's labels and those of all, (clients,)."""
    held = label_counts(data.train, partition)
    of_clients = held / held.sum(axis=1, keepdims=True)
    return np.asarray(np.abs(of_clients - held.sum(axis=0) / held.sum()).sum(axis=1) / 2)


FOUR_LABELS = dataset(cycle(8000, 4), row_owners([0, 1]))

SKEWED: dict[str, Callable[[Dataset, int, float], Partition]] = {
    "dirichlet": lambda data, seed, alpha: dirichlet(data, 40, seed, alpha=alpha),
    "label_skew": lambda data, seed, alpha: label_skew(data, 40, seed, alpha=alpha),
    "cluster": lambda data, seed, alpha: cluster(
        data, 40, seed, embed=vectors, clusters=4, alpha=alpha
    ),
}


@pytest.mark.parametrize("kind", SKEWED)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**62))
def test_a_large_alpha_is_near_iid_and_a_small_one_near_one_label(kind: str, seed: int) -> None:
    """Of 4 equal labels, a client of one label alone has a total variation of 3/4 to all."""
    near = total_variations(FOUR_LABELS, SKEWED[kind](FOUR_LABELS, seed, 1000.0))
    far = total_variations(FOUR_LABELS, SKEWED[kind](FOUR_LABELS, seed, 0.05))
    # Of an IID client of 200 rows, four shares of 1/4 differ by 0.024 on average: together 0.05.
    assert near.mean() < 0.08
    # Not quite 3/4: what runs out is made up for from other labels.
    assert far.mean() > 0.5


@settings(max_examples=25, deadline=None)
@given(
    data=datasets,
    clients=st.integers(1, 40),
    alpha=st.sampled_from([0.001, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 2**62),
)
def test_label_skew_gives_everybody_equally_many_rows(
    data: Dataset, clients: int, alpha: float, seed: int
) -> None:
    partition = label_skew(data, clients, seed, alpha=alpha)
    sizes = list(map(len, partition.train))
    assert max(sizes) - min(sizes) <= 1
    assert_dealt(partition.train, len(data.train))
    assert_dealt(partition.test, len(data.test))


def test_label_skew_draws_labels_from_the_dirichlet_law() -> None:
    """Where stock is enough, a client's share of a label has the moments of Dir(alpha p).

    That is mean p and variance p (1 - p) / (1 + alpha), and p (1 - p) / n more for n drawn rows,
    less as much of the former. Clients are many, so that little of what they wish runs out.
    """
    alpha, prior = 2.0, np.array([0.5, 0.3, 0.2])
    data = dataset(row_owners([0] * 2000 + [1] * 1200 + [2] * 800), row_owners([0]))
    drawn = []
    for seed in range(60):
        held = label_counts(data.train, label_skew(data, 100, seed, alpha=alpha))
        drawn.append(held / held.sum(axis=1, keepdims=True))
    shares_of_clients = np.concatenate(drawn)  # (clients, labels)
    rows = 40
    law = prior * (1 - prior) / (1 + alpha)
    expected = law + (prior * (1 - prior) - law) / rows
    assert np.abs(shares_of_clients.mean(axis=0) - prior).max() < 0.01
    # What runs out is made up for, which takes some of the spread.
    assert np.abs(shares_of_clients.var(axis=0) / expected - 1).max() < 0.15


@settings(max_examples=25, deadline=None)
@given(
    data=datasets,
    clients=st.integers(1, 4),
    least=st.integers(1, 4),
    beta=st.sampled_from([0.3, 1.0, 10.0]),
    seed=st.integers(0, 2**62),
)
def test_nobody_has_less_than_the_minimum(
    data: Dataset, clients: int, least: int, beta: float, seed: int
) -> None:
    by_size = quantity(data, clients, seed, beta=beta, min_examples=least)
    by_cluster = clustered(data, clients, seed, alpha=1.0, min_examples=least)
    for partition in (by_size, by_cluster):
        assert min(map(len, partition.train)) >= least
        assert_dealt(partition.train, len(data.train))
        assert_dealt(partition.test, len(data.test))


def test_quantity_looks_at_no_label() -> None:
    """Sizes differ much, and everybody's labels are about those of all."""
    data = dataset(cycle(4000, 4), cycle(400, 4))
    partition = quantity(data, 8, 0, beta=1.0, min_examples=50)
    sizes = np.array(list(map(len, partition.train)))
    assert sizes.max() > 3 * sizes.min()
    test_sizes = np.array(list(map(len, partition.test)))
    assert np.abs(test_sizes - sizes / 10).max() <= 1  # the same shares of test
    # Three standard deviations of a share of 1/4 among the fewest rows.
    assert total_variations(data, partition).max() < 3 * np.sqrt(3 / 16 / sizes.min()) * 2
    # The law of sizes: shares of Dir(beta) have the variance (K - 1) / (K^2 (K beta + 1)).
    shares_of_first = []
    for seed in range(400):
        shares_of_first.append(len(quantity(data, 8, seed, beta=5.0).train[0]) / 4000)
    assert np.var(shares_of_first) == pytest.approx(7 / 64 / 41, rel=0.25)


def test_clusters_are_those_of_the_embeddings() -> None:
    """Rows of a label lie together, so that clusters are labels under other names."""
    data = dataset(cycle(90, 3), cycle(30, 3))
    partition = clustered(data, 4, 0)
    assert partition.clusters is not None
    pairs = set(zip(data.train.labels, partition.clusters.tolist(), strict=True))
    assert len(pairs) == 3
    counted = {groups.what: groups for groups in groupings(data, partition)}
    assert sorted(counted) == ["cluster", "key", "label"]
    assert sorted(counted["cluster"].held.T.tolist()) == sorted(counted["label"].held.T.tolist())
    # And a test row goes to the cluster whose centre is nearest.
    on_test = Partition(partition.test, partition.train, partition.names)
    test_held = label_counts(data.test, on_test)
    assert np.abs(test_held - label_counts(data.train, partition) / 3).max() <= 1


def test_rows_that_say_the_same_make_fewer_clusters() -> None:
    same = np.ones((20, 4), dtype=np.float32)
    data = dataset(cycle(20, 2), cycle(20, 2))
    partition = cluster(data, 3, 0, embed=lambda _: [same, same], clusters=5, alpha=5.0)
    assert_dealt(partition.train, 20)
    assert_dealt(partition.test, 20)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    fraction=st.floats(0.05, 1.0),
    seed=st.integers(0, 999),
)
def test_grouped_keys_stay_whole_and_make_groups_of_like_size(
    sizes: list[int], fraction: float, seed: int
) -> None:
    keys = [key for key, size in enumerate(sizes) for _ in range(size)]
    order = np.random.default_rng(seed).permutation(len(keys))
    rows = row_owners([0] * len(keys), [keys[row] for row in order])
    clients = max(1, round(fraction * len(sizes)))
    partition = by_key(dataset(rows, row_owners([0] * 3, [0, 0, 99])), clients, group=True)
    assert_dealt(partition.train, len(keys))
    holders = {
        (rows.keys[row], client)
        for client, held in enumerate(partition.train)
        for row in held.tolist()
    }
    assert len(holders) == len(sizes)
    held_sizes = list(map(len, partition.train))
    assert min(held_sizes) >= 1
    assert max(held_sizes) - min(held_sizes) <= max(sizes)
    # Test rows lie where their key's train rows lie; key 99 has none.
    owner = dict(holders)["key 0"]
    assert [held.tolist() for held in partition.test] == [
        [0, 1] if client == owner else [] for client in range(clients)
    ]


def test_grouped_keys_do_not_depend_on_the_order_of_rows() -> None:
    keys = [0, 1, 1, 2, 2, 3, 3, 3]
    held = []
    for order in (keys, keys[::-1]):
        rows = row_owners([0] * 8, order)
        partition = by_key(dataset(rows, row_owners([0])), 3, group=True)
        held.append([sorted({rows.keys[row] for row in client}) for client in partition.train])
    # By size: key 3, then 1 and 2; key 0 joins the first of the smallest groups.
    assert held == [[["key 3"], ["key 0", "key 1"], ["key 2"]]] * 2
