"""The user's own data: JSON or separated columns, plain or gzip, checked record by record."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.data.integers import integer
from fedpeft.data.json_records import Record
from fedpeft.data.paths import matching, nearest
from fedpeft.data.records import ending, records
from fedpeft.data.rows import Dataset, Rows, stratified
from fedpeft.data.separated import delimiter as delimiter_of
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

# JSON may write half of a surrogate pair as an escape; no encoding, UTF-8 included, can hold it.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class _Columns:
    """Which columns are read, role -> name, and their delimiter (None: the usual one)."""

    names: Mapping[str, str]
    delimiter: str | None


def from_files(
    *,
    train: Path,
    validation: Path | None,
    test: Path | None,
    text: str,
    label: str,
    key: str | None = None,
    delimiter: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Return a data set from one file, or one pattern of files, per split.

    ``text``, ``label``, ``key`` and ``delimiter`` as in ``read``. If the labels of train are whole
    numbers, those of the other splits are read as whole numbers, too; likewise keys.

    Where ``test`` is None, ``test_fraction`` of each label's train rows is taken for it (see
    ``stratified``). Then ``validation`` is taken likewise, from the rows that are left. A fraction
    is read only when it is needed. Rows of train's file keep their row numbers. The data set is
    named by train's folder and file.

    Raises BadInput as ``read`` does, and for a label of validation or test that train lacks, for a
    fraction not between 0 and 1, when train has only one label, and when no label has a row to
    spare.
    """
    columns = _columns(text, label, key, delimiter)
    train_file = _read(train, columns)
    # Numbered before any row is held out, since a partition file counts the rows of the file.
    rows = replace(train_file, numbers=tuple(range(len(train_file))))
    if len(set(rows.labels)) == 1:
        raise BadInput(
            f"{train}: every row has label {rows.labels[0]!r} in column {label!r}; "
            "a classifier needs two or more"
        )
    if test is None:
        rows, test_rows = _held_out(rows, "test", test_fraction, seed)
    else:
        test_rows = _read(test, columns, train_file)
    if validation is None:
        rows, validation_rows = _held_out(rows, "validation", validation_fraction, seed)
    else:
        validation_rows = _read(validation, columns, train_file)
    return Dataset("/".join(train.parts[-2:]), rows, validation_rows, test_rows)


def read(
    path: Path,
    *,
    text: str,
    label: str,
    key: str | None = None,
    delimiter: str | None = None,
) -> Rows:
    """Return the rows of a file, or of all files that a pattern such as ``data/*.jsonl`` matches.

    Two formats are read, each also with ``.gz``, in UTF-8: JSON (``.jsonl``, ``.ndjson``,
    ``.json``: an object a line, an array of objects, or an object with one list of objects), and
    columns separated by ``delimiter`` (by default a comma in ``.csv``, a tab in ``.tsv``).

    ``text``, ``label`` and ``key`` name columns; other columns are ignored. Labels and keys may be
    numbers; they become strings as JSON writes them (``1.5``, ``true``). Where all labels are whole
    numbers, each is written without a point, whether the file says ``1``, ``1.0`` or ``"1"``;
    likewise keys. Texts are taken unchanged and may be empty. Blank lines are skipped.

    Raises BadInput, with file and line, for a missing file, an unknown ending, no rows, damaged
    gzip, bytes that are not UTF-8, a broken line, a missing column, a text that is not a string,
    and a label or key that is empty or not a number (NaN).
    """
    return _read(path, _columns(text, label, key, delimiter))


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


def _columns(text: str, label: str, key: str | None, delimiter: str | None) -> _Columns:
    names = {"text": text, "label": label}
    if key is not None:
        names["key"] = key
    return _Columns(names, delimiter_of(delimiter))


