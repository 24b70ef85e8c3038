"""A first configuration for a user's own texts, which runs as it is.

The columns of texts and labels are found, and the numbers fit the data.
"""

import json
import math
import os
import re
import shlex
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Final, final

from fedpeft.data import Dataset
from fedpeft.data.paths import matching
from fedpeft.data.records import SEPARATED, ending, records
from fedpeft.data.separated import MARKS
from fedpeft.errors import BadInput
from fedpeft.experiment import config
from fedpeft.experiment.checking import Tree
from fedpeft.experiment.reading import divide, read_data
from fedpeft.experiment.sections import CLIENTS, FederationSection, PartitionSection

TEXTS: Final = ("text", "sentence", "content", "review", "question")
"""What columns of texts are usually called, the likeliest first."""
LABELS: Final = ("label", "category", "class", "target", "intent")
"""What columns of labels are usually called, the likeliest first."""
KEYS: Final = ("client", "user", "site", "author", "speaker")
"""What columns of natural clients are usually called, also with ``_id`` or ``id`` at the end."""

ROWS_PER_CLIENT: Final = 40
"""Training rows for each client, where there are that many: a few steps without repetition."""
TOKENS_PER_WORD: Final = 4 / 3
"""Tokens that tokenizers of English make of a word, roughly."""
FRAME: Final = 2
"""Tokens that a model puts around a text."""
LONGEST: Final = 256
"""Tokens beyond which a first try does not go, as the time of a step grows with them."""
COVERED: Final = 0.95
"""Share of the texts that are kept whole, unless they are longer than ``LONGEST``."""
SHOWN: Final = 8
"""Labels that are named, at most."""


@final
@dataclass
class Column:
    """What a column holds, over all records.

    ``rows``: records that have it. ``only_names``: whether every value can name a class or client.
    ``characters``: of all its texts together. ``different``: its distinct values, as texts.
    """

    name: str
    rows: int = 0
    only_strings: bool = True
    only_names: bool = True
    characters: int = 0
    different: set[str] = field(default_factory=set)

    def add(self, value: object) -> None:
        """Take in the value of one more record."""
        self.rows += 1
        match value:
            case str():
                self.characters += len(value)
                self.only_names &= bool(value.strip())  # a blank names nothing
                self.different.add(value)
            case bool() | int() | float() if math.isfinite(value):
                self.only_strings = False
                self.different.add(json.dumps(value))
            case _:  # null, nan, a list, an object
                self.only_strings = self.only_names = False

    def fault(self, rows: int, most: float) -> str:
        """Return why the column cannot name classes or clients; empty where it can.

        ``rows``: of the file. ``most``: different names at most.
        """
        if self.rows < rows or not self.only_names:
            return "not a name in every row"
        if len(self.different) < 2:
            return "one value"
        return f"{len(self.different)} different values" if len(self.different) > most else ""


