"""Any partitioner of Flower's data sets, by the name of its class."""

import contextlib
import inspect
import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from fedpeft.data.partitions.partition import Indices, Partition, ascending, codes, follow
from fedpeft.data.paths import nearest
from fedpeft.data.rows import Dataset
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

OF_COLUMNS: Final = ("VerticalEvenPartitioner", "VerticalSizePartitioner")
"""Partitioners that deal the columns of a table instead of its rows."""
ABSTRACT: Final = "Partitioner"
"""The class that all partitioners extend."""


def flower(
    dataset: Dataset, clients: int, seed: int, *, name: str, arguments: Mapping[str, Any]
) -> Partition:
    """Divide train by a partitioner of flwr-datasets, and deal test as train lies.

    ``name``: its class, as ``PathologicalPartitioner``. ``arguments``: those of its constructor;
    ``num_partitions`` is ``clients``, and ``seed``, where it is left out, follows from ``seed``. A
    list of lists becomes an array, and the name of a function of NumPy stands for that function, as
    in ``partition_id_to_size_fn = "sqrt"``. The partitioner is given a table with the columns
    ``label`` (numbers from 0, in the order of ``Dataset.labels``) and ``key``, as far as the data
    have them; rows are shuffled, as Flower's ``FederatedDataset`` does it. Of each label, or of
    each key if it partitions by keys, a client's share of the test rows is its share of the train
    rows.

    Raises BadInput without flwr-datasets, for a class or an argument that it does not have, for an
    argument that is missing, for partitioners of columns, for what the partitioner refuses, and
    where a client has no row.
    """
    partitioner_class = _class(name)
    chosen = _arguments(partitioner_class, name, arguments, clients, seed)
    rng = np.random.default_rng(derive(seed, "flower", "rows"))
    columns = _columns(dataset, name, chosen)
    order = rng.permutation(len(dataset.train))
    train: list[Indices] = []
    for places in _divided(columns, order, partitioner_class, chosen):
        train.append(order[places])
    for client, rows in enumerate(train):
        if not len(rows):
            raise BadInput(
                f"partition.flower: {name} leaves client {client} of {len(train)} without rows; "
                "ask for fewer clients"
            )
    notes: tuple[str, ...] = ()
    if unused := len(dataset.train) - sum(map(len, train)):
        notes = (f"{name} leaves {unused} of {len(dataset.train)} train rows to nobody",)
    group, test_group = _groups(dataset, chosen.get("partition_by") == "key")
    return replace(ascending(train, follow(train, group, test_group, rng)), notes=notes)


def partitioners() -> Mapping[str, Any]:
    """Return the classes of flwr-datasets that deal rows, by name; BadInput without the package."""
    # Read once, when the package is imported: otherwise it reports its use over the network.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from flwr_datasets import partitioner  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise BadInput(
            f"partition.kind = 'flower' needs {error.name!r}; "
            "get it with: pip install 'fedpeft[flower-data]'"
        ) from error
    known: dict[str, Any] = {}
    for name in partitioner.__all__:
        if name not in (ABSTRACT, *OF_COLUMNS):
            known[name] = getattr(partitioner, name)
    return known


def _class(name: str) -> Any:
    """Return the partitioner's class; BadInput where there is none of that name."""
    known = partitioners()
    if name in OF_COLUMNS:
        raise BadInput(
            f"partition.flower.name = {name!r}: deals columns, not rows; "
            "choose another, such as 'PathologicalPartitioner'"
        )
    if name not in known:
        hint = nearest(name, known) or f"; choose from: {', '.join(known)}"
        raise BadInput(f"partition.flower.name = {name!r}: flwr-datasets has no such class{hint}")
    return known[name]


