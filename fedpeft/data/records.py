"""A data file as records with their places; its ending tells the format."""

from collections.abc import Collection, Iterator
from pathlib import Path

from fedpeft.data.conll import conll_records
from fedpeft.data.json_records import Located, json_records
from fedpeft.data.parquet import parquet_records
from fedpeft.data.paths import readable
from fedpeft.data.separated import separated
from fedpeft.data.squad import questions
from fedpeft.data.text_folder import TEXT, folder_records
from fedpeft.data.unpacking import PACKED, decoded, decoded_parts, opened, unpacked_name
from fedpeft.errors import BadInput

JSON = (".jsonl", ".ndjson", ".json")
SEPARATED = {".csv": ",", ".tsv": "\t"}
CONLL = (".conll", ".bio", ".iob")
PARQUET = ".parquet"
ENDINGS = (*JSON, *SEPARATED, PARQUET, *CONLL)

_HINTS = {
    TEXT: f"; of texts in {TEXT} name the folder, which holds a folder for each label, "
    "and give columns of words and tags the ending .conll"
}
"""Ending that is none of a format -> what may be meant."""


def ending(path: Path) -> str:
    """Return the ending of ``path`` without that of its packing; BadInput for an unknown one."""
    suffix = Path(unpacked_name(path)).suffix
    if suffix not in ENDINGS:
        known = ", ".join(ENDINGS) + f", each also with {' or '.join(PACKED)}"
        hint = _HINTS.get(suffix, "")
        raise BadInput(f"{path}: unknown ending {path.suffix!r}; known are {known}{hint}")
    return suffix


def records(
    path: Path, columns: Collection[str], delimiter: str | None, *, only_these: bool = False
) -> Iterator[Located]:
    """Yield every record of ``path`` with its place, one at a time where the format allows that.

    A folder is one of texts. ``columns``: those that are wanted; they help to tell a header from
    data, and with ``only_these`` others need not be read. ``delimiter``: the character between
    columns, None for the usual one. Raises BadInput, with file and line, for damaged gzip or zstd,
    for bytes that are not UTF-8, for what is not of the format, and where the format needs a
    package that is not installed.
    """
    if path.is_dir():
        yield from folder_records(path)
        return
    suffix = ending(path)
    with readable(path), opened(path) as stream:
        lines = decoded(path, stream)
        if suffix in SEPARATED:
            yield from separated(path, lines, columns, delimiter, SEPARATED[suffix])
        elif suffix == PARQUET:
            yield from parquet_records(path, stream, columns if only_these else ())
        elif suffix in CONLL:
            yield from conll_records(path, lines, delimiter)
        else:
            yield from questions(json_records(path, decoded_parts(path, stream), columns))