@final
@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read, and how."""

    text: str
    label: str
    key: str | None
    delimiter: str | None


def write_starter(path: Path, *, train: Path, test: Path | None, method: str) -> list[str]:
    """Write a configuration for the texts in ``train`` to ``path``; return lines for the user.

    The columns of texts and labels are found by their usual names, and otherwise by what they hold:
    the longest texts, and the fewest different values. Without ``test`` a part of train is held
    out. Raises BadInput where ``path`` exists, for files that cannot be used, without a usable
    column of labels, and for an unknown method. Nothing is written before all of it has been tried.
    """
    # 1. Whatever can be refused before the data are read.
    if path.exists() or path.is_symlink():
        raise BadInput(f"{path}: exists, and is not overwritten; choose another name")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}")
    config.from_tree({"method": {"name": method}})

    # 2. The section ``data``. Paths in it start at the folder of the new file.
    columns = find_columns(train.expanduser())
    folder = path.parent.absolute()
    data = {"source": "files", "train": _relative(train, folder)}
    if test is not None:
        data["test"] = _relative(test, folder)
    data |= {"text": columns.text, "label": columns.label}
    if columns.delimiter is not None:
        data["delimiter"] = columns.delimiter
    # A test file without the column of clients could not be divided by it.
    if columns.key is not None and (test is None or _has(test, columns.key, columns.delimiter)):
        data["key"] = columns.key

    # 3. The whole file, whose numbers depend on the data. It is read back and tried in memory.
    dataset = read_data(config.from_tree(config.beside({"data": dict(data)}, folder)))
    text = _toml(path, data, dataset, method)
    checked = config.from_tree(config.beside(tomllib.loads(text), folder))
    divide(checked, dataset)

    # 4. The file on the disk.
    try:
        with path.open("x", encoding="utf-8") as file:  # "x": another may have made it meanwhile
            file.write(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    return _summary(path, data, dataset, checked)


def find_columns(train: Path) -> Columns:
    """Return the columns of texts, labels and natural clients in ``train``, a file or a pattern.

    Raises BadInput for files that cannot be read and where there is no column of texts or labels.
    """
    columns, delimiter = _profiled(train)
    rows = max((column.rows for column in columns), default=0)
    text = _text_column(train, columns, rows)
    key: Column | None = None
    others: list[Column] = []
    for column in columns:
        if column is text:
            continue
        if key is None and _is_key(column, rows):  # the first that can be
            key = column
        else:
            others.append(column)
    label = _label_column(train, others, rows)
    return Columns(text.name, label.name, None if key is None else key.name, delimiter)


def _has(path: Path, name: str, delimiter: str | None) -> bool:
    """Return whether the files of ``path`` have a column called ``name``."""
    columns = _columns(matching(path.expanduser()), delimiter)
    return any(column.name == name for column in columns)


def _profiled(train: Path) -> tuple[list[Column], str | None]:
    """Return the columns of ``train``, and the delimiter where it is not the usual one."""
    paths = matching(train)
    try:
        return _columns(paths, None), None
    except BadInput:
        # Another delimiter may do. Where it does not, the first error is the one to report.
        if paths[0].is_dir() or not all(ending(path) in SEPARATED for path in paths):
            raise
        for mark in MARKS:
            try:
                columns = _columns(paths, mark)
            except BadInput:
                continue
            if len(columns) > 1:  # else ``mark`` does not occur
                return columns, "tab" if mark == "\t" else mark
        raise


def _columns(paths: Iterable[Path], delimiter: str | None) -> list[Column]:
    """Return the columns of all records in ``paths``."""
    columns: dict[str, Column] = {}
    for path in paths:
        # The usual names tell a header from data, and a record from an object that holds records.
        for _, record in records(path, (TEXTS[0], LABELS[0]), delimiter):
            for name, value in record.items():
                columns.setdefault(name, Column(name)).add(value)
    return list(columns.values())


def _text_column(train: Path, columns: Sequence[Column], rows: int) -> Column:
    """Return the column of texts: by its usual name, or else the one with the longest."""
    texts = [column for column in columns if column.only_strings and column.rows == rows]
    if not texts:
        names = ", ".join(repr(column.name) for column in columns) or "none"
        raise BadInput(f"{train}: no column holds a text in every row; its columns are {names}")
    return _usual(texts, TEXTS) or max(texts, key=lambda column: column.characters)


def _label_column(train: Path, columns: Sequence[Column], rows: int) -> Column:
    """Return the column of labels: by its usual name, or else the one with the fewest values.

    A column of that name that cannot be used is not passed over for another.
    """
    named = [column for column in columns if _normalized(column.name) in LABELS]
    # A label by another name should come twice, on average: else it may well be the row's number.
    most = rows - 1 if named else rows / 2
    usable: list[Column] = []
    faults: list[str] = []
    for column in named or columns:
        fault = column.fault(rows, most)
        if fault:
            faults.append(f"{column.name!r} ({fault})")
        else:
            usable.append(column)
    if not usable:
        shown = ", ".join(faults) or "none"
        raise BadInput(
            f"{train}: no column can be the labels, of which there must be two or more, "
            f"a few in all {rows} rows; the columns beside the texts are {shown}"
        )
    return _usual(usable, LABELS) or min(usable, key=lambda column: len(column.different))


def _usual(columns: Sequence[Column], names: Sequence[str]) -> Column | None:
    """Return the column with the likeliest of the usual ``names``."""
    for name in names:
        for column in columns:
            if _normalized(column.name) == name:
                return column
    return None


def _normalized(name: str) -> str:
    return name.strip().lower()


def _is_key(column: Column, rows: int) -> bool:
    """Return whether a column seems to name natural clients."""
    name = re.sub(r"[ _-]?id$", "", _normalized(column.name))  # user_id, user-id, userid -> user
    return name in KEYS and not column.fault(rows, rows / 2)


def _relative(path: Path, folder: Path) -> str:
    """Return ``path`` as seen from ``folder``, with slashes; in full where there is no such way."""
    full_path = path.expanduser().absolute()
    try:
        return Path(os.path.relpath(full_path, folder)).as_posix()
    except ValueError:  # on another drive
        return full_path.as_posix()


def max_length(texts: Collection[str]) -> int:
    """Return how many tokens to keep of each of ``texts``, a multiple of 16, told from their words.

    >>> max_length(["one two three"] * 100), max_length(["word " * 60] * 100)
    (16, 96)
    """
    tokens = math.ceil(_words(texts, COVERED) * TOKENS_PER_WORD) + FRAME
    return min(LONGEST, 16 * math.ceil(tokens / 16))


def _words(texts: Collection[str], share: float) -> int:
    """Return the number of words that ``share`` of the texts do not exceed: their quantile."""
    lengths = sorted(len(text.split()) for text in texts)
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]


def _rates(method: str) -> tuple[float | None, Tree]:
    """Return the learning rate and the fields of ``method`` that the demo's sweep chose."""
    demo = tomllib.loads((files("fedpeft") / "demo.toml").read_text(encoding="utf-8"))
    chosen = demo["compare"]["settings"].get(method, {})
    return chosen.get("training", {}).get("lr"), chosen.get("method", {})


