"""JSON in three shapes: an object a line, an array of objects, an object with a list of objects."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from fedpeft.errors import BadInput

Record = Mapping[str, object]

Located = tuple[str, Record]
"""A record's place, then the record; places are ``path:line`` or ``path: record 3``, from 1 on."""

SHAPES = "read are: an object a line, an array of objects, an object with one list of objects in it"


def json_records(path: Path, lines: Iterator[str], columns: Collection[str]) -> Iterator[Located]:
    """Yield the objects of a JSON file, whichever of the three shapes it has.

    An object a line is read line by line, and blank lines are skipped; the other two shapes are
    read at once. If a file holds a single object, that is a record if it has the ``columns``.
    Raises BadInput for what is not JSON, for other shapes, and for an object with the same name
    twice.
    """
    numbered = _not_blank(lines)
    line_number, line = next(numbered, (1, ""))
    if not line:
        return
    # An array, or a value over several lines.
    if line.lstrip().startswith("[") or _breaks_off(line):
        yield from _one_value(path, line_number, line, "".join(lines), columns)
        return
    # An object a line.
    record = _object(path, line_number, line)
    if not _has_plain(record, columns):
        # It seems to be no record. If no other line follows, its rows may be in a list inside it.
        second = next(numbered, None)
        if second is None:
            yield from _single_object(path, f"{path}:{line_number}", record, columns)
            return
        numbered = chain([second], numbered)
    yield f"{path}:{line_number}", record
    for line_number, line in numbered:
        yield f"{path}:{line_number}", _object(path, line_number, line)


def _not_blank(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Yield every line that is not blank with its number, counted from 1."""
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            yield line_number, line


def _breaks_off(line: str) -> bool:
    """Return whether ``line`` begins a JSON value that goes on in the next lines."""
    text = line.strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # The parser wanted more where the line ends; elsewhere the line itself is wrong.
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False


def _one_value(
    path: Path,
    line_number: int,
    first: str,
    below: str,
    columns: Collection[str],
) -> Iterator[Located]:
    """Yield the records of a file that is one value.

    ``first``: the line where it begins, ``line_number``. ``below``: the text after that line.
    """
    try:
        value = _parsed(path, line_number, first + below)
    except BadInput:
        if first.lstrip().startswith("{") and _starts_with_object(below):
            # An object a line, the first of them cut off. The error is in that line, so name it.
            _object(path, line_number, first)
        raise
    if isinstance(value, dict):
        yield from _single_object(path, f"{path}:{line_number}", value, columns)
    elif isinstance(value, list):
        yield from _elements(path, value)


def _starts_with_object(text: str) -> bool:
    """Return whether the first line of ``text`` that is not blank is a complete JSON object."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _single_object(
    path: Path, where: str, value: Record, columns: Collection[str]
) -> Iterator[Located]:
    """Yield the records of a file that is one object: itself, or those in its list of objects."""
    # Without any list or object in it, it can only be a record, perhaps one that lacks a column.
    if _has_plain(value, columns) or _has_plain(value, value):
        yield where, value
        return
    lists: dict[str, object] = {}
    for name, content in value.items():
        if _is_list_of_objects(content):
            lists[name] = content
    if len(lists) != 1:
        listed = ", ".join(map(repr, lists)) or "none"
        raise BadInput(f"{where}: one object, and its lists of objects are: {listed}; {SHAPES}")
    yield from _elements(path, *lists.values())


def _is_list_of_objects(value: object) -> bool:
    """Return whether ``value`` is a list that is empty or begins with an object."""
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def _has_plain(record: Record, columns: Collection[str]) -> bool:
    """Return whether ``record`` has all ``columns``, and neither list nor object in them."""
    for column in columns:
        if column not in record or isinstance(record[column], list | dict):
            return False
    return True


def _elements(path: Path, array: object) -> Iterator[Located]:
    """Yield the objects of an array."""
    assert isinstance(array, list)
    for record_number, record in enumerate(array, 1):
        where = f"{path}: record {record_number}"
        if not isinstance(record, dict):
            shown = json.dumps(record)
            raise BadInput(f"{where}: must be a JSON object, not {shown:.40}; {SHAPES}")
        yield where, record


def _object(path: Path, line_number: int, line: str) -> Record:
    """Return the object that ``line`` holds."""
    record = _parsed(path, line_number, line)
    if not isinstance(record, dict):
        shown = repr(line.strip())
        raise BadInput(
            f"{path}:{line_number}: each line must hold one JSON object, not {shown:.40}"
        )
    return record


def _parsed(path: Path, line_number: int, text: str) -> object:
    """Return the JSON value ``text``, which begins at line ``line_number``."""
    text = text.strip()
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line_number + error.lineno - 1}"
        # "Extra data": a value, then another. That may be a shape which is not read.
        shapes = f"; {SHAPES}" if error.msg == "Extra data" else ""
        raise BadInput(f"{place}: not JSON: {error.msg}{shapes}") from error
    except (ValueError, RecursionError) as error:
        # These errors do not say where; it is known only for a text of one line.
        place = f"{path}" if "\n" in text else f"{path}:{line_number}"
        raise BadInput(f"{place}: not JSON: {error}") from error


def _unique(pairs: Sequence[tuple[str, object]]) -> Record:
    """Return an object as a dict; raise ValueError for a name that occurs twice.

    JSON leaves open what that means, and Python would silently keep the last value.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values of one object are called {twin!r}")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
