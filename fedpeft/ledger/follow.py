"""A ledger that grows while it is read: each look reads what is new, and nothing twice."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, final

from fedpeft.errors import BadInput
from fedpeft.ledger.file import row_of
from fedpeft.ledger.rows import Row


@final
class Follower:
    """Reads a ledger's rows as they come.

    A run that is resumed cuts its ledger back to its last checkpoint, and one that is started again
    replaces it. Both are noticed, as the last line that was read no longer stands where it stood;
    then everything is read again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._length = 0  # bytes of the lines that were read
        self._lines = 0
        self._last = b""  # the last of these lines

    def look(self, take: Callable[[Row], None], forget: Callable[[], None]) -> None:
        """Give each row that is new to ``take``; before that, call ``forget`` if all are read anew.

        A last line without its newline is not a row yet. A file that is not there yet has no rows.
        Raises BadInput as ``stream`` does.
        """
        try:
            with self._path.open("rb") as file:
                if not self._goes_on(file):
                    forget()
                    self._begin_anew()
                file.seek(self._length)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    # Noted before it is read, so that a bad line is told once and then passed over.
                    self._length += len(line)
                    self._lines += 1
                    self._last = line
                    take(row_of(self._path, self._lines, line))
        except FileNotFoundError:
            if self._lines:
                forget()
                self._begin_anew()
        except OSError as error:
            raise BadInput(f"{self._path}: no ledger to read here ({error.strerror})") from error

    def _goes_on(self, file: IO[bytes]) -> bool:
        """Return whether the last line that was read still stands where it stood."""
        file.seek(self._length - len(self._last))
        return file.read(len(self._last)) == self._last
