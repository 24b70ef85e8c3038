"""JSON in three shapes: an object a line, an array of objects, an object with a list of objects."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from fedpeft.data.json_array import DECODER, SHAPES, elements
from fedpeft.errors import BadInput

Record = Mapping[str, object]

Located = tuple[str, Record]
"""A record's place, then the record; places are ``path:line`` or ``path: record 3``, from 1 on."""


def json_records(path: Path, parts: Iterator[str], columns: Collection[str]) -> Iterator[Located]:
    """Yield the objects of a JSON file, whichever of the three shapes it has.

    ``parts``: its lines, of which long ones may come in pieces. An object a line is read line by
    line, and blank lines are skipped; an array is read object by object; an object with a list of
    objects is read at once. If a file holds a single object, that is a record if it has the
    ``columns``. Raises BadInput for what is not JSON, for other shapes, and for an object with the
    same name twice.
    """
    first_number, first = _first(parts)
    if not first:
        return
    parts = chain([first], parts)
    if first.lstrip().startswith("["):
        yield from _objects(elements(path, parts, first_number))
        return
    lines = _lines(parts)
    numbered = _not_blank(lines, first_number)
    line_number, line = next(numbered)
    # A value over several lines.
    if _breaks_off(line):
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


def _first(parts: Iterator[str]) -> tuple[int, str]:
    """Return the first part that is not blank and the number of its line; empty without any."""
    line_number = 1
    for part in parts:
        if part.strip():
            return line_number, part
        line_number += part.count("\n")
    return line_number, ""


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Yield whole lines."""
    line = ""
    for part in parts:
        line += part
        if line.endswith("\n"):
            yield line
            line = ""
    if line:
        yield line


def _not_blank(lines: Iterator[str], first_number: int) -> Iterator[tuple[int, str]]:
    """Yield every line that is not blank with its number, counted from ``first_number``."""
    for line_number, line in enumerate(lines, first_number):
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
    """Yield the records of a file that is one object.

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
    yield from _objects(_elements(path, *lists.values()))


def _is_list_of_objects(value: object) -> bool:
    """Return whether ``value`` is a list that is empty or begins with an object."""
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def _has_plain(record: Record, columns: Collection[str]) -> bool:
    """Return whether ``record`` has all ``columns``, and neither list nor object in them."""
    for column in columns:
        if column not in record or isinstance(record[column], list | dict):
            return False
    return True


def _elements(path: Path, array: object) -> Iterator[tuple[str, object]]:
    """Yield the elements of a list with their places."""
    assert isinstance(array, list)
    for record_number, record in enumerate(array, 1):
        yield f"{path}: record {record_number}", record


def _objects(located: Iterable[tuple[str, object]]) -> Iterator[Located]:
    """Yield elements with their places; BadInput for one that is no object."""
    for where, record in located:
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
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line_number + error.lineno - 1}"
        # "Extra data": a value, then another. That may be a shape which is not read.
        shapes = f"; {SHAPES}" if error.msg == "Extra data" else ""
        raise BadInput(f"{place}: not JSON: {error.msg}{shapes}") from error
    except (ValueError, RecursionError) as error:
        # These errors do not say where; it is known only for a text of one line.
        place = f"{path}" if "\n" in text else f"{path}:{line_number}"
        raise BadInput(f"{place}: not JSON: {error}") from error
