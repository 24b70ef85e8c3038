"""What is printed instead of characters that the console lacks. Files stay UTF-8."""

import codecs
import io
import unicodedata
from collections.abc import Mapping
from typing import Final, TextIO

NEAREST: Final[Mapping[str, str]] = {
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{LEFTWARDS ARROW}": "<-",
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{MIDDLE DOT}": "-",
    "\N{BULLET}": "*",
    "\N{MINUS SIGN}": "-",
    "\N{HYPHEN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{FRACTION SLASH}": "/",
    "\N{GREEK SMALL LETTER MU}": "u",
    "\N{LATIN SMALL LETTER SHARP S}": "ss",
    "\N{LATIN SMALL LETTER AE}": "ae",
    "\N{LATIN CAPITAL LETTER AE}": "AE",
    "\N{LATIN SMALL LETTER O WITH STROKE}": "o",
    "\N{LATIN CAPITAL LETTER O WITH STROKE}": "O",
    "\N{LATIN SMALL LETTER L WITH STROKE}": "l",
    "\N{LATIN CAPITAL LETTER L WITH STROKE}": "L",
}
"""What stands for a character that has no decomposition into letters of ASCII and marks."""

HANDLER: Final = "fedpeft.nearest"
"""The name under which ``codecs`` knows what to do with a character that an encoding lacks."""


def in_ascii(text: str) -> str:
    """Return ``text`` with the nearest that ASCII has, or ``?``, for each character that it lacks.

    >>> in_ascii("3 \u00b1 1 \u2192 caf\u00e9 \u6f22")
    '3 +- 1 -> cafe ?'
    """
    return "".join(_nearest(character) for character in text)


def _nearest(character: str) -> str:
    if character.isascii():
        return character
    if character in NEAREST:
        return NEAREST[character]
    if "\u2500" <= character <= "\u257f":  # lines and corners of tables
        return _line(unicodedata.name(character))
    # A letter and its marks, or what a ligature or a fraction stands for.
    parts = unicodedata.normalize("NFKD", character)
    if parts == character:  # it has no parts: another script, or a picture
        return "?"
    return "".join(_nearest(part) for part in parts if not unicodedata.combining(part))


def _line(name: str) -> str:
    """Return what stands for a character of lines and boxes, told by its name in Unicode."""
    # Such as BOX DRAWINGS LIGHT DOWN AND RIGHT, a corner; a line across may be HORIZONTAL or LEFT.
    words = set(name.split())
    across = bool(words & {"HORIZONTAL", "LEFT", "RIGHT"})
    upright = bool(words & {"VERTICAL", "UP", "DOWN"})
    if across == upright:  # a corner or a crossing, or a diagonal, which is neither
        return "+"
    return "-" if across else "|"


def show_nearest(*streams: TextIO) -> None:
    """Let ``streams`` print the nearest of what their encoding lacks, and never fail for it."""
    codecs.register_error(HANDLER, _replace)
    for stream in streams:
        # What a notebook or a test puts in the place of a stream takes any text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what to print for the characters that could not be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    try:  # bytes of a file's name that Python could not decode: as they were
        return lacking.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return in_ascii(lacking), error.end
