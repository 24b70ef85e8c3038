"""A JSON array element by element, so that memory does not grow with the file."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from fedpeft.errors import BadInput

CHUNK: Final = 1 << 16
"""Characters that are read at least before parsing an element is tried again."""
CUT: Final = 16
"""So many characters before the end of what was read, a word or a number may just be cut off."""
SHAPES: Final = (
    "read are: an object a line, an array of objects, an object with one list of objects in it"
)

_BLANKS: Final = re.compile(r"[ \t\n\r]*")


def elements(path: Path, parts: Iterator[str], line_number: int) -> Iterator[tuple[str, object]]:
    """Yield every element of the array in ``parts`` with its place, ``path: record 3``.

    ``parts``: the text, in pieces of any lengths, from line ``line_number`` of the file on. In
    memory are at most two elements and ``CHUNK`` characters. BadInput, with file and line, where
    the text is no array, or where more follows it; the elements before are yielded first.
    """
    window = _Window(path, parts, line_number)
    window.expect("[", "Expecting value")
    count = 0
    while window.ahead() != "]":
        if count:
            window.expect(",", "Expecting ',' delimiter")
            if window.ahead() == "]":
                raise window.fault("Illegal trailing comma before end of array")
        count += 1
        yield f"{path}: record {count}", window.value()
    window.expect("]", "Expecting value")
    if window.ahead():
        raise window.fault(f"Extra data; {SHAPES}")


@final
@dataclass
class _Window:
    """What of a text is in memory: ``text``, of which ``position`` comes next.

    ``line``: the number of the line in which ``text`` begins. ``parts``: what follows.
    """

    path: Path
    parts: Iterator[str]
    line: int
    text: str = ""
    position: int = 0

    def ahead(self) -> str:
        """Pass over blanks and return the next character without taking it; empty at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.position)
            assert blanks is not None  # it matches nothing, too
            self.position = blanks.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._more():
                return ""

    def expect(self, mark: str, otherwise: str) -> None:
        """Take the character ``mark``; BadInput that says ``otherwise`` where another follows."""
        if self.ahead() != mark:
            raise self.fault(otherwise)
        self.position += 1

    def value(self) -> object:
        """Take a JSON value; BadInput where there is none."""
        self.ahead()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # Before the end of the text is in memory, one that breaks off may be whole.
                fault = self.fault(error.msg, error.pos)
                unterminated = error.msg.startswith("Unterminated")
                may_go_on = unterminated or error.pos >= len(self.text) - CUT
                if may_go_on and self._more():
                    continue
                raise fault from error
            except (ValueError, RecursionError) as error:
                raise self.fault(str(error)) from error
            # The digits of a number may go on, too.
            if end == len(self.text) and self._more():
                continue
            self.position = end
            return value

    def fault(self, why: str, position: int | None = None) -> BadInput:
        """Return the error ``why`` at ``position`` of the text; left out, where reading stands."""
        # Where a text ends too soon, the last line that says something is to blame.
        end = len(self.text.rstrip())
        position = min(end, self.position if position is None else position)
        line = self.line + self.text.count("\n", 0, position)
        return BadInput(f"{self.path}:{line}: not JSON: {why}")

    def _more(self) -> bool:
        """Let go of what was taken and read on; where nothing comes, change nothing and say so.

        As many characters come as are held, so that a long element is parsed a few times, each time
        twice as much of it, and not once for every part.
        """
        pieces: list[str] = []
        wanted = max(CHUNK, len(self.text) - self.position)
        for part in self.parts:
            pieces.append(part)
            wanted -= len(part)
            if wanted <= 0:
                break
        if not pieces:
            return False
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = "".join([self.text[self.position :], *pieces]), 0
        return True


def _unique(pairs: Sequence[tuple[str, object]]) -> Mapping[str, object]:
    """Return an object as a dict; raise ValueError for a name that occurs twice.

    JSON leaves open what that means, and Python would silently keep the last value.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values of one object are called {twin!r}")
    return record


DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique)
"""Reads JSON, but no object with the same name twice."""
