"""Partitions: the ways of dividing a data set among clients."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.dirichlet import counts, shares
from fedpeft.data.integers import ordered
from fedpeft.data.paths import existing, readable
from fedpeft.data.rows import Dataset, Rows
from fedpeft.errors import BadInput
from fedpeft.seeds import derive

Indices = NDArray[np.int64]

_REMEDY = "to keep them, name files of their own in data.validation and data.test"


@dataclass(frozen=True, eq=False)
class Partition:
    """The rows of each client.

    ``train[k]`` and ``test[k]``: ascending row numbers of client k; ``names[k]``: its name.
    ``test`` is for scores per client and may be empty for some. ``notes``: what the user should
    know about the partition, a line each.
    """

    train: tuple[Indices, ...]
    test: tuple[Indices, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return 16 hex digits of the SHA-256 of who holds what.

        Equal digests mean equal partitions; the clients' names do not matter.
        """
        hashed = sha256()
        for rows in (*self.train, *self.test):
            # The length first: rows must not count as those of the next client.
            hashed.update(len(rows).to_bytes(8, "little"))
            hashed.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
        return hashed.hexdigest()[:16]


def iid(dataset: Dataset, clients: int, seed: int) -> Partition:
    """Shuffle the rows and deal them evenly: sizes differ by one at most, in train and in test.

    Raises BadInput for fewer than one client and for more than train has examples.
    """
    _check(dataset, clients)
    rng = np.random.default_rng(derive(seed, "iid"))
    train = np.array_split(rng.permutation(len(dataset.train)), clients)
    test = np.array_split(rng.permutation(len(dataset.test)), clients)
    return _partition(train, test)


def dirichlet(
    dataset: Dataset, clients: int, seed: int, *, alpha: float, min_examples: int = 1
) -> Partition:
    """Deal each label's rows, of train and of test, by shares drawn from Dir(alpha) over clients.

    The smaller ``alpha``, the fewer clients hold most of a label. The law is the same as of
    redrawing until every client has ``min_examples`` train rows (see ``dirichlet.py``). Source:
    Yurochkin et al. 2019, section 4. Hsu et al. 2019 draw the labels of each client instead.

    Raises BadInput for a number out of range, or so extreme that no draw gives every client
    ``min_examples``.
    """
    _check(dataset, clients, "min_examples", min_examples)
    if not 0.001 <= alpha < np.inf:  # smaller Gamma numbers vanish in float64
        raise BadInput(f"partition.alpha = {alpha}: must be a number from 0.001 up, as 0.1 or 1.0")
    train = _codes(dataset.train, dataset.labels)
    test = _codes(dataset.test, dataset.labels)
    # One draw, (labels, clients), for both splits: a client's test rows have its own mix of labels.
    share = shares(np.bincount(train), clients, alpha, min_examples, seed)
    rng = np.random.default_rng(derive(seed, "dirichlet", "rows"))
    return _partition(_deal(train, share, rng), _deal(test, share, rng))


def shards(dataset: Dataset, clients: int, seed: int, *, shards_per_client: int = 2) -> Partition:
    """Sort train by label, cut it into equal shards and deal each client a few of them at random.

    So a client sees few labels. Of each label, a client's share of the test rows is its share of
    the train rows. Source: McMahan et al. 2017, section 3 (the "pathological non-IID partition").

    Raises BadInput for a number out of range and for more shards than train has examples.
    """
    _check(dataset, clients, "shards_per_client", shards_per_client)
    rng = np.random.default_rng(derive(seed, "shards"))
    shuffled = rng.permutation(len(dataset.train))
    codes = _codes(dataset.train, dataset.labels)[shuffled]
    by_label = shuffled[np.argsort(codes, kind="stable")]  # shuffled within each label
    shard_rows = np.array_split(by_label, clients * shards_per_client)
    dealt = rng.permutation(len(shard_rows)).reshape(clients, shards_per_client)
    train: list[Indices] = []
    for shards_of_client in dealt:
        train.append(np.concatenate([shard_rows[shard] for shard in shards_of_client]))
    held = label_counts(dataset.train, _partition(train, []))  # (clients, labels)
    share = (held / held.sum(axis=0)).T  # (labels, clients), rows sum to 1
    test = _deal(_codes(dataset.test, dataset.labels), share, rng)
    return _partition(train, test)


