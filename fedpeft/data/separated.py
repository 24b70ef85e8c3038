"""Separated columns (``.csv``, ``.tsv``): a header with the columns' names, then the records."""

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fedpeft.data.json_records import Located
from fedpeft.data.paths import nearest
from fedpeft.errors import BadInput

MARKS = (";", "\t", "|", ",")
"""What people's columns are separated by."""

NAMED = {"tab": "\t", "\\t": "\t"}
"""Delimiters by another name."""

LARGEST = 2**31 - 1
"""Characters that a field may have; the csv module's own limit is 131,072."""

LOOKED_AT = 1000
"""Records among which the first line's fields are looked for, to tell whether it is a header."""

LENGTHY = 60
"""Characters that no column's name has."""

_EXCEL = re.compile(r'"?sep=([^\w"\r\n])"?\s*', re.IGNORECASE)
"""The line above the header by which Excel is told the delimiter."""

_HINTS = {
    "unexpected end": "; the quote that opens here is never closed",
    "new-line": "; lines end with a carriage return alone: save it with those of Unix or Windows",
    "expected after": "; a text with quotes in it must stand in quotes, its own ones doubled",
}
"""What the csv module says, and what it means."""


def delimiter(given: str | None) -> str | None:
    """Return the character that ``data.delimiter`` means; BadInput where it means none."""
    if given is None:
        return None
    mark = NAMED.get(given, given)
    if len(mark) != 1 or mark in '"\r\n':
        raise BadInput(f'data.delimiter = {given!r}: must be one character, such as ";", or "tab"')
    return mark


def separated(
    path: Path,
    lines: Iterator[str],
    columns: Collection[str],
    mark: str | None,
    usual: str,
) -> Iterator[Located]:
    """Yield the records below the header; blank lines, and blank fields beyond it, are passed over.

    The delimiter is ``mark``; where that is None, the one of Excel's line ``sep=;``, and without
    such a line ``usual``. Raises BadInput for a line that is no CSV or has too few or too many
    fields, for a name that two columns have, and for a header that lacks ``columns`` where one can
    tell why.
    """
    first = next(lines, "")
    excel = _EXCEL.fullmatch(first)
    mark = mark or (excel[1] if excel else usual)
    csv.field_size_limit(LARGEST)
    reader = csv.reader(lines if excel else chain([first], lines), strict=True, delimiter=mark)
    rows = _rows(path, reader, above=1 if excel else 0)
    where, header = next(rows, ("", []))
    names = [name for name in header if name.strip()]
    if len(set(names)) < len(names):
        shown = ", ".join(map(repr, header))
        raise BadInput(f"{where}: two columns have the same name among {shown}")
    if not set(columns) <= set(header):
        below = list(islice(rows, LOOKED_AT))
        _explain(where, header, [fields for _, fields in below], columns, mark)
        rows = chain(below, rows)
    yield from _named(header, rows)


def _rows(path: Path, reader: Any, above: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields of every record, with the line that it ends at.

    ``above``: how many lines of the file ``reader`` has not seen.
    """
    ended = 0
    try:
        for fields in reader:
            ended = reader.line_num
            if fields:
                yield f"{path}:{ended + above}", fields
    except csv.Error as error:
        said = str(error)
        number = ended + 1 if said.startswith("unexpected end") else reader.line_num
        hint = next((hint for part, hint in _HINTS.items() if part in said), "")
        raise BadInput(f"{path}:{number + above}: not CSV: {said}{hint}") from error


def _named(header: list[str], rows: Iterator[tuple[str, list[str]]]) -> Iterator[Located]:
    """Yield rows as records. Columns at the end that have no name may be missing from a row."""
    least = len(_trimmed(header, 0))
    for where, row in rows:
        fields = _trimmed(row, len(header))
        if not least <= len(fields) <= len(header):
            raise BadInput(f"{where}: {len(fields)} fields where the header names {len(header)}")
        yield where, dict(zip(header, fields, strict=False))


def _trimmed(fields: list[str], least: int) -> list[str]:
    """Return ``fields`` without the blank ones at their end, but ``least`` at least."""
    end = len(fields)
    while end > least and not fields[end - 1].strip():
        end -= 1
    return fields[:end]


def _explain(
    where: str,
    header: Sequence[str],
    below: Sequence[Sequence[str]],
    columns: Collection[str],
    mark: str,
) -> None:
    """Raise BadInput where one can tell why ``header`` lacks some of ``columns``.

    The reason may be another delimiter, or that there is no header. A column's name that is merely
    misspelt is left to whoever looks for the column.
    """
    shown = ", ".join(f"{field!r:.60}" for field in header)
    line = mark.join(header)
    others = [other for other in MARKS if other != mark and other in line]
    likely = max(others, key=line.count, default="")
    if likely and (len(header) == 1 or set(columns) <= set(line.split(likely))):
        name = "tab" if likely == "\t" else likely
        remedy = f'if it is {name} that stands between them, set data.delimiter = "{name}"'
        raise BadInput(f"{where}: the columns are {shown}; {remedy}")
    misspelt = any(nearest(column, header) for column in columns if column not in header)
    if not misspelt and _is_data(header, below):
        raise BadInput(
            f"{where}: the first line is data, not a header: {shown}; "
            f"write a line above it that names the columns, such as {mark.join(columns)}"
        )


def _is_data(header: Sequence[str], below: Sequence[Sequence[str]]) -> bool:
    """Return whether ``header`` is a record like those ``below``.

    It is where a field is too long for a name, or comes again further down in its column.
    """
    if list(header) == [str(number) for number in range(len(header))]:
        return False  # so pandas calls columns without names; 0 and 1 may well come again as labels
    if any(len(field) > LENGTHY for field in header):
        return True
    columns = zip(header, zip(*below, strict=False), strict=False)
    return any(field.strip() and field in column for field, column in columns)
