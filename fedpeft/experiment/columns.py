"""What the columns of a user's file hold, and which of them a task may read."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from fedpeft.data.paths import matching
from fedpeft.data.records import SEPARATED, ending, records
from fedpeft.data.separated import MARKS
from fedpeft.errors import BadInput

TEXTS: Final = ("text", "sentence", "content", "review", "question")
"""What columns of texts are usually called, the likeliest first."""
LABELS: Final = ("label", "category", "class", "target", "intent")
"""What columns of labels are usually called, the likeliest first."""
KEYS: Final = ("client", "user", "site", "author", "speaker")
"""What columns of natural clients are usually called, also with ``_id`` or ``id`` at the end."""

Roles = Mapping[str, str]
"""Role of a task -> column."""


@final
@dataclass
class Column:
    """What a column holds, over all records.

    ``rows``: records that have it. ``only_names``: whether every value can name a class or client.
    ``characters``: of all its texts together. ``different``: its distinct values, as texts.
    """

    name: str
    rows: int = 0
    only_strings: bool = True
    only_names: bool = True
    characters: int = 0
    different: set[str] = field(default_factory=set)

    def add(self, value: object) -> None:
        """Take in the value of one more record."""
        self.rows += 1
        match value:
            case str():
                self.characters += len(value)
                self.only_names &= bool(value.strip())  # a blank names nothing
                self.different.add(value)
            case bool() | int() | float() if math.isfinite(value):
                self.only_strings = False
                self.different.add(json.dumps(value))
            case _:  # null, nan, a list, an object
                self.only_strings = self.only_names = False

    def fault(self, rows: int, most: float) -> str:
        """Return why the column cannot name classes or clients; empty where it can.

        ``rows``: of the file. ``most``: different names at most.
        """
        if self.rows < rows or not self.only_names:
            return "not a name in every row"
        if len(self.different) < 2:
            return "one value"
        return f"{len(self.different)} different values" if len(self.different) > most else ""


@final
@dataclass(frozen=True)
class Profile:
    """The columns of a file, or of all that a pattern matches.

    ``rows``: how many records there are. ``delimiter``: what separates columns, where it is not the
    usual one.
    """

    where: Path
    columns: Sequence[Column]
    rows: int
    delimiter: str | None

    @property
    def shown(self) -> str:
        """The columns' names, for an error."""
        return ", ".join(repr(column.name) for column in self.columns) or "none"

    def usual(self, names: Sequence[str]) -> Column | None:
        """Return the column of every row that has the likeliest of the usual ``names``."""
        whole = [column for column in self.columns if column.rows == self.rows]
        return _usual(whole, names)

    def key(self, taken: Collection[str]) -> Column | None:
        """Return the first column, none of those ``taken``, that seems to name natural clients."""
        for column in self.columns:
            if column.name not in taken and _is_key(column, self.rows):
                return column
        return None


def profile(train: Path) -> Profile:
    """Return the columns of ``train``, a file or a pattern.

    Raises BadInput for files that cannot be read.
    """
    columns, delimiter = _profiled(train)
    rows = max((column.rows for column in columns), default=0)
    return Profile(train, columns, rows, delimiter)


def has_column(path: Path, name: str, delimiter: str | None) -> bool:
    """Return whether the files of ``path`` have a column called ``name``."""
    columns = _columns(matching(path.expanduser()), delimiter)
    return any(column.name == name for column in columns)


def by_names(found: Profile, names: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """Return role -> column with the likeliest of its ``names``; None where one is missing."""
    roles: dict[str, str] = {}
    for role, usual in names.items():
        column = found.usual(usual)
        if column is None:
            return None
        roles[role] = column.name
    return roles


def text_and_label(found: Profile) -> dict[str, str]:
    """Return the columns of texts and labels, by their usual names, or else by what they hold.

    Those are the longest texts, and the fewest different values. Raises BadInput where there is no
    column of texts or labels.
    """
    text = _text_column(found)
    others: list[Column] = []
    key = found.key([text.name])
    for column in found.columns:
        if column is not text and column is not key:
            others.append(column)
    label = _label_column(found, others)
    return {"text": text.name, "label": label.name}


def usual_label(found: Profile, taken: Collection[str]) -> str | None:
    """Return the column of labels by its usual name, if it can be used and is none of ``taken``."""
    column = found.usual(LABELS)
    if column is None or column.name in taken or column.fault(found.rows, found.rows / 2):
        return None
    return column.name


def _profiled(train: Path) -> tuple[list[Column], str | None]:
    """Return the columns of ``train``, and the delimiter where it is not the usual one."""
    paths = matching(train)
    try:
        return _columns(paths, None), None
    except BadInput:
        # Another delimiter may do. Where it does not, the first error is the one to report.
        if paths[0].is_dir() or not all(ending(path) in SEPARATED for path in paths):
            raise
        for mark in MARKS:
            try:
                columns = _columns(paths, mark)
            except BadInput:
                continue
            if len(columns) > 1:  # else ``mark`` does not occur
                return columns, "tab" if mark == "\t" else mark
        raise


def _columns(paths: Iterable[Path], delimiter: str | None) -> list[Column]:
    """Return the columns of all records in ``paths``."""
    columns: dict[str, Column] = {}
    for path in paths:
        # The usual names tell a header from data, and a record from an object that holds records.
        for _, record in records(path, (TEXTS[0], LABELS[0]), delimiter):
            for name, value in record.items():
                columns.setdefault(name, Column(name)).add(value)
    return list(columns.values())


def _text_column(found: Profile) -> Column:
    """Return the column of texts: by its usual name, or else the one with the longest."""
    texts = [column for column in found.columns if column.only_strings]
    texts = [column for column in texts if column.rows == found.rows]
    if not texts:
        raise BadInput(
            f"{found.where}: no column holds a text in every row; its columns are {found.shown}"
        )
    return _usual(texts, TEXTS) or max(texts, key=lambda column: column.characters)


def _label_column(found: Profile, columns: Sequence[Column]) -> Column:
    """Return the column of labels: by its usual name, or else the one with the fewest values.

    A column of that name that cannot be used is not passed over for another.
    """
    rows = found.rows
    named = [column for column in columns if _normalized(column.name) in LABELS]
    # A label by another name should come twice, on average: else it may well be the row's number.
    most = rows - 1 if named else rows / 2
    usable: list[Column] = []
    faults: list[str] = []
    for column in named or columns:
        fault = column.fault(rows, most)
        if fault:
            faults.append(f"{column.name!r} ({fault})")
        else:
            usable.append(column)
    if not usable:
        shown = ", ".join(faults) or "none"
        raise BadInput(
            f"{found.where}: no column can be the labels, of which there must be two or more, "
            f"a few in all {rows} rows; the columns beside the texts are {shown}"
        )
    return _usual(usable, LABELS) or min(usable, key=lambda column: len(column.different))


def _usual(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """Return the column with the likeliest of the usual ``names``."""
    for name in names:
        for column in columns:
            if _normalized(column.name) == name:
                return column
    return None


def _normalized(name: str) -> str:
    return name.strip().lower()


def _is_key(column: Column, rows: int) -> bool:
    """Return whether a column seems to name natural clients."""
    name = re.sub(r"[ _-]?id$", "", _normalized(column.name))  # user_id, user-id, userid -> user
    return name in KEYS and not column.fault(rows, rows / 2)
