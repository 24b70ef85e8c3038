"""A data file as records with their places; its ending tells the format: JSON or columns."""

import gzip
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fedpeft.data.json_records import Located, json_records
from fedpeft.data.paths import readable
from fedpeft.data.separated import separated
from fedpeft.data.squad import questions
from fedpeft.errors import BadInput

JSON = (".jsonl", ".ndjson", ".json")
SEPARATED = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*JSON, *SEPARATED)


def ending(path: Path) -> str:
    """Return the ending of ``path`` without ``.gz``; BadInput for one that is not known."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in ENDINGS:
        known = ", ".join(ENDINGS) + ", each also with .gz"
        raise BadInput(f"{path}: unknown ending {path.suffix!r}; known are {known}")
    return suffix


def records(path: Path, columns: Collection[str], delimiter: str | None) -> Iterator[Located]:
    """Yield every record of ``path`` with its place, one at a time where the format allows that.

    ``columns``: those that are wanted; they help to tell a header from data. ``delimiter``: the
    character between columns, None for the usual one. Raises BadInput, with file and line, for
    damaged gzip, for bytes that are not UTF-8 and for what is not of the format.
    """
    suffix = ending(path)
    packed = path.suffix.lower() == ".gz"
    with readable(path), gzip.open(path) if packed else path.open("rb") as stream:
        lines = _lines(path, stream)
        if suffix in SEPARATED:
            yield from separated(path, lines, columns, delimiter, SEPARATED[suffix])
        else:
            yield from questions(json_records(path, lines, columns))


def _lines(path: Path, stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the decoded lines with their ends; a byte order mark is dropped."""
    # Decoded line by line, so that an error can name the line.
    for line_number, line in enumerate(stream, 1):
        encoding = "utf-8-sig" if line_number == 1 else "utf-8"
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            fault = f"{error.reason} at byte {error.start} of the line"
            raise BadInput(f"{path}:{line_number}: not UTF-8: {fault}; save it as UTF-8") from error
