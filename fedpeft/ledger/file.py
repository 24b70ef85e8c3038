"""The ledger's file: one JSON line per row.

A run appends to it, cuts it back to a checkpoint when it resumes, and reports read it.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, final

from fedpeft.errors import BadInput
from fedpeft.ledger.rows import Row, from_json, to_json

FILE = "ledger.jsonl"
"""The ledger's name inside a run's folder."""

# A key that no row uses, so an object with it alone can only be a float.
_TAG = "$float"


@final
class Ledger:
    """A ledger open for writing. Rows are buffered; only ``sync`` makes them durable.

    Opening creates the file or continues at its end. A crash may have left half a row there, so a
    resumed run first calls ``cut`` with the length that its checkpoint recorded. I/O errors, such
    as a full disk, are raised as OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")

    def append(self, row: Row) -> None:
        """Add ``row`` as one compact JSON line.

        Floats are written by ``repr`` and so come back to the bit; NaN and infinities, which JSON
        lacks, are written as ``{"$float": "nan"}``. A value that JSON cannot hold raises TypeError.
        """
        line = json.dumps(_legal(to_json(row)), separators=(",", ":"), allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def sync(self) -> int:
        """Make every row so far durable and return the file's length in bytes.

        A checkpoint's manifest records that length.
        """
        # Python's buffer to the system, then the system's to the disk.
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, length: int) -> None:
        """Drop everything after the first ``length`` bytes, a number that ``sync`` returned.

        Raises BadInput when the file is shorter than that: then it is not the checkpoint's ledger.
        """
        size = os.fstat(self._file.fileno()).st_size
        if size < length:
            raise BadInput(
                f"{self._path}: has {size} bytes, "
                f"but the checkpoint was written when it had {length}"
            )
        self._file.truncate(length)
        # Writes go to the end anyway, but ``sync`` reads the length off the position.
        self._file.seek(length)

    def close(self) -> None:
        """Write what is buffered and close the file; closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def stream(path: Path) -> Iterator[Row]:
    """Yield the rows of the ledger at ``path`` in the order they were written.

    A last line without its newline is what a crash leaves: it is not a row yet and is ignored.
    Raises BadInput when the file cannot be read, and with file and line number when any other line
    is not a row.
    """
    try:
        with path.open("rb") as lines:
            for line_number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    yield row_of(path, line_number, line)
    except OSError as error:
        raise BadInput(f"{path}: no ledger to read here ({error.strerror})") from error


def read(path: Path) -> list[Row]:
    """Return what ``stream`` yields."""
    return list(stream(path))


def row_of(path: Path, line_number: int, line: bytes) -> Row:
    """Return the row that a line of the ledger at ``path`` holds; BadInput for anything else."""
    try:
        return from_json(json.loads(line, object_hook=_untagged))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}, line {line_number}: not a row of a ledger ({error!r})") from error


def _legal(value: object) -> object:
    """Return ``value`` with every NaN and infinity as a tagged text, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: repr(float(value))}
    if isinstance(value, Mapping):
        return {key: _legal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in value]
    return value


def _untagged(fields: dict[str, object]) -> object:
    """Return the float that ``fields`` stands for if it is a tagged one, else ``fields``."""
    return float(str(fields[_TAG])) if fields.keys() == {_TAG} else fields
