"""The user's own data in any format, checked record by record."""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

from fedpeft.data.integers import integer
from fedpeft.data.json_records import Located, Record
from fedpeft.data.paths import matching, nearest
from fedpeft.data.records import ending, records
from fedpeft.data.rows import Dataset, Rows, stratified
from fedpeft.data.schema import Schema, text
from fedpeft.data.separated import delimiter as delimiter_of
from fedpeft.data.whole_numbers import are_whole_numbers, unified
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

LABEL: Final = "label"
KEY: Final = "key"
"""Roles of columns beside those of a schema."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read, and as what.

    ``names``: role -> name in the file, for every column of ``schema`` that is read, and also for
    ``label`` and ``key`` where a column holds these. ``delimiter``: what separates the columns of a
    file of that kind; None for a comma in ``.csv`` and a tab in ``.tsv``. ``labels``: all that may
    occur, in the order of the model's outputs, or what the schema has in their place (see
    ``Schema.answers``); empty where train decides.
    """

    schema: Schema
    names: Mapping[str, str]
    delimiter: str | None = None
    labels: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Source:
    """Where the rows of a split come from: ``what`` names it in errors."""

    what: str
    records: Callable[[], Iterator[Located]]


def from_files(
    *,
    train: Path,
    validation: Path | None,
    test: Path | None,
    columns: Columns,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Return a data set from one file, or one pattern of files, per split.

    If the labels of train are whole numbers, those of the other splits are read as whole numbers,
    too; likewise keys.

    Where ``test`` is None, ``test_fraction`` of each label's train rows is taken for it (see
    ``stratified``). Then ``validation`` is taken likewise, from the rows that are left. A fraction
    is read only when it is needed. Rows of train's file keep their row numbers. The data set is
    named by train's folder and file.

    Raises BadInput as ``read`` does, and for a label of validation or test that train lacks, for a
    fraction not between 0 and 1, and when no label has a row to spare.
    """
    return from_sources(
        "/".join(train.parts[-2:]),
        train=_files(train, columns),
        validation=None if validation is None else _files(validation, columns),
        test=None if test is None else _files(test, columns),
        columns=columns,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )


def from_sources(
    name: str,
    *,
    train: Source,
    validation: Source | None,
    test: Source | None,
    columns: Columns,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> Dataset:
    """Return the data set ``name`` from a source per split; see ``from_files``."""
    columns = replace(columns, labels=_listed(columns.labels))
    train_rows = read_source(train, columns)
    # Numbered before any row is held out, since a partition file counts the rows of the file.
    rows = replace(train_rows, numbers=tuple(range(len(train_rows))))
    if test is None:
        rows, test_rows = _held_out(rows, "test", test_fraction, seed)
    else:
        test_rows = read_source(test, columns, train_rows)
    if validation is None:
        rows, validation_rows = _held_out(rows, "validation", validation_fraction, seed)
    else:
        validation_rows = read_source(validation, columns, train_rows)
    return Dataset(name, rows, validation_rows, test_rows, columns.labels)


def _listed(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the labels that the user lists as the data set writes them.

    BadInput where one stands there twice, or is empty.
    """
    whole = are_whole_numbers(labels)
    written = [(integer(label) or label) if whole else label for label in labels]
    for label in written:
        if not label.strip():
            raise BadInput(f"data.labels = {list(labels)}: holds an empty name")
        if written.count(label) > 1:
            raise BadInput(f"data.labels = {list(labels)}: names {label!r} twice")
    return tuple(written)


