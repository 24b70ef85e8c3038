"""The ledger's file: one JSON line per row, appended as a run goes, cut back when it resumes, read by reports."""

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

_TAG = "$float"


@final
class Ledger:
    """A ledger open for writing. Rows are buffered; only ``sync`` makes them durable.

    Opening creates the file or goes on at its end. A crash may have left half a row there, so a
    resumed run calls ``cut`` with the length its checkpoint recorded before it appends. I/O errors
    (a full disk) are raised as OSError.
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
        """Make every row so far durable and return the file's length in bytes, for a checkpoint's manifest."""
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
                f"{self._path}: has {size} bytes, but the checkpoint was written when it had {length}"
            )
        self._file.truncate(length)
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

    A last line without its newline is what a crash leaves: it is no row yet and is ignored. Raises
    BadInput when the file cannot be read, and with file and line number when any other line is not
    a row.
    """
    try:
        with path.open("rb") as lines:
            yield from (
                _row(path, number, line)
                for number, line in enumerate(lines, 1)
                if line.endswith(b"\n")
            )
    except OSError as error:
        raise BadInput(f"{path}: no ledger to read here ({error.strerror})") from error


def read(path: Path) -> list[Row]:
    """Return what ``stream`` yields."""
    return list(stream(path))


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        return from_json(json.loads(line, object_hook=_untagged))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}, line {number}: not a row of a ledger ({error!r})") from error


def _legal(value: object) -> object:
    """Return ``value`` with every float that JSON lacks as a tagged text, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: repr(float(value))}
    if isinstance(value, Mapping):
        return {key: _legal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in value]
    return value


def _untagged(fields: dict[str, object]) -> object:
    return float(str(fields[_TAG])) if fields.keys() == {_TAG} else fields
