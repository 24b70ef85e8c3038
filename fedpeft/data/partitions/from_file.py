"""A partition that a file gives: JSON of client name -> row numbers."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedpeft.data.partitions.partition import Partition, ascending
from fedpeft.data.paths import existing, readable
from fedpeft.data.rows import Dataset
from fedpeft.errors import BadInput

_REMEDY = "to keep them, name files of their own in data.validation and data.test"


def from_file(dataset: Dataset, path: Path) -> Partition:
    """Read a JSON object of client name -> row numbers; rows left out are not used.

    The numbers count the rows of train's original file, from 0. A row that is held out of it for
    validation or test is taken from its client, and a client that has no row left is left out;
    notes say so. Clients are in the order of the file and hold no test rows.

    Raises BadInput for a missing file, other JSON, no client, a client without rows or named twice,
    a row that train does not have or that occurs twice, and where no client has a row left.
    """
    try:
        with readable(path):
            # Objects as tuples of (name, value): a dict would hide a client that is named twice.
            clients = json.loads(existing(path).read_bytes(), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    if not isinstance(clients, tuple) or not clients:
        raise BadInput(
            f"{path}: must hold a JSON object of client names and row numbers, "
            'as {"anna": [0, 1]}'
        )
    # Numbers in train's file -> rows of what is left of it once rows are held out.
    file_numbers = dataset.train.numbers or range(len(dataset.train))
    row_of = {file_number: row for row, file_number in enumerate(file_numbers)}
    held_out = len(dataset.validation.numbers) + len(dataset.test.numbers)
    file_length = len(file_numbers) + held_out
    holder: dict[int, str] = {}  # number in the file -> client
    client_rows: dict[str, list[int]] = {}
    for name, value in clients:
        if name in client_rows:
            raise BadInput(f"{path}: client {name!r} is named twice")
        client_rows[name] = []
        for file_number in _checked_numbers(path, name, value, file_length, holder):
            if file_number in row_of:
                client_rows[name].append(row_of[file_number])
    # Leave out the clients whose rows were all held out.
    emptied = [name for name, rows in client_rows.items() if not rows]
    for name in emptied:
        del client_rows[name]
    if not client_rows:
        raise BadInput(f"{path}: all of its rows are held out of train; {_REMEDY}")
    train = [np.array(rows, dtype=np.int64) for rows in client_rows.values()]
    lost = len(holder.keys() - row_of.keys())
    notes = _notes(path, lost, len(holder), emptied)
    return replace(ascending(train, names=list(client_rows)), notes=notes)


def _checked_numbers(
    path: Path, name: str, rows: object, examples: int, holder: dict[int, str]
) -> list[int]:
    """Return a client's row numbers, checked, and enter them in ``holder`` (row -> client).

    ``rows``: the client's value in the file, which may be anything.
    """
    if not isinstance(rows, list) or not rows:
        raise BadInput(
            f"{path}: client {name!r} must hold a list of at least one row number, not {rows!r:.40}"
        )
    for row in rows:
        # Not isinstance, by which JSON's true would be row 1.
        if type(row) is not int or not 0 <= row < examples:
            raise BadInput(
                f"{path}: client {name!r} holds row {row!r}, but train has rows 0 to {examples - 1}"
            )
        if row in holder:
            raise BadInput(f"{path}: row {row} is held by {holder[row]!r} and by {name!r}")
        holder[row] = name
    return rows


def _notes(path: Path, lost: int, named: int, emptied: Sequence[str]) -> tuple[str, ...]:
    """Return the notes on a file of clients.

    ``lost``: how many of its ``named`` rows are held out. ``emptied``: clients without a row left.
    """
    if not lost:
        return ()
    what = f"{lost} of its {named} rows are held out of train and leave their clients"
    notes = [f"{path}: {what}; {_REMEDY}"]
    if emptied:
        few = ", ".join(map(repr, emptied[:3])) + (", ..." if len(emptied) > 3 else "")
        notes.append(f"{path}: without a row left and left out: {len(emptied)} clients ({few})")
    return tuple(notes)
