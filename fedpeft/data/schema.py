"""What a task reads of a record: its columns, and the label that partitions divide by."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# JSON may write half of a surrogate pair as an escape; no encoding, UTF-8 included, can hold it.
_SURROGATE = re.compile("[\ud800-\udfff]")

Values = Mapping[str, Any]
"""The parsed values of one record, by role."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    ``role``: what the task calls it; ``data.<role>`` of the configuration names it in the files.
    ``parse``: a value as JSON gives it -> what the task works with; a ValueError says what is wrong
    with the value, as in ``must be a string, not 5``. ``instead_of``: the roles of columns that are
    not read where this one is named.
    """

    role: str
    parse: Callable[[Any], Any]
    instead_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """What a task reads of every record.

    ``columns``: in the order in which they enter the data's digest. Which of them a file needs is
    settled by the configuration, which gives a name to each that is read.

    ``label``: how a record gets the label that partitions divide by, where no column is named for
    it: from its parsed values. None where a column has to hold it. ``is_labelled``: whether every
    record has a label; otherwise rows have one only where a column is named for it. ``check``: says
    what is wrong between the values of a record, or returns an empty string; None where nothing can
    be wrong.

    ``answers``: the names in a record that ``data.labels`` has to list, where these are not its
    label; None where they are.
    """

    columns: tuple[Column, ...]
    label: Callable[[Values], str] | None = None
    is_labelled: bool = True
    check: Callable[[Values], str] | None = None
    answers: Callable[[Values], Iterable[str]] | None = None

    def read(self, names: Mapping[str, str | None]) -> dict[str, str]:
        """Return role -> name of the columns that are read, of all ``names`` that there are.

        >>> said = Column("messages", text, instead_of=("prompt",))
        >>> Schema((Column("prompt", text), said)).read({"prompt": "p", "messages": "m"})
        {'messages': 'm'}
        """
        replaced: set[str] = set()
        for column in self.columns:
            if names[column.role] is not None:
                replaced.update(column.instead_of)
        chosen: dict[str, str] = {}
        for column in self.columns:
            name = names[column.role]
            if name is not None and column.role not in replaced:
                chosen[column.role] = name
        return chosen


def text(value: Any) -> str:
    """Return a text as it is; anything but a string of whole characters raises ValueError.

    >>> text("Good morning")
    'Good morning'
    """
    if not isinstance(value, str):
        raise ValueError(f"must be a string, not {shown(value)}")
    if _SURROGATE.search(value):
        raise ValueError("holds half a surrogate pair, which no encoding can write")
    return value


def words(value: Any) -> tuple[str, ...]:
    """Return a list of texts; a single string is split at its blanks.

    >>> words("Ada lives in London"), words(["New York", "is", "big"])
    (('Ada', 'lives', 'in', 'London'), ('New York', 'is', 'big'))
    """
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of strings, not {shown(value)}")
    return tuple(text(word) for word in value)


def shown(value: Any) -> str:
    """Return the first characters of a value as JSON writes it, or as text, for an error.

    >>> shown({"a": None})
    '{"a": null}'
    """
    return f"{json.dumps(value, default=str):.40}"
