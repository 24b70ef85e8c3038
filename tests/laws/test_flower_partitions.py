"""Flower's partitioners divide our rows: every class that flwr-datasets exports, with its own arguments."""

import builtins
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fedpeft.data import Dataset, Partition, Rows, flower, label_counts
from fedpeft.data.partitions.flower import ABSTRACT, OF_COLUMNS, partitioners
from fedpeft.errors import BadInput


def made(train: int = 240, test: int = 80, labels: int = 4, keys: int = 6) -> Dataset:
    rng = np.random.default_rng(0)

    def rows(size: int) -> Rows:
        drawn = [*range(labels), *rng.integers(labels, size=size - labels).tolist()]
        return Rows.of_texts(
            [f"text {row}" for row in range(size)],
            [f"label {label}" for label in drawn],
            [f"key {key}" for key in rng.integers(keys, size=size).tolist()],
        )

    return Dataset("made", rows(train), Rows.of_texts((), ()), rows(test))


@dataclass(frozen=True)
class Row:
    """A partitioner's arguments, how many clients it makes, and whether all rows are dealt."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    clients: int = 4
    complete: bool = True


BY_LABEL = {"partition_by": "label"}
PARTITIONERS: dict[str, Row] = {
    "IidPartitioner": Row(),
    "LinearPartitioner": Row(),
    "SquarePartitioner": Row(),
    "ExponentialPartitioner": Row(),
    "IdToSizeFncPartitioner": Row({"partition_id_to_size_fn": "sqrt"}),
    "SizePartitioner": Row({"partition_sizes": [100, 80, 60]}, clients=3),
    "NaturalIdPartitioner": Row({"partition_by": "key"}, clients=6),
    "GroupedNaturalIdPartitioner": Row({"partition_by": "key", "group_size": 3}, clients=2),
    "DirichletPartitioner": Row({**BY_LABEL, "alpha": 0.5, "min_partition_size": 5}),
    "InnerDirichletPartitioner": Row(
        {**BY_LABEL, "alpha": 0.5, "partition_sizes": [60] * 4}, clients=4
    ),
    "PathologicalPartitioner": Row(
        {**BY_LABEL, "num_classes_per_partition": 2, "class_assignment_mode": "deterministic"}
    ),
    "ShardPartitioner": Row({**BY_LABEL, "num_shards_per_partition": 2}, complete=False),
    "DistributionPartitioner": Row(
        {
            **BY_LABEL,
            "distribution_array": [[1.0, 3.0]] * 4,
            "num_unique_labels_per_partition": 2,
            "preassigned_num_samples_per_label": 2,
        }
    ),
    "ContinuousPartitioner": Row({**BY_LABEL, "strictness": 0.8}),
}


def divided(name: str, seed: int = 0) -> Partition:
    return flower(made(), 4, seed, name=name, arguments=PARTITIONERS[name].arguments)


def test_every_class_that_flower_exports_is_here() -> None:
    from flwr_datasets import partitioner

    assert {*PARTITIONERS, *OF_COLUMNS, ABSTRACT} == set(partitioner.__all__)
    assert partitioners().keys() == PARTITIONERS.keys()


@pytest.mark.parametrize("name", PARTITIONERS)
def test_a_partitioner_deals_our_rows(name: str) -> None:
    data, row = made(), PARTITIONERS[name]
    partition = divided(name)
    assert len(partition.train) == row.clients
    for held, size in ((partition.train, 240), (partition.test, 80)):
        rows = np.concatenate(held).tolist()
        assert len(set(rows)) == len(rows)
        assert all((np.diff(client_rows) > 0).all() for client_rows in held)
        if row.complete:
            assert len(rows) == size
    unused = 240 - sum(map(len, partition.train))
    notes = [f"{name} leaves {unused} of 240 train rows to nobody"] if unused else []
    assert list(partition.notes) == notes
    # Test rows follow the shares of train: by key, or by label.
    if row.arguments.get("partition_by") == "key":
        for train_rows, test_rows in zip(partition.train, partition.test, strict=True):
            keys = {data.train.keys[index] for index in train_rows.tolist()}
            assert {data.test.keys[index] for index in test_rows.tolist()} <= keys
    else:
        on_test = Partition(partition.test, partition.train, partition.names)
        trained_on = label_counts(data.train, partition)
        expected = (
            trained_on / trained_on.sum(axis=0) * label_counts(data.test, on_test).sum(axis=0)
        )
        assert np.abs(label_counts(data.test, on_test) - expected).max() <= 1


@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_seed_decides(name: str) -> None:
    assert divided(name).digest() == divided(name).digest()
    if "NaturalId" not in name:  # keys lie where they lie
        assert divided(name).digest() != divided(name, seed=1).digest()


def test_arguments_reach_the_partitioner() -> None:
    held = label_counts(made().train, divided("PathologicalPartitioner"))
    assert (held > 0).sum(axis=1).tolist() == [2, 2, 2, 2]
    sizes = list(map(len, divided("LinearPartitioner").train))
    assert sizes == [24, 48, 72, 96]
    assert list(map(len, divided("SizePartitioner").train)) == [100, 80, 60]
    # A seed of the user's own goes before the one that follows from the run's.
    row = PARTITIONERS["DirichletPartitioner"]
    arguments = {**row.arguments, "seed": 7}
    own = flower(made(), 4, 0, name="DirichletPartitioner", arguments=arguments)
    assert own.digest() != divided("DirichletPartitioner").digest()


def test_what_numbers_of_labels_a_partitioner_sees() -> None:
    """InnerDirichlet wants labels from 0 without gaps, whatever their names are."""
    rows = Rows.of_texts(
        [str(row) for row in range(40)], [["-1", "10", "9"][row % 3] for row in range(40)]
    )
    data = Dataset("made", rows, rows.take([]), rows)
    arguments = {"partition_by": "label", "alpha": 1.0, "partition_sizes": [20, 20]}
    partition = flower(data, 2, 0, name="InnerDirichletPartitioner", arguments=arguments)
    assert sorted(np.concatenate(partition.train).tolist()) == list(range(40))


REFUSALS: dict[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "a class mistyped": (
        "PatologicalPartitioner",
        {},
        ("partition.flower.name = 'PatologicalPartitioner'", "mean 'PathologicalPartitioner'?"),
    ),
    "no class at all": ("xyzzy", {}, ("partition.flower.name = 'xyzzy'", "IidPartitioner")),
    "a class of columns": ("VerticalEvenPartitioner", {}, ("deals columns, not rows",)),
    "an argument mistyped": (
        "PathologicalPartitioner",
        {"num_classes_per_partion": 2},
        ("'partition.flower.num_classes_per_partion'", "mean 'num_classes_per_partition'?"),
    ),
    "an argument of none": (
        "IidPartitioner",
        {"xyzzy": 2},
        ("'partition.flower.xyzzy' of IidPartitioner", "num_partitions"),
    ),
    "an argument that is missing": (
        "DirichletPartitioner",
        {"partition_by": "label"},
        ("partition.flower.alpha is missing: DirichletPartitioner needs it",),
    ),
    "a column that is not there": (
        "DirichletPartitioner",
        {"partition_by": "labels", "alpha": 1.0},
        ("partition.flower.partition_by = 'labels'", "'label' and 'key'"),
    ),
    "two numbers of clients": (
        "IidPartitioner",
        {"num_partitions": 5},
        ("partition.flower.num_partitions = 5", "partition.clients = 4", "leave out one"),
    ),
    "no function of NumPy": (
        "IdToSizeFncPartitioner",
        {"partition_id_to_size_fn": "sqroot"},
        ("partition.flower.partition_id_to_size_fn = 'sqroot'", "'sqrt'"),
    ),
    "a number that the partitioner refuses": (
        "ContinuousPartitioner",
        {"partition_by": "label", "strictness": 2.0},
        ("ContinuousPartitioner refuses: ", "between 0 and 1"),
    ),
    "a value of another type": (
        "DirichletPartitioner",
        {"partition_by": "label", "alpha": "much"},
        ("DirichletPartitioner refuses: ",),
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_nonsense_is_refused_in_one_line(why: str) -> None:
    name, arguments, says = REFUSALS[why]
    with pytest.raises(BadInput) as caught:
        flower(made(), 4, 0, name=name, arguments=arguments)
    assert "\n" not in str(caught.value)
    for needle in says:
        assert needle in str(caught.value)


def test_without_labels_a_partitioner_by_label_is_refused() -> None:
    rows = Rows({"text": tuple(map(str, range(20)))})
    data = Dataset("made", rows, rows.take([]), rows)
    with pytest.raises(BadInput, match="neither labels nor keys"):
        flower(data, 2, 0, name="ShardPartitioner", arguments={"partition_by": "label"})
    partition = flower(data, 2, 0, name="IidPartitioner", arguments={})
    assert list(map(len, partition.train)) == list(map(len, partition.test)) == [10, 10]


def test_a_client_without_rows_is_refused() -> None:
    arguments = {"partition_by": "label", "alpha": 1.0, "partition_sizes": [240, 0]}
    with pytest.raises(BadInput, match="leaves client 1 of 2 without rows"):
        flower(made(), 2, 0, name="InnerDirichletPartitioner", arguments=arguments)


def test_without_the_package_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flwr_datasets", raising=False)
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("flwr_datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        BadInput, match=r"needs 'flwr_datasets'.*pip install 'fedpeft\[flower-data\]'"
    ):
        flower(made(), 2, 0, name="IidPartitioner", arguments={})
