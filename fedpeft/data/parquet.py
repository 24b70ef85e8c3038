"""Parquet, read by batches of rows through pyarrow."""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from fedpeft.data.class_names import Features, with_names
from fedpeft.data.json_records import Located
from fedpeft.data.unpacking import is_packed
from fedpeft.errors import BadInput

BATCH: Final = 1000
"""Rows that are in memory at once besides those that were read before."""


def parquet_records(path: Path, stream: IO[bytes], columns: Collection[str]) -> Iterator[Located]:
    """Yield the rows of a Parquet file; places are ``path: record 3``, from 1 on.

    ``columns``: those that are read, if the file has all of them; otherwise, and where there are
    none, all are. Numbers of classes become their names where the package ``datasets`` wrote these
    into the file.

    Raises BadInput without pyarrow, for what is not Parquet, and for two columns of one name.
    """
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow.parquet import ParquetFile  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(
            f"{path}: reading Parquet needs pyarrow; get it with: pip install 'fedpeft[data]'"
        ) from error
    with tempfile.TemporaryFile() as unpacked:
        if is_packed(path):
            # The format is read from its end, where no packed file can begin.
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            file = ParquetFile(stream)
            schema = file.schema_arrow
            _check_distinct(path, schema.names)
            wanted = list(columns) if columns and set(columns) <= set(schema.names) else None
            batches = file.iter_batches(batch_size=BATCH, columns=wanted)
            yield from with_names(rows_of(str(path), batches), _features(schema.metadata))
        except (pyarrow.ArrowException, OSError) as error:
            line = str(error).partition("\n")[0]
            raise BadInput(f"{path}: not Parquet: {line}") from error


def rows_of(where: str, batches: Iterable[Any]) -> Iterator[Located]:
    """Yield the rows of Arrow's batches or tables, numbered from 1 across all of them."""
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{where}: record {number}", record


def _check_distinct(path: Path, names: Collection[str]) -> None:
    """Raise BadInput where two columns have the same name."""
    if len(set(names)) < len(names):
        listed = ", ".join(map(repr, names))
        raise BadInput(f"{path}: two columns have the same name among {listed}")


def _features(metadata: Any) -> Features:
    """Return what the package ``datasets`` says of the columns; nothing where it did not write."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}