def _held_out(rows: Rows, split: str, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return (rows that are kept, rows taken for ``split``)."""
    if not 0 < fraction < 1:
        raise BadInput(f"data.{split}_fraction = {fraction}: must lie between 0 and 1, as 0.1 does")
    kept, taken = stratified(rows, fraction, derive(seed, split))
    if not taken:
        raise BadInput(
            f"data.{split}: every label has a single row in train, none to spare; "
            f"name a file for {split}"
        )
    return kept, taken


def read(pattern: Path, columns: Columns, train: Rows | None = None) -> Rows:
    """Return the rows of a file, a folder of texts, or all files that a pattern matches.

    Formats are told by their endings, each also with ``.gz`` or ``.zst``; texts are UTF-8. They
    are JSON (``.jsonl``, ``.ndjson``, ``.json``: an object a line, an array of objects, or one
    object with a list of objects), separated columns (``.csv``, ``.tsv``), Parquet
    (``.parquet``), and CoNLL's columns (``.conll``, ``.bio``, ``.iob``). A folder holds a folder
    of ``.txt`` files for each label. Columns without a role are ignored, and so are blank lines.

    Labels and keys may be numbers; they become strings as JSON writes them (``1.5``, ``true``).
    Where all labels are whole numbers, each is written without a point, whether the file says
    ``1``, ``1.0`` or ``"1"``; likewise keys. With ``train``, they are written as there.

    Raises BadInput, with file and line, for a missing file, an unknown ending, no rows, damaged
    packing, bytes that are not UTF-8, a broken line, a missing column, a value that the schema
    refuses, a label or key that is empty or not a number (NaN), and a label that ``train`` or the
    list of labels lacks.
    """
    return read_source(_files(pattern, columns), columns, train)


def _files(pattern: Path, columns: Columns) -> Source:
    """Return the source of a split that lies in files."""
    return Source(str(pattern), partial(_records, pattern, columns))


def _records(pattern: Path, columns: Columns) -> Iterator[Located]:
    """Yield the records of all files of ``pattern``."""
    delimiter = delimiter_of(columns.delimiter)
    for path in _of_one_kind(pattern):
        yield from records(path, columns.names.values(), delimiter, only_these=True)


def read_source(source: Source, columns: Columns, train: Rows | None = None) -> Rows:
    """Return the rows of ``source``; see ``read``."""
    schema, names = columns.schema, columns.names
    roles = [column.role for column in schema.columns if column.role in names]
    # 1. Collect the values of every column, record by record.
    values: dict[str, list[Any]] = {role: [] for role in roles}
    labels: list[str] = []
    keys: list[str] = []
    # Where each label and each key occurs first, for errors that show only when all is read.
    first_labels: dict[str, str] = {}
    first_keys: dict[str, str] = {}
    # The same of what a list of labels names, where that is not the labels themselves.
    first_answers: dict[str, str] = {}
    for where, record in source.records():
        parsed = _parsed(record, columns, where)
        for role in roles:
            values[role].append(parsed[role])
        if (label := _label(record, columns, parsed, where)) is not None:
            labels.append(label)
            first_labels.setdefault(label, where)
        if KEY in names:
            keys.append(_name(record, KEY, names[KEY], where))
            first_keys.setdefault(keys[-1], where)
        for answer in _answers(columns, parsed):
            first_answers.setdefault(answer, where)
    if not values[roles[0]]:
        raise BadInput(f"{source.what}: holds no rows")
    # 2. Unify how whole numbers are written, and refuse what the list or train does not know.
    written_answers = {answer: answer for answer in first_answers}
    _check_known(first_answers, written_answers, columns.labels, "data.labels")
    written_labels = _written_labels(first_labels, columns, train)
    written_keys = unified(KEY, first_keys, first_keys if train is None else train.keys)
    return Rows(
        columns={role: tuple(column) for role, column in values.items()},
        labels=tuple(written_labels[name] for name in labels),
        keys=tuple(written_keys[name] for name in keys),
    )


def _parsed(record: Record, columns: Columns, where: str) -> dict[str, Any]:
    """Return the values of ``record`` by role, as the schema wants them."""
    parsed: dict[str, Any] = {}
    for column in columns.schema.columns:
        if column.role not in columns.names:
            continue
        name = columns.names[column.role]
        value = _value(record, column.role, name, where)
        try:
            parsed[column.role] = column.parse(value)
        except ValueError as error:
            raise BadInput(f"{where}: the {column.role} in column {name!r} {error}") from error
    check = columns.schema.check
    if check is not None and (why := check(parsed)):
        raise BadInput(f"{where}: {why}")
    return parsed


def _label(record: Record, columns: Columns, parsed: Mapping[str, Any], where: str) -> str | None:
    """Return the label of ``record``: a column's, or what the schema makes of its values."""
    if LABEL in columns.names:
        return _name(record, LABEL, columns.names[LABEL], where)
    if columns.schema.label is not None:
        return columns.schema.label(parsed)
    return None


def _answers(columns: Columns, parsed: Mapping[str, Any]) -> Iterable[str]:
    """Return the names in a record that the list of labels has to hold, besides its label."""
    if columns.labels and columns.schema.answers is not None:
        return columns.schema.answers(parsed)
    return ()


def _written_labels(
    places: Mapping[str, str], columns: Columns, train: Rows | None
) -> dict[str, str]:
    """Return label -> how the data set writes it; BadInput for one that is not known.

    The list of labels decides whether they are whole numbers, or else train, for all splits.
    ``places``: where each label occurs first.
    """
    listed = columns.labels if columns.schema.answers is None else ()
    deciding = listed or (places if train is None else train.labels)
    written = unified(LABEL, places, deciding)
    if listed and LABEL in columns.names:
        _check_known(places, written, listed, "data.labels")
    if train is not None and LABEL in columns.names:
        _check_known(places, written, train.labels, "train")
    elif train is not None:
        written = _as_in_train(written, train.labels)
    return written


def _of_one_kind(pattern: Path) -> list[Path]:
    """Return the files of ``pattern``; BadInput unless they all have the same ending."""
    files = matching(pattern)
    if files[0].is_dir():
        return files
    kinds = {ending(path) for path in files}
    if len(kinds) > 1:
        listed = ", ".join(sorted(kinds))
        raise BadInput(f"{pattern}: matches files of several kinds, {listed}; name one")
    return files


def _value(record: Record, role: str, column: str, where: str) -> Any:
    """Return the value of ``record`` in ``column``; BadInput where there is no such column."""
    if column not in record:
        names = ", ".join(map(repr, record)) + nearest(column, record)
        missing = f"{where} has no column {column!r}; its columns are {names}"
        raise BadInput(f'data.{role} = "{column}": {missing}')
    return record[column]


def _name(record: Record, role: str, column: str, where: str) -> str:
    """Return the label or the key of ``record``, whichever ``role`` says, as a string."""
    what = f"{where}: the {role} in column {column!r}"
    value = _value(record, role, column, where)
    # A bool is an int, so this also turns true into "true".
    if isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{what} is {json.dumps(value)}")
        value = json.dumps(value)
    try:
        name = text(value)
    except ValueError as error:
        raise BadInput(f"{what} {error}") from error
    if not name.strip():
        raise BadInput(f"{what} is empty")
    return name


def _as_in_train(written: Mapping[str, str], known: Sequence[str]) -> dict[str, str]:
    """Return ``written`` with the commonest label of train for those that train lacks.

    Labels that no column holds only say how rows are dealt; no client is dealt what train lacks.
    """
    counts = Counter(known)
    commonest = max(sorted(counts), key=counts.__getitem__, default="")
    return {name: label if label in counts else commonest for name, label in written.items()}


def _check_known(
    places: Mapping[str, str],
    written: Mapping[str, str],
    known: Collection[str],
    who: str,
) -> None:
    """Raise BadInput for the first label that is not among those ``known`` to ``who``."""
    known_labels = set(known)
    for name, where in places.items():
        label = written[name]
        if label not in known_labels:
            hint = nearest(label, known_labels)
            raise BadInput(f"{where}: {who} has no label {label!r}{hint}")
