"""What server and sites say of what they do: lines for people, or objects of JSON for machines.

Most is said as a line. What happens again and again, or is counted, is told as an event with
fields. Neither ever holds texts, labels, or a path of a site: the reasons of errors at a site are
in its file ``trainer.log``, which its user alone can read.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol, final

Say = Callable[[str], None]
NOTE: Final = "note"
"""The event of a line that is said without fields."""


class Tell(Protocol):
    """Tells of an event: its name, the same as a line, and its fields."""

    def __call__(self, event: str, line: str, /, **about: int | float | str | None) -> None:
        """Tell of ``event``."""
        ...


def in_lines(say: Say) -> Tell:
    """Return what says the line of each event, and no more.

    >>> tell = in_lines(print)
    >>> tell("joined", "site 3 has joined", site=3)
    site 3 has joined
    """

    def tell(event: str, line: str, /, **about: int | float | str | None) -> None:
        del event, about
        say(line)

    return tell


@final
@dataclass(frozen=True)
class JsonLog:
    """Writes each event as a line of JSON: when, which program, which event, the line, the fields.

    >>> log = JsonLog("serve", print, lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    >>> log.tell("joined", "site 3 has joined", site=3)  # doctest: +NORMALIZE_WHITESPACE
    {"time": "2026-01-02T03:04:05.000+00:00", "program": "serve", "event": "joined",
     "message": "site 3 has joined", "site": 3}
    """

    program: str
    write: Callable[[str], None]
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def say(self, line: str) -> None:
        """Write a line without fields."""
        self.tell(NOTE, line)

    def tell(self, event: str, line: str, /, **about: int | float | str | None) -> None:
        """Write an event with its fields."""
        content = {
            "time": self.now().isoformat(timespec="milliseconds"),
            "program": self.program,
            "event": event,
            "message": " ".join(line.splitlines()),
            **about,
        }
        self.write(json.dumps(content))
