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
"""The characters that files use as delimiters, for guesses in error messages."""

NAMED = {"tab": "\t", "\\t": "\t"}
"""Delimiters by another name."""

LARGEST = 2**31 - 1
"""Characters that a field may have. The csv module's own limit, 131,072, is too low for texts.

This is the largest that fits a C long on every system.
"""

LOOKED_AT = 1000
"""Records below the first line that are read to tell whether that line is a header."""

LENGTHY = 60
"""A field of more characters is taken for data, not for a column's name."""

_EXCEL = re.compile(r'"?sep=([^\w"\r\n])"?\s*', re.IGNORECASE)
"""A line above the header that tells Excel the delimiter."""

_HINTS = {
    "unexpected end": "; the quote that opens here is never closed",
    "new-line": "; lines end with a carriage return alone: save it with those of Unix or Windows",
    "expected after": "; a text with quotes in it must stand in quotes, its own ones doubled",
}
"""Part of an error message of the csv module -> what it means."""


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
    """Yield the records below the header. Blank lines and blank fields beyond it are skipped.

    The delimiter is ``mark``. If that is None, it is the one of Excel's line ``sep=;``, and without
    such a line ``usual``. Raises BadInput for a line that is not CSV or has too few or too many
    fields, for two columns of the same name, and for a header that lacks ``columns`` if the reason
    can be told.
    """
    # 1. The delimiter, which Excel's line above the header may give.
    first = next(lines, "")
    excel = _EXCEL.fullmatch(first)
    mark = mark or (excel[1] if excel else usual)
    csv.field_size_limit(LARGEST)
    reader = csv.reader(lines if excel else chain([first], lines), strict=True, delimiter=mark)
    rows = _rows(path, reader, above=1 if excel else 0)
    # 2. The header.
    where, header = next(rows, ("", []))
    names = [name for name in header if name.strip()]
    if len(set(names)) < len(names):
        shown = ", ".join(map(repr, header))
        raise BadInput(f"{where}: two columns have the same name among {shown}")
    if not set(columns) <= set(header):
        # Read some records ahead to explain it, then put them back.
        below = list(islice(rows, LOOKED_AT))
        _explain(where, header, [fields for _, fields in below], columns, mark)
        rows = chain(below, rows)
    # 3. The records.
    yield from _named(header, rows)


def _rows(path: Path, reader: Any, above: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the fields of every record with the line where it ends.

    ``above``: how many lines of the file ``reader`` has not seen.
    """
    last_line = 0  # of the last complete record
    try:
        for fields in reader:
            last_line = reader.line_num
            if fields:
                yield f"{path}:{last_line + above}", fields
    except csv.Error as error:
        message = str(error)
        line_number = reader.line_num
        if message.startswith("unexpected end"):
            # The reader noticed only at the end of the file; the quote opens where the record does.
            line_number = last_line + 1
        place = f"{path}:{line_number + above}"
        raise BadInput(f"{place}: not CSV: {message}{_hint(message)}") from error


def _hint(message: str) -> str:
    """Return what an error message of the csv module means, empty where that is not known."""
    for part, hint in _HINTS.items():
        if part in message:
            return hint
    return ""


def _named(header: list[str], rows: Iterator[tuple[str, list[str]]]) -> Iterator[Located]:
    """Yield rows as records. Columns at the end that have no name may be missing from a row."""
    # Spreadsheets write empty columns beyond the table, in some rows and not in others.
    least = len(_trimmed(header, 0))
    for where, row in rows:
        fields = _trimmed(row, len(header))
        if not least <= len(fields) <= len(header):
            raise BadInput(f"{where}: {len(fields)} fields where the header names {len(header)}")
        yield where, dict(zip(header, fields, strict=False))


def _trimmed(fields: list[str], least: int) -> list[str]:
    """Return ``fields`` without the blank ones at the end, but at least ``least`` of them."""
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
    """Raise BadInput if one can tell why ``header`` lacks some of ``columns``.

    The reason may be another delimiter, or that there is no header. A misspelt name is not reported
    here: the caller's search for the column will do that.
    """
    shown = ", ".join(f"{field!r:.60}" for field in header)
    # 1. Another delimiter, the most frequent one in the header.
    line = mark.join(header)
    others = [other for other in MARKS if other != mark and other in line]
    likely = max(others, key=line.count, default="")
    if likely and (len(header) == 1 or set(columns) <= set(line.split(likely))):
        name = "tab" if likely == "\t" else likely
        remedy = f'if it is {name} that stands between them, set data.delimiter = "{name}"'
        raise BadInput(f"{where}: the columns are {shown}; {remedy}")
    # 2. No header, unless a name in it is like one of those that are missing.
    missing = set(columns) - set(header)
    misspelt = any(nearest(column, header) for column in missing)
    if not misspelt and _is_data(header, below):
        raise BadInput(
            f"{where}: the first line is data, not a header: {shown}; "
            f"write a line above it that names the columns, such as {mark.join(columns)}"
        )


def _is_data(header: Sequence[str], below: Sequence[Sequence[str]]) -> bool:
    """Return whether ``header`` is a record like those ``below``.

    It is one if a field is too long for a name, or occurs again further down in its column.
    """
    # Pandas names columns without names 0, 1, ...; as labels, 0 and 1 may well occur again.
    if list(header) == [str(index) for index in range(len(header))]:
        return False
    if max(map(len, header), default=0) > LENGTHY:
        return True
    # Columns, not rows; only those that the shortest record below has, too.
    for field, column in zip(header, zip(*below, strict=False), strict=False):
        if field.strip() and field in column:
            return True
    return False
