"""Whole numbers as names: one name for a number however it is written, and the order of numbers."""

import re
from collections.abc import Iterable

# At most 100 digits: Python refuses to convert a text of more than 4,300.
_INTEGER = re.compile(r"\s*(-?(?:0|[1-9][0-9]{0,99}))(?:\.0+)?\s*")
"""``3`` and ``3.0``; not ``+3`` and ``03``, which are rather codes than numbers."""


def integer(name: str) -> str | None:
    """Return ``name`` as a whole number without a point; None where it is not a whole number.

    >>> integer("3"), integer("3.0"), integer("-0.0"), integer("03"), integer("3.5")
    ('3', '3', '0', None, None)
    """
    match = _INTEGER.fullmatch(name)
    if match is None:
        return None
    return str(int(match[1]))  # by way of int, so that "-0" becomes "0"


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct ``names``, sorted: by value where all are whole numbers, else as text.

    >>> ordered(["10", "9", "9"]), ordered(["10", "9", "nine"])
    (('9', '10'), ('10', '9', 'nine'))
    """
    distinct = set(names)
    value_of: dict[str, int] = {}
    for name in distinct:
        number = integer(name)
        if number is None:
            return tuple(sorted(distinct))
        value_of[name] = int(number)
    # The name itself decides between "3" and "3.0", so that the order is always the same.
    return tuple(sorted(distinct, key=lambda name: (value_of[name], name)))
