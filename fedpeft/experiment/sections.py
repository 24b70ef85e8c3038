"""What a user can choose besides method, model, training and machine: the sections of a configuration, field by field."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from fedpeft.mounting import Targets


@dataclass(frozen=True)
class TaskSection:
    """What is learnt: ``kind`` is ``classification``, one label a text."""

    kind: Literal["classification"] = "classification"


@dataclass(frozen=True)
class DataSection:
    """Which texts. ``source`` is ``pydocs`` or ``files``; with files, ``train`` (and ``validation``, ``test``) are paths.

    Files are ``.jsonl``, ``.ndjson``, ``.json`` (also an array), ``.csv`` or ``.tsv``, each also
    ``.gz``; a pattern such as ``data/*.jsonl`` names several. Relative paths start at the folder of
    the configuration file, ``~`` is the user's home.

    ``text``, ``label``, ``key``: column names; ``key`` names natural clients. ``delimiter``: what
    separates the columns of ``.csv`` and ``.tsv``, one character or ``tab``; by default a comma and
    a tab. Splits without a file are held out of train by ``validation_fraction`` and
    ``test_fraction``.
    """

    source: Literal["pydocs", "files"] = "pydocs"
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    text: str = "text"
    label: str = "label"
    key: str | None = None
    delimiter: str | None = None
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.2


CLIENTS = 20
"""How many clients there are where nothing says otherwise."""


@dataclass(frozen=True)
class PartitionSection:
    """Who holds what: ``kind`` with its own numbers.

    ``iid``; ``dirichlet`` of ``alpha`` per class, redrawn until every client has ``min_examples``; ``shards`` sorted by
    label, ``shards_per_client`` each; ``by_key``, the data's natural clients; ``file``, a JSON
    object of client -> rows of train's file as it stands, counted from 0.
    ``clients``: 20 where it is not given; of natural clients the largest so many, and otherwise all.
    """

    kind: Literal["iid", "dirichlet", "shards", "by_key", "file"] = "dirichlet"
    clients: Annotated[int, Ge(1)] | None = None
    alpha: Annotated[float, Gt(0)] = 0.1
    min_examples: Annotated[int, Ge(1)] = 8
    shards_per_client: Annotated[int, Ge(1)] = 2
    file: Path | None = None


@dataclass(frozen=True)
class FederationSection:
    """``rounds``, ``clients_per_round``, and ``min_replies``: with fewer usable ones a round changes nothing."""

    rounds: Annotated[int, Ge(1)] = 20
    clients_per_round: Annotated[int, Ge(1)] = 4
    min_replies: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True)
class EvaluationSection:
    """When and on what: ``every`` so many rounds and after the last, on ``limit`` texts of ``split`` (None: all).

    ``per_client`` also scores every client on its own part of the test set.
    """

    every: Annotated[int, Ge(1)] = 5
    limit: Annotated[int, Ge(1)] | None = None
    split: Literal["validation", "test"] = "test"
    per_client: bool = False


@dataclass(frozen=True)
class EngineSection:
    """How bytes travel: ``local`` in this process, or ``flower`` in Flower's simulation.

    ``stack``: how many clients train side by side in this process where method and model can; ``auto`` finds out once,
    by trying. With dropout in the base it is 1, as every client has a random stream of its own. Equality to the bit holds
    between runs with the same cohort.
    """

    kind: Literal["local", "flower"] = "local"
    stack: Annotated[int, Ge(1)] | Literal["auto"] = "auto"


Reference = Literal["centralised", "local-only"]
"""A yardstick: all data in one place, or no exchange at all."""


@dataclass(frozen=True)
class CompareSection:
    """What ``fedpeft compare`` runs.

    ``methods``, ``seeds``. ``recipe``: ``equal`` gives every method that has them the same ``targets`` and starting
    ``rank``; ``paper`` leaves each its own defaults. ``references``: ``centralised`` and ``local-only`` rows, playing
    ``reference_method``. ``settings``: overrides by method, such as ``[compare.settings.lora] training.lr = 3e-3``.
    """

    methods: tuple[str, ...] = ("full", "bitfit", "lora", "ffa_lora", "federa", "slora", "fedara")
    seeds: tuple[Annotated[int, Ge(0), Le(2**62)], ...] = (0,)
    recipe: Literal["equal", "paper"] = "equal"
    targets: Targets = "query|value"
    rank: Annotated[int, Ge(1)] = 8
    references: tuple[Reference, ...] = ()
    reference_method: str = "lora"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
