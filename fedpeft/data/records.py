"""A data file as records, each with its place: JSON or columns by its ending, plain or gzip."""

import gzip
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fedpeft.data.json_records import Located, json_records
from fedpeft.data.paths import readable
from fedpeft.data.separated import separated
from fedpeft.errors import BadInput

JSON = (".jsonl", ".ndjson", ".json")
SEPARATED = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*JSON, *SEPARATED)


def ending(path: Path) -> str:
    """Return which of the known endings ``path`` has, ``.gz`` left out; BadInput for another."""
    found = Path(path.name.lower().removesuffix(".gz")).suffix
    if found not in ENDINGS:
        known = ", ".join(ENDINGS) + ", each also with .gz"
        raise BadInput(f"{path}: unknown ending {path.suffix!r}; known are {known}")
    return found


def records(path: Path, columns: Collection[str], delimiter: str | None) -> Iterator[Located]:
    """Yield every record of ``path`` and where it stands, one at a time where the format allows.

    ``columns``: those that are wanted, which tell a header from data. ``delimiter``: what separates
    columns, None for what does so usually. Raises BadInput, with file and line, for damaged gzip,
    for bytes that are not UTF-8 and for what is not of the format.
    """
    found = ending(path)
    packed = path.suffix.lower() == ".gz"
    with readable(path), gzip.open(path) if packed else path.open("rb") as stream:
        lines = _lines(path, stream)
        if found in SEPARATED:
            yield from separated(path, lines, columns, delimiter, SEPARATED[found])
        else:
            yield from json_records(path, lines, columns)


def _lines(path: Path, stream: Iterable[bytes]) -> Iterator[str]:
    """Yield the decoded lines with their ends; a byte order mark is dropped."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found = f"{error.reason} at byte {error.start} of the line"
            raise BadInput(f"{path}:{number}: not UTF-8: {found}; save it as UTF-8") from error