def by_key(dataset: Dataset, clients: int | None = None) -> Partition:
    """Make each distinct key of train a client with that key's rows of train and of test.

    With ``clients``, the keys with the most train rows are kept (the first by name among equals)
    and the rows of all others are not used. Clients are in the order of their names.

    Raises BadInput when the data has no keys, or fewer than ``clients``.
    """
    rows = Counter(dataset.train.keys)
    if not rows:
        raise BadInput(
            "partition.kind = 'by_key': the data has no keys; "
            "name the column that holds them in data.key"
        )
    if clients is not None and not 1 <= clients <= len(rows):
        raise BadInput(
            f"partition.clients = {clients}: train has {len(rows)} keys; "
            f"choose 1 to {len(rows)} clients"
        )
    # Not Counter.most_common: among equals it depends on the order of the rows.
    largest_first = sorted(rows, key=lambda name: (-rows[name], name))
    names = sorted(largest_first[:clients])
    return _partition(_holding(dataset.train, names), _holding(dataset.test, names), names)


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
    return replace(_partition(train, [], list(client_rows)), notes=notes)


def label_counts(rows: Rows, partition: Partition) -> Indices:
    """Return how many train rows of each label each client holds, (clients, labels).

    Labels are sorted as by ``ordered``.
    """
    labels = ordered(rows.labels)
    codes = _codes(rows, labels)
    counts_by_client: list[Indices] = []
    for client_rows in partition.train:
        counts_by_client.append(np.bincount(codes[client_rows], minlength=len(labels)))
    return np.stack(counts_by_client)


def _check(dataset: Dataset, clients: int, field: str = "clients", each: int = 1) -> None:
    """Raise BadInput for numbers below 1 and for more clients than train has rows for.

    ``field``: the setting that says how many rows, or shards, every client needs; ``each``: its
    value.
    """
    examples = len(dataset.train)
    if clients < 1 or each < 1:
        name, value = ("clients", clients) if clients < 1 else (field, each)
        raise BadInput(f"partition.{name} = {value}: must be 1 or more")
    if clients > examples:
        raise BadInput(
            f"partition.clients = {clients}: train has only {examples} examples; "
            f"at most {examples} clients"
        )
    if clients * each > examples:
        most = examples // clients
        raise BadInput(
            f"partition.{field} = {each}: train has only {examples} examples "
            f"for {clients} clients; at most {most} each"
        )


def _partition(
    train: Sequence[Indices], test: Sequence[Indices], names: Sequence[str] = ()
) -> Partition:
    """Return the partition with the rows of every client sorted.

    Without ``test``, no client has test rows; without ``names``, the clients are numbered.
    """
    if not test:
        test = [np.empty(0, dtype=np.int64)] * len(train)
    if not names:
        names = [f"client {client}" for client in range(len(train))]
    return Partition(tuple(map(np.sort, train)), tuple(map(np.sort, test)), tuple(names))


def _codes(rows: Rows, labels: Sequence[str]) -> Indices:
    """Return the position of each row's label in ``labels``, (rows,)."""
    code_of = {label: code for code, label in enumerate(labels)}
    return np.array([code_of[label] for label in rows.labels], dtype=np.int64)


def _deal(codes: Indices, share: NDArray[np.float64], rng: np.random.Generator) -> list[Indices]:
    """Shuffle the rows of each label, deal them by ``share`` and return the rows of each client.

    ``codes``: the label of every row, (rows,). ``share``: (labels, clients).
    """
    clients = share.shape[1]
    pieces: list[list[Indices]] = [[] for _ in range(clients)]
    sizes = np.bincount(codes, minlength=len(share))
    for label, counts_of_label in enumerate(counts(share, sizes)):
        rows = rng.permutation(np.flatnonzero(codes == label))
        # ``np.split`` wants the inner borders; the last piece goes to the end.
        cuts = np.cumsum(counts_of_label)[:-1]
        for client, piece in enumerate(np.split(rows, cuts)):
            pieces[client].append(piece)
    return [np.concatenate(client_pieces) for client_pieces in pieces]


def _holding(split: Rows, names: Iterable[str]) -> list[Indices]:
    """Return, for each name, the rows of ``split`` that have it as their key."""
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, key in enumerate(split.keys):
        if key in rows:
            rows[key].append(row)
    return [np.array(client_rows, dtype=np.int64) for client_rows in rows.values()]


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
