"""Data sets of the Hugging Face hub, or of a folder, by the package ``datasets``."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from fedpeft.data.class_names import with_names
from fedpeft.data.files import Columns, Source, from_sources
from fedpeft.data.json_records import Located
from fedpeft.data.parquet import BATCH, rows_of
from fedpeft.data.paths import nearest
from fedpeft.data.rows import Dataset
from fedpeft.errors import BadInput

SAVED = ("dataset_dict.json", "state.json")
"""Files of which one lies in a folder that ``save_to_disk`` of ``datasets`` wrote."""

REMEDY = (
    "without a network, give a folder in data.name that holds the set's files, or name these in "
    "data.train with data.source = 'files'"
)


@final
@dataclass(frozen=True)
class HubChoice:
    """A set of the hub, its configuration, and the names of its splits."""

    name: str
    config: str | None
    train: str
    validation: str | None
    test: str | None


def from_hub(
    choice: HubChoice,
    *,
    columns: Columns,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Return a set of the hub; what holds of files holds here, too (see ``from_files``).

    Numbers of classes become their names, also in lists. ``choice.name`` may also be a folder: one
    that ``save_to_disk`` wrote, or any that ``load_dataset`` reads, such as one of Parquet files.

    Raises BadInput without ``datasets``, for a set that cannot be loaded, and for a split that it
    lacks.
    """
    splits = _load(choice)

    def source(split: str | None, field: str) -> Source | None:
        return None if split is None else _source(choice, splits, split, field, columns)

    train = source(choice.train, "train")
    assert train is not None
    return from_sources(
        "/".join(Path(choice.name).parts[-2:]),
        train=train,
        validation=source(choice.validation, "validation"),
        test=source(choice.test, "test"),
        columns=columns,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )


def _load(choice: HubChoice) -> Mapping[str, Any]:
    """Return all splits of a set by their names."""
    try:
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(
            "data.source = 'hub' needs datasets; get it with: pip install 'fedpeft[data]'"
        ) from error
    folder = Path(choice.name)
    try:
        if any((folder / name).is_file() for name in SAVED):
            loaded = datasets.load_from_disk(choice.name)
        else:
            loaded = datasets.load_dataset(choice.name, choice.config)
    # OSError: not found, or no network; ValueError: no such configuration, or none chosen.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        config = "" if choice.config is None else f", data.config = {choice.config!r}"
        raise BadInput(
            f"data.name = {choice.name!r}{config}: cannot be loaded: {_line(error)}; {REMEDY}"
        ) from error
    if isinstance(loaded, Mapping):
        return loaded
    return {str(loaded.split or "train"): loaded}  # ``save_to_disk`` of a split alone


def _source(
    choice: HubChoice, splits: Mapping[str, Any], split: str, field: str, columns: Columns
) -> Source:
    """Return the rows of a split; BadInput where the set has none of that name."""
    if split not in splits:
        there = ", ".join(map(repr, splits))
        raise BadInput(
            f"data.{field}_split = {split!r}: {choice.name} has {there}{nearest(split, splits)}"
        )
    what = f"{choice.name}, {split}"
    return Source(what, partial(_records, what, splits[split], columns.names.values()))


def _records(what: str, split: Any, columns: Collection[str]) -> Iterator[Located]:
    """Yield the rows of a split, read by batches from the files in which ``datasets`` keeps it.

    Only ``columns`` are read, where all are there.
    """
    features = split.features.to_dict()
    if set(columns) <= set(features):
        split = split.select_columns(list(dict.fromkeys(columns)))
    # As Arrow's tables, not Python's objects: pictures in other columns need not be opened.
    tables = split.with_format("arrow").iter(batch_size=BATCH)
    yield from with_names(rows_of(what, tables), features)


def _line(error: Exception) -> str:
    """Return an error's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return f"{text:.300}".rstrip(".")