def _arguments(
    partitioner_class: Any, name: str, arguments: Mapping[str, Any], clients: int, seed: int
) -> dict[str, Any]:
    """Return what the constructor is called with, checked against its signature."""
    parameters = inspect.signature(partitioner_class).parameters
    # 1. What follows from the configuration.
    chosen: dict[str, Any] = {}
    if "num_partitions" in parameters:
        chosen["num_partitions"] = clients
    if "seed" in parameters:
        chosen["seed"] = derive(seed, "flower") % 2**32
    # 2. What the user says.
    for argument, value in arguments.items():
        if argument not in parameters:
            hint = nearest(argument, parameters) or f"; choose from: {', '.join(parameters)}"
            raise BadInput(f"unknown key 'partition.flower.{argument}' of {name}{hint}")
        if argument == "num_partitions" and value != clients:
            raise BadInput(
                f"partition.flower.num_partitions = {value!r}: "
                f"partition.clients = {clients}; leave out one"
            )
        is_function = "Callable" in str(parameters[argument].annotation)
        chosen[argument] = _function(argument, value) if is_function else _array_if_nested(value)
    # 3. What is still missing.
    for argument, parameter in parameters.items():
        if argument not in chosen and parameter.default is inspect.Parameter.empty:
            raise BadInput(f"partition.flower.{argument} is missing: {name} needs it")
    return chosen


def _function(argument: str, value: object) -> Any:
    """Return the function of NumPy that ``value`` names; BadInput where there is none."""
    function = getattr(np, str(value), None)
    if not isinstance(function, np.ufunc) or function.nin != 1:
        raise BadInput(
            f"partition.flower.{argument} = {value!r}: "
            "must name a function of NumPy of one number, such as 'sqrt' or 'log1p'"
        )
    return function


def _array_if_nested(value: object) -> object:
    """Return a list of lists as an array, since TOML has no other word for one."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return np.array(value)
    return value


def _columns(dataset: Dataset, name: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a partitioner may divide by; BadInput where its choice is none."""
    columns: dict[str, Any] = {}
    if dataset.train.labels:
        columns["label"] = codes(dataset.train.labels, dataset.labels)
    if dataset.train.keys:
        columns["key"] = np.array(dataset.train.keys)
    column = chosen.get("partition_by")
    if column is not None and column not in columns:
        there = " or ".join(map(repr, columns)) or "neither labels nor keys"
        remedy = "name one in data.label or data.key"
        raise BadInput(
            f"partition.flower.partition_by = {column!r}: {name} can divide by 'label' and 'key', "
            f"and the data have {there}; {remedy}"
        )
    return columns


def _divided(
    columns: Mapping[str, Any], order: Indices, partitioner_class: Any, chosen: Mapping[str, Any]
) -> list[Indices]:
    """Return for each client the places in ``order`` whose rows a partitioner gives it."""
    import datasets  # noqa: PLC0415

    table: dict[str, Any] = {"place": list(range(len(order)))}
    for column, values in columns.items():
        table[column] = values[order].tolist()
    places: list[Indices] = []
    # It prints bars, and warns of what the notes of the partition tell.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            partitioner = partitioner_class(**chosen)
            partitioner.dataset = datasets.Dataset.from_dict(table)
            for client in range(partitioner.num_partitions):
                held = partitioner.load_partition(client).with_format("numpy")
                places.append(np.asarray(held["place"][:], dtype=np.int64))
        # Partitioners raise what they like, a KeyError or an IndexError among others.
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            refusal = f"{partitioner_class.__name__} refuses: {why}"
            raise BadInput(f"partition.flower: {refusal}") from error
    return places


def _groups(dataset: Dataset, by_key: bool) -> tuple[Indices, Indices]:
    """Return the group of every row, of train and of test, whose shares test rows follow.

    It is the key or the label; without labels all rows are of one group.
    """
    train, test = dataset.train, dataset.test
    if by_key:
        names = sorted(set(train.keys))
        return codes(train.keys, names), codes(test.keys, names)
    if train.labels:
        return codes(train.labels, dataset.labels), codes(test.labels, dataset.labels)
    return np.zeros(len(train), dtype=np.int64), np.zeros(len(test), dtype=np.int64)
