"""CoNLL's columns (``.conll``, ``.bio``, ``.iob``): a word a line, its tags beside it.

A blank line ends a sentence. Source: Tjong Kim Sang and De Meulder 2003, section 2.1.
"""

from collections.abc import Iterator
from pathlib import Path

from fedpeft.data.json_records import Located
from fedpeft.errors import BadInput

DOCUMENT = "-DOCSTART-"
"""The first word of a line between two documents."""


def conll_records(path: Path, lines: Iterator[str], delimiter: str | None) -> Iterator[Located]:
    """Yield every sentence: ``tokens``, its first column, and ``tags``, its last one, as lists.

    Each column also has its number, from ``1``, as a name. A sentence's place is the line of its
    first word. Columns are parted by tabs where a line has any, otherwise by blanks, or by
    ``delimiter``.

    Raises BadInput, with file and line, for a word without a tag, for an empty word or tag, and
    where a sentence's lines have different numbers of columns.
    """
    sentence: list[list[str]] = []  # the columns of every word
    first_line = 0
    for line_number, line in enumerate(lines, 1):
        fields = _fields(line, delimiter)
        if fields and fields[0] != DOCUMENT:
            where = f"{path}:{line_number}"
            _check(where, fields, sentence, first_line)
            if not sentence:
                first_line = line_number
            sentence.append(fields)
        elif sentence:
            yield _record(path, first_line, sentence)
            sentence = []
    if sentence:
        yield _record(path, first_line, sentence)


def _fields(line: str, delimiter: str | None) -> list[str]:
    """Return the columns of a line; none of a blank one."""
    text = line.strip(" \t\r\n")
    if not text:
        return []
    if delimiter is None and "\t" not in text:
        # Not str.split() alone, which would also part words at blanks that belong to them (U+00A0).
        return [field for field in text.split(" ") if field]
    fields = line.rstrip("\r\n").split(delimiter or "\t")
    return [field.strip(" ") for field in fields]


def _check(where: str, fields: list[str], sentence: list[list[str]], first_line: int) -> None:
    """Raise BadInput where a line is no word with tags, or not like those above it."""
    if len(fields) < 2:
        raise BadInput(
            f"{where}: {fields[0]!r:.60} stands alone; a line holds a word and its tag, "
            "parted by a blank or a tab"
        )
    if not all(fields):
        raise BadInput(f"{where}: column {fields.index('') + 1} is empty")
    if sentence and len(fields) != len(sentence[0]):
        raise BadInput(
            f"{where}: {len(fields)} columns where line {first_line}, of the same sentence, "
            f"has {len(sentence[0])}"
        )


def _record(path: Path, line_number: int, sentence: list[list[str]]) -> Located:
    """Return a sentence, from the columns of its words, as a record of lists."""
    columns = [list(column) for column in zip(*sentence, strict=True)]
    record: dict[str, object] = {"tokens": columns[0], "tags": columns[-1]}
    for number, column in enumerate(columns, 1):
        record[str(number)] = column
    return f"{path}:{line_number}", record
