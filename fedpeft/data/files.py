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

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class _Columns:
    """Which columns are read, role -> name, and what separates them where it is not the usual."""

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

    ``text``, ``label``, ``key`` and ``delimiter`` as in ``read``. Labels are whole numbers in every
    split where they are in train; likewise keys.

    Where ``test`` is None, that fraction of each label's train rows is taken for it (see
    ``stratified``); then likewise ``validation``, from what is left. A fraction is read only when
    it is needed. Rows of train's file know their numbers. The name is train's folder and file.

    Raises BadInput as ``read`` does, and for a label of validation or test that train lacks, for a
    fraction not between 0 and 1, when train has one label only, and when no label has a row to
    spare.
    """
    columns = _columns(text, label, key, delimiter)
    whole = _read(train, columns)
    rows = replace(whole, numbers=tuple(range(len(whole))))
    if len(set(rows.labels)) == 1:
        raise BadInput(
            f"{train}: every row has label {rows.labels[0]!r} in column {label!r}; a classifier needs two or more"
        )
    if test is None:
        rows, test_rows = _held_out(rows, "test", test_fraction, seed)
    else:
        test_rows = _read(test, columns, whole)
    if validation is None:
        rows, validation_rows = _held_out(rows, "validation", validation_fraction, seed)
    else:
        validation_rows = _read(validation, columns, whole)
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

    Read are JSON (``.jsonl``, ``.ndjson``, ``.json``: an object a line, an array of objects, or an
    object with one list of objects) and columns separated by ``delimiter`` (``.csv``, usually by a
    comma, ``.tsv`` by a tab), each also with ``.gz``; UTF-8.

    ``text``, ``label`` and ``key`` name columns; others are ignored. Labels and keys may be numbers
    and become strings as JSON writes them (``1.5``, ``true``). Where all labels are whole numbers,
    each is written without a point, whether the file says ``1``, ``1.0`` or ``"1"``; likewise keys.
    Texts are taken as they are and may be empty; blank lines are passed over.

    Raises BadInput, with file and line, for a missing file, an unknown ending, no rows, damaged
    gzip, bytes that are not UTF-8, a broken line, a missing column, a text that is not a string,
    and a label or key that is empty or not a number (NaN).
    """
    return _read(path, _columns(text, label, key, delimiter))


def _held_out(rows: Rows, split: str, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return (kept, taken for ``split``)."""
    if not 0 < fraction < 1:
        raise BadInput(f"data.{split}_fraction = {fraction}: must lie between 0 and 1, as 0.1 does")
    kept, taken = stratified(rows, fraction, derive(seed, split))
    if not taken:
        raise BadInput(
            f"data.{split}: every label has a single row in train, none to spare; name a file for {split}"
        )
    return kept, taken


def _columns(text: str, label: str, key: str | None, delimiter: str | None) -> _Columns:
    names = {"text": text, "label": label}
    if key is not None:
        names["key"] = key
    return _Columns(names, delimiter_of(delimiter))


def _read(pattern: Path, columns: _Columns, train: Rows | None = None) -> Rows:
    """Read the files of ``pattern``; with ``train`` given, labels and keys are written as there."""
    found: dict[str, list[str]] = {"text": [], "label": [], "key": []}
    # Where each label and each key stands first, for errors that only the whole file shows.
    places: dict[str, dict[str, str]] = {"label": {}, "key": {}}
    for path in _of_one_kind(pattern):
        for where, record in records(path, columns.names.values(), columns.delimiter):
            for role, column in columns.names.items():
                value = _field(record, role, column, where)
                found[role].append(value)
                if role != "text":
                    places[role].setdefault(value, where)
    if not found["text"]:
        raise BadInput(f"{pattern}: holds no rows")
    deciding = places if train is None else {"label": train.labels, "key": train.keys}
    labels = _written("label", places["label"], deciding["label"])
    keys = _written("key", places["key"], deciding["key"])
    if train is not None:
        _check_known(places["label"], labels, train.labels)
    return Rows(
        tuple(found["text"]),
        tuple(labels[name] for name in found["label"]),
        tuple(keys[name] for name in found["key"]),
    )


def _of_one_kind(pattern: Path) -> list[Path]:
    """Return the files of ``pattern``; BadInput unless their endings say the same format."""
    files = matching(pattern)
    kinds = sorted({ending(path) for path in files})
    if len(kinds) > 1:
        raise BadInput(f"{pattern}: matches files of several kinds, {', '.join(kinds)}; name one")
    return files


def _field(record: Record, role: str, column: str, where: str) -> str:
    """Return what ``record`` holds in ``column`` as the string that ``role`` needs."""
    what = f"the {role} in column {column!r}"
    if column not in record:
        names = ", ".join(map(repr, record)) + nearest(column, record)
        missing = f"{where} has no column {column!r}; its columns are {names}"
        raise BadInput(f'data.{role} = "{column}": {missing}')
    value = record[column]
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
    """Return name -> how the data set writes it, for names that first stand at ``places``.

    Where all ``deciding`` names are whole numbers, numbers are written as such, and a name that
    says NaN raises BadInput. Otherwise every name stays as it is.
    """
    numbers = [integer(name) for name in set(deciding) if not _says_nan(name)]
    if None in numbers or not numbers:
        return {name: name for name in places}
    written: dict[str, str] = {}
    for name, where in places.items():
        if _says_nan(name):
            raise BadInput(f"{where}: the {role} is {name!r}, and all others are whole numbers")
        written[name] = integer(name) or name
    return written


def _says_nan(name: str) -> bool:
    """Return whether ``name`` is what programs write where a number is missing."""
    return name.strip().lower() == "nan"


def _check_known(
    places: Mapping[str, str],
    written: Mapping[str, str],
    known: Collection[str],
) -> None:
    """Raise BadInput for the first label that is not among those ``known`` from train."""
    different = set(known)
    for name, where in places.items():
        label = written[name]
        if label not in different:
            hint = nearest(label, different)
            raise BadInput(f"{where}: train has no label {label!r}{hint}")
