"""JSON in three shapes: an object a line, an array of objects, an object with a list of objects."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from fedpeft.errors import BadInput

Record = Mapping[str, object]

Located = tuple[str, Record]
"""A record and where it stands, as ``path:line`` or ``path: record 3``, both counted from 1."""

SHAPES = "read are: an object a line, an array of objects, an object with one list of objects in it"


def json_records(path: Path, lines: Iterator[str], columns: Collection[str]) -> Iterator[Located]:
    """Yield the objects of a JSON file, whichever of the three shapes it has.

    An object a line is read line by line, blank ones passed over; the other shapes are read as a
    whole. An object alone in its file is a record where it has the ``columns``. Raises BadInput for
    what is no JSON, for other shapes, and for an object that gives a name twice.
    """
    filled: Iterator[tuple[int, str]]
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    number, line = next(filled, (1, ""))
    if not line:
        return
    if line.lstrip().startswith("[") or _breaks_off(line):
        yield from _whole(path, number, line, "".join(lines), columns)
        return
    record = _object(path, number, line)
    if not _plain(record, columns):
        # No record, it seems; if nothing follows, its rows may be in a list inside it.
        second = next(filled, None)
        if second is None:
            yield from _alone(path, f"{path}:{number}", record, columns)
            return
        filled = chain([second], filled)
    yield f"{path}:{number}", record
    for number, line in filled:
        yield f"{path}:{number}", _object(path, number, line)


def _breaks_off(line: str) -> bool:
    """Return whether ``line`` is the beginning of a JSON value that goes on below."""
    text = line.strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False


def _whole(
    path: Path,
    number: int,
    first: str,
    rest: str,
    columns: Collection[str],
) -> Iterator[Located]:
    """Yield the records of the one value that begins with ``first``, the file's line ``number``."""
    try:
        value = _parsed(path, number, first + rest)
    except BadInput:
        if first.lstrip().startswith("{") and _starts_with_object(rest):
            # An object a line, the first of them cut off: that line is at fault, not a later one.
            _object(path, number, first)
        raise
    if isinstance(value, dict):
        yield from _alone(path, f"{path}:{number}", value, columns)
    elif isinstance(value, list):
        yield from _elements(path, value)


def _starts_with_object(text: str) -> bool:
    """Return whether the first line of ``text``, blank ones apart, is a whole JSON object."""
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _alone(path: Path, where: str, value: Record, columns: Collection[str]) -> Iterator[Located]:
    """Yield the records of a file that is one object: itself, or those in its list of objects."""
    if _plain(value, columns) or _plain(value, value):
        yield where, value
        return
    lists = {name: held for name, held in value.items() if _is_list_of_objects(held)}
    if len(lists) != 1:
        found = ", ".join(map(repr, lists)) or "none"
        raise BadInput(f"{where}: one object, and its lists of objects are: {found}; {SHAPES}")
    yield from _elements(path, *lists.values())


def _is_list_of_objects(value: object) -> bool:
    """Return whether ``value`` is a list that is empty or begins with an object."""
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def _plain(record: Record, columns: Collection[str]) -> bool:
    """Return whether ``record`` has all ``columns``, and neither list nor object in them."""
    nested = {name for name, value in record.items() if isinstance(value, list | dict)}
    return set(columns) <= record.keys() - nested


def _elements(path: Path, array: object) -> Iterator[Located]:
    """Yield the objects of an array."""
    assert isinstance(array, list)
    for number, record in enumerate(array, 1):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            shown = json.dumps(record)
            raise BadInput(f"{where}: must be a JSON object, not {shown:.40}; {SHAPES}")
        yield where, record


def _object(path: Path, number: int, line: str) -> Record:
    """Return the object that is line ``number``."""
    record = _parsed(path, number, line)
    if not isinstance(record, dict):
        shown = repr(line.strip())
        raise BadInput(f"{path}:{number}: each line must hold one JSON object, not {shown:.40}")
    return record


def _parsed(path: Path, number: int, text: str) -> object:
    """Return the JSON value ``text``, which begins at line ``number``."""
    text = text.strip()
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{number + error.lineno - 1}"
        shapes = f"; {SHAPES}" if error.msg == "Extra data" else ""
        raise BadInput(f"{place}: not JSON: {error.msg}{shapes}") from error
    except (ValueError, RecursionError) as error:
        # These do not say where; of a text of one line that is known.
        place = f"{path}" if "\n" in text else f"{path}:{number}"
        raise BadInput(f"{place}: not JSON: {error}") from error


def _unique(pairs: Sequence[tuple[str, object]]) -> Record:
    """Return an object as a dict; raise ValueError for a name that is given twice.

    JSON leaves open what that means, and Python would keep the last value without a word.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values of one object are called {twin!r}")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