def _toml(path: Path, data: Mapping[str, str], dataset: Dataset, method: str) -> str:
    """Return the text of the configuration.

    It holds the fields that differ from their defaults, and those that a user may well change.
    """
    rows, least = len(dataset.train), PartitionSection.min_examples
    if rows < least:
        raise BadInput(
            f"{data['train']}: {rows} rows are left for training; a client needs {least} at least"
        )
    # With barely enough rows for two clients, hardly any draw of shares gives both their least.
    clients = 1 if rows <= 2 * least else min(CLIENTS, max(2, rows // ROWS_PER_CLIENT))
    keys = len(set(dataset.train.keys)) or clients
    # It has to work with either partition of the file, the one in comments too.
    per_round = min(FederationSection.clients_per_round, clients, keys)
    name = path.stem if re.fullmatch(r"\w[\w .,=-]*", path.stem) else "run"
    lines = [f"{key} = {_quoted(value)}" for key, value in data.items()]
    if "test" not in data:
        lines.append(
            "# Without a test file, 20 % of the rows are held out; name one with: test = ..."
        )
    partition = []
    if "key" in data:
        partition.append(
            f'# kind = "by_key"  # instead of the next four lines: {keys} clients, one for each '
            f"{_quoted(data['key'])}"
        )
    words = _words(dataset.train.texts, COVERED)
    rate, method_fields = _rates(method)
    training = [] if rate is None else [f"lr = {rate}  # as a sweep chose for the demo: try others"]
    fields = [f"{key} = {value}" for key, value in method_fields.items()]
    return f"""\
# Every field, explained: fedpeft config
name = {_quoted(name)}  # of the run's folder

[data]
{_lines(lines)}
[model]
name = "minilm"  # or a local folder, or an id on the Hugging Face hub
max_length = {max_length(dataset.train.texts)}  # tokens; 95 % of the texts have up to {words} words

[partition]
{_lines(partition)}\
kind = "dirichlet"  # clients with different shares of the labels; others: iid, shards, by_key, file
clients = {clients}
alpha = 0.1  # the smaller, the less alike the clients
min_examples = {least}  # training rows of every client, at least

[federation]
rounds = {FederationSection.rounds}
clients_per_round = {per_round}

[training]
{_lines(training)}\
head_lr = 0.03
steps = 4  # of a client in a round; left out: one pass over its texts
batch_size = 16

[method]
name = {_quoted(method)}  # others: fedpeft methods
{_lines(fields)}"""


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _quoted(value: str) -> str:
    """Return ``value`` as a string of TOML, on one line."""
    # Strings of JSON are strings of TOML, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _summary(
    path: Path, data: Mapping[str, str], dataset: Dataset, checked: config.Config
) -> list[str]:
    """Return what was found, and how to go on, as lines for the user."""
    labels = [repr(label) for label in dataset.labels[:SHOWN]]
    if len(dataset.labels) > SHOWN:
        labels.append("...")
    rows = f"{len(dataset.train)} rows to train on, {len(dataset.validation)} to choose by"
    lines = [
        f"{path}: written for {data['train']}: {rows}, {len(dataset.test)} to test on",
        f"texts: column {data['text']!r}, the first {checked.model.max_length} tokens of each",
        f"labels: column {data['label']!r}, {len(dataset.labels)} of them: {', '.join(labels)}",
        f"clients: {checked.partition.clients}, with different shares of the labels",
    ]
    if "delimiter" in data:
        lines.append(f"columns are separated by {data['delimiter']!r}")
    if "key" in data:
        lines.append(f"column {data['key']!r} may name natural clients: see [partition] in {path}")
    name = shlex.quote(str(path))
    lines += ["go on with:", f"  fedpeft partition {name}", f"  fedpeft run {name}"]
    return lines
