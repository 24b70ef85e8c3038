"""Names of the user's as literal text: neither markup, nor mathematics, nor control characters."""

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.text import Text

MOST = 40
"""Characters of a name in a picture."""

UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of control characters, half surrogate pairs and line ends."""

TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of all text that follows them."""


def literal(name: str, most: int | None = None) -> str:
    r"""Return ``name`` in one printable line; what is longer than ``most`` ends with an ellipsis.

    Control characters become escapes; all other characters stay as they are.

    >>> print(literal("up\tdown"), literal("a good deal longer", 8))
    up\tdown a good …
    """
    shown = "".join(_escaped(character) for character in name)
    if most is None or len(shown) <= most:
        return shown
    return shown[: most - 1] + "…"


def plain(text: "Text") -> None:
    """Let matplotlib draw ``text`` as it is written: no ``$`` or backslash in it is mathematics."""
    # Names such as "cost_in_$" are the user's; as mathematics they may not even parse.
    text.set_parse_math(False)
    text.set_usetex(False)


def _escaped(character: str) -> str:
    if unicodedata.category(character) in UNPRINTABLE or character in TURNING:
        return character.encode("unicode_escape").decode()
    return character
