"""Labels and keys that are whole numbers, written in one way in all files of a data set."""

from collections.abc import Collection, Mapping

from fedpeft.data.integers import integer
from fedpeft.errors import BadInput


def unified(role: str, places: Mapping[str, str], deciding: Collection[str]) -> dict[str, str]:
    """Return name -> how the data set writes it, for every name in ``places``.

    Where all ``deciding`` names are whole numbers, numbers are written without a point, and the
    name NaN raises BadInput. Otherwise every name stays as it is. ``places``: where each name
    occurs first.
    """
    if not are_whole_numbers(deciding):
        return {name: name for name in places}
    written: dict[str, str] = {}
    for name, where in places.items():
        if _says_nan(name):
            raise BadInput(f"{where}: the {role} is {name!r}, and all others are whole numbers")
        # A name that train does not decide on may be no number: it stays, and may be refused.
        written[name] = integer(name) or name
    return written


def are_whole_numbers(names: Collection[str]) -> bool:
    """Return whether all ``names``, NaN apart, are whole numbers, and there are any."""
    any_number = False
    for name in set(names):
        if _says_nan(name):
            continue  # it marks a gap in a column of numbers, and is refused later
        if integer(name) is None:
            return False
        any_number = True
    return any_number


def _says_nan(name: str) -> bool:
    """Return whether ``name`` is what programs write where a number is missing."""
    return name.strip().lower() == "nan"
