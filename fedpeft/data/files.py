"""The user's own data: JSON Lines or CSV, plain or gzip, checked line by line while it is read."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from fedpeft.data.rows import Dataset, Rows, stratified
from fedpeft.seeds import derive
from fedpeft.types import BadInput

Located = tuple[str, Mapping[str, object]]
"""A record and where it stands, as ``path:line``."""

Parser = Callable[[Path, Iterator[str]], Iterator[Located]]

_SURROGATE = re.compile("[\ud800-\udfff]")


def from_files(
    *,
    train: Path,
    validation: Path | None,
    test: Path | None,
    text: str,
    label: str,
    key: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Return a data set from one file per split; ``text``, ``label`` and ``key`` name columns.

    Where ``test`` is None, that fraction of each label's train rows is taken for it (see ``stratified``); then likewise
    ``validation``, from what is left. A fraction is read only when it is needed. The name is train's folder and file.

    Raises BadInput as ``read`` does, and for a label of validation or test that train lacks, for a fraction not between
    0 and 1, when train has one label only, and when no label has a row to spare.
    """
    columns = _columns(text, label, key)
    rows = _read(train, columns)
    known = set(rows.labels)
    if len(known) == 1:
        raise BadInput(f"{train}: every row has label {rows.labels[0]!r} in column {label!r}; a classifier needs two or more")
    if test is None:
        rows, test_rows = _held_out(rows, "test", test_fraction, seed)
    else:
        test_rows = _read(test, columns, known)
    if validation is None:
        rows, validation_rows = _held_out(rows, "validation", validation_fraction, seed)
    else:
        validation_rows = _read(validation, columns, known)
    return Dataset("/".join(train.parts[-2:]), rows, validation_rows, test_rows)


def read(path: Path, *, text: str, label: str, key: str | None = None) -> Rows:
    """Return the rows of a ``.jsonl``, ``.json`` (an object a line) or ``.csv`` file, each also with ``.gz``; UTF-8.

    ``text``, ``label`` and ``key`` name columns; others are ignored. Labels and keys may be numbers and become strings
    as JSON writes them (``1``, ``true``). Texts are taken as they are and may be empty; blank lines are passed over.

    Raises BadInput, with file and line, for a missing file, an unknown ending, no rows, damaged gzip, bytes that are
    not UTF-8, a broken line, a missing column, a text that is not a string, and an empty label or key.
    """
    return _read(path, _columns(text, label, key))


def existing(path: Path) -> Path:
    """Return ``path`` if it is a file; otherwise raise BadInput, naming the nearest file in its folder."""
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, not a file")
    raise BadInput(f"{path}: no such file{_nearest(path.name, [near.name for near in path.parent.iterdir()])}")


def _held_out(rows: Rows, split: str, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return (kept, taken for ``split``)."""
    if not 0 < fraction < 1:
        raise BadInput(f"data.{split}_fraction = {fraction}: must lie between 0 and 1, as 0.1 does")
    kept, taken = stratified(rows, fraction, derive(seed, split))
    if not taken:
        raise BadInput(f"data.{split}: every label has a single row in train, none to spare; name a file for {split}")
    return kept, taken


def _columns(text: str, label: str, key: str | None) -> dict[str, str]:
    """Return role -> column."""
    return {"text": text, "label": label} | ({"key": key} if key is not None else {})


def _read(path: Path, columns: Mapping[str, str], known: Collection[str] | None = None) -> Rows:
    """Read ``path``; every label must be among ``known``, if given."""
    found: dict[str, list[str]] = {"text": [], "label": [], "key": []}
    parse = _parser(existing(path))
    with _opened(path) as stream:
        for where, record in parse(path, _lines(path, stream)):
            for role, column in columns.items():
                found[role].append(_field(record, role, column, where))
            label = found["label"][-1]
            if known is not None and label not in known:
                raise BadInput(f"{where}: train has no label {label!r}{_nearest(label, known)}")
    if not found["text"]:
        raise BadInput(f"{path}: holds no rows")
    return Rows(tuple(found["text"]), tuple(found["label"]), tuple(found["key"]))


def _field(record: Mapping[str, object], role: str, column: str, where: str) -> str:
    """Return what ``record`` holds in ``column`` as the string that ``role`` needs."""
    if column not in record:
        names = ", ".join(map(repr, record))
        hint = _nearest(column, record)
        raise BadInput(f'data.{role} = "{column}": {where} has no column {column!r}; its columns are {names}{hint}')
    value = record[column]
    if role != "text" and isinstance(value, int | float):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise BadInput(f"{where}: the {role} in column {column!r} must be a string, not {json.dumps(value):.40}")
    if role != "text" and not value.strip():
        raise BadInput(f"{where}: the {role} in column {column!r} is empty")
    if _SURROGATE.search(value):
        raise BadInput(f"{where}: the {role} in column {column!r} holds half a surrogate pair, which no encoding can write")
    return value


def _nearest(name: str, choices: Collection[str]) -> str:
    """Return the end of an error message that offers the choice most like ``name``, if one is like it."""
    close = get_close_matches(name, sorted(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parser(path: Path) -> Parser:
    """Return how to parse ``path``, as its ending says."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending not in _PARSERS:
        raise BadInput(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(_PARSERS)}, each also with .gz")
    return _PARSERS[ending]


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[Located]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{number}: not JSON: {str(error).partition(':')[0]}") from error
        if not isinstance(record, dict):
            raise BadInput(f"{path}:{number}: each line must hold one JSON object, not {line.strip()!r:.40}")
        yield f"{path}:{number}", record


def _comma_separated(path: Path, lines: Iterator[str]) -> Iterator[Located]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise BadInput(f"{path}:1: two columns have the same name among {', '.join(map(repr, header))}")
        for fields in filter(None, reader):
            where = f"{path}:{reader.line_num}"
            if len(fields) != len(header):
                raise BadInput(f"{where}: {len(fields)} fields where the header names {len(header)}")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not CSV: {error}") from error


_PARSERS: Mapping[str, Parser] = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _comma_separated}


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    """Open ``path``, unpacked."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error


def _lines(path: Path, stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the decoded lines with their ends; a byte order mark is dropped."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start} of the line") from error
