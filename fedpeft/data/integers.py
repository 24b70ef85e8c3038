"""Whole numbers as names: one name for a number however it is written, and the order of numbers."""

import re
from collections.abc import Iterable

_INTEGER = re.compile(r"\s*(-?(?:0|[1-9][0-9]{0,99}))(?:\.0+)?\s*")
"""``3`` and ``3.0``; not ``+3`` and ``03``, which are written so for a reason."""


def integer(name: str) -> str | None:
    """Return the whole number that ``name`` is, without a point; None where it is none.

    >>> integer("3"), integer("3.0"), integer("-0.0"), integer("03"), integer("3.5")
    ('3', '3', '0', None, None)
    """
    found = _INTEGER.fullmatch(name)
    return str(int(found[1])) if found else None


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return the different ``names``, sorted: by value where all are whole numbers, else as text.

    >>> ordered(["10", "9", "9"]), ordered(["10", "9", "nine"])
    (('9', '10'), ('10', '9', 'nine'))
    """
    different = set(names)
    numbers = {name: integer(name) for name in different}
    if None in numbers.values():
        return tuple(sorted(different))
    return tuple(sorted(different, key=lambda name: (int(numbers[name] or 0), name)))