def _read(pattern: Path, columns: _Columns, train: Rows | None = None) -> Rows:
    """Read the files of ``pattern``, with labels and keys written as in ``train``, if given."""
    # 1. Collect the values of every column, record by record.
    values: dict[str, list[str]] = {"text": [], "label": [], "key": []}
    # Where each label and each key occurs first, for errors that show only when all is read.
    places: dict[str, dict[str, str]] = {"label": {}, "key": {}}
    for path in _of_one_kind(pattern):
        for where, record in records(path, columns.names.values(), columns.delimiter):
            for role, column in columns.names.items():
                value = _field(record, role, column, where)
                values[role].append(value)
                if role != "text":
                    places[role].setdefault(value, where)
    if not values["text"]:
        raise BadInput(f"{pattern}: holds no rows")
    # 2. Unify how whole numbers are written. Train decides whether they are, for all splits.
    deciding = places if train is None else {"label": train.labels, "key": train.keys}
    labels = _written("label", places["label"], deciding["label"])
    keys = _written("key", places["key"], deciding["key"])
    if train is not None:
        _check_known(places["label"], labels, train.labels)
    return Rows(
        texts=tuple(values["text"]),
        labels=tuple(labels[name] for name in values["label"]),
        keys=tuple(keys[name] for name in values["key"]),
    )


def _of_one_kind(pattern: Path) -> list[Path]:
    """Return the files of ``pattern``; BadInput unless they all have the same ending."""
    files = matching(pattern)
    kinds = {ending(path) for path in files}
    if len(kinds) > 1:
        listed = ", ".join(sorted(kinds))
        raise BadInput(f"{pattern}: matches files of several kinds, {listed}; name one")
    return files


def _field(record: Record, role: str, column: str, where: str) -> str:
    """Return the value of ``record`` in ``column`` as a string, checked for its ``role``."""
    what = f"the {role} in column {column!r}"
    if column not in record:
        names = ", ".join(map(repr, record)) + nearest(column, record)
        missing = f"{where} has no column {column!r}; its columns are {names}"
        raise BadInput(f'data.{role} = "{column}": {missing}')
    value = record[column]
    # A bool is an int, so this also turns true into "true".
    if role != "text" and isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{where}: {what} is {json.dumps(value)}")
        value = json.dumps(value)
    if not isinstance(value, str):
        raise BadInput(f"{where}: {what} must be a string, not {json.dumps(value):.40}")
    if role != "text" and not value.strip():
        raise BadInput(f"{where}: {what} is empty")
    if _SURROGATE.search(value):
        raise BadInput(f"{where}: {what} holds half a surrogate pair, which no encoding can write")
    return value


def _written(role: str, places: Mapping[str, str], deciding: Collection[str]) -> dict[str, str]:
    """Return name -> how the data set writes it, for every name in ``places``.

    Where all ``deciding`` names are whole numbers, numbers are written without a point, and the
    name NaN raises BadInput. Otherwise every name stays as it is. ``places``: where each name
    occurs first.
    """
    if not _are_whole_numbers(deciding):
        return {name: name for name in places}
    written: dict[str, str] = {}
    for name, where in places.items():
        if _says_nan(name):
            raise BadInput(f"{where}: the {role} is {name!r}, and all others are whole numbers")
        # A name that train does not decide on may be no number: it stays, and may be refused.
        written[name] = integer(name) or name
    return written


def _are_whole_numbers(names: Collection[str]) -> bool:
    """Return whether all ``names``, NaN apart, are whole numbers, and there are any."""
    any_number = False
    for name in set(names):
        if _says_nan(name):
            continue  # it marks a gap in a column of numbers, and is refused later
        if integer(name) is None:
            return False
        any_number = True
    return any_number


def _says_nan(name: str) -> bool:
    """Return whether ``name`` is what programs write where a number is missing."""
    return name.strip().lower() == "nan"


def _check_known(
    places: Mapping[str, str],
    written: Mapping[str, str],
    known: Collection[str],
) -> None:
    """Raise BadInput for the first label that is not among those ``known`` from train."""
    train_labels = set(known)
    for name, where in places.items():
        label = written[name]
        if label not in train_labels:
            hint = nearest(label, train_labels)
            raise BadInput(f"{where}: train has no label {label!r}{hint}")
