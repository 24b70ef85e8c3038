"""A first configuration for a user's own data, which runs as it is.

Task and columns are found, and the numbers fit the data.
"""

import json
import math
import os
import re
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from fedpeft.data import Dataset
from fedpeft.errors import BadInput
from fedpeft.experiment import config
from fedpeft.experiment.checking import Tree
from fedpeft.experiment.columns import has_column
from fedpeft.experiment.drafts import DRAFTS, Draft, Found, find
from fedpeft.experiment.reading import divide, read_data
from fedpeft.experiment.sections import CLIENTS, FederationSection, PartitionSection
from fedpeft.tasks import TASKS

ROWS_PER_CLIENT: Final = 40
"""Training rows for each client, where there are that many: a few steps without repetition."""
TOKENS_PER_WORD: Final = 4 / 3
"""Tokens that tokenizers of English make of a word, roughly."""
LONGEST: Final = 256
"""Tokens beyond which a first try does not go, as the time of a step grows with them."""
COVERED: Final = 0.95
"""Share of the texts that are kept whole, unless they are longer than ``LONGEST``."""
SHOWN: Final = 8
"""Labels that are named, at most."""


def write_starter(
    path: Path, *, train: Path, test: Path | None, method: str, task: str | None = None
) -> list[str]:
    """Write a configuration for the data in ``train`` to ``path``; return lines for the user.

    Task and columns are found by the columns' usual names; those of texts and labels otherwise by
    what they hold. ``task``: the kind, where the user says so. Without ``test`` a part of train is
    held out. Raises BadInput where ``path`` exists, for files that cannot be used, without usable
    columns, where several tasks would do, and for an unknown method. Nothing is written before all
    of it has been tried.
    """
    # 1. Whatever can be refused before the data are read.
    if path.exists() or path.is_symlink():
        raise BadInput(f"{path}: exists, and is not overwritten; choose another name")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}")
    config.from_tree({"method": {"name": method}})

    # 2. The section ``data``. Paths in it start at the folder of the new file.
    found = find(train.expanduser(), task)
    folder = path.parent.absolute()
    data = {"source": "files", "train": _relative(train, folder)}
    if test is not None:
        data["test"] = _relative(test, folder)
    data |= found.roles
    if found.delimiter is not None:
        data["delimiter"] = found.delimiter
    # A test file without such a column could not be divided by it.
    for role, column in (("label", found.label), ("key", found.key)):
        if column is not None and (test is None or has_column(test, column, found.delimiter)):
            data[role] = column

    # 3. The whole file, whose numbers depend on the data. It is read back and tried in memory.
    tree = {"task": {"kind": found.task}, "data": dict(data)}
    dataset = read_data(config.from_tree(config.beside(tree, folder)))
    TASKS[found.task].names(dataset)  # BadInput where they make no task
    text = _toml(path, found, data, dataset, method)
    checked = config.from_tree(config.beside(tomllib.loads(text), folder))
    divide(checked, dataset)

    # 4. The file on the disk.
    try:
        with path.open("x", encoding="utf-8") as file:  # "x": another may have made it meanwhile
            file.write(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error
    return _summary(path, found, data, dataset, checked)


def _relative(path: Path, folder: Path) -> str:
    """Return ``path`` as seen from ``folder``, with slashes; in full where there is no such way."""
    full_path = path.expanduser().absolute()
    try:
        return Path(os.path.relpath(full_path, folder)).as_posix()
    except ValueError:  # on another drive
        return full_path.as_posix()


def max_length(texts: Collection[str], extra_tokens: int = 2) -> int:
    """Return how many tokens to keep of each of ``texts``, a multiple of 16, told from their words.

    ``extra_tokens``: those that a model puts around a text.

    >>> max_length(["one two three"] * 100), max_length(["word " * 60] * 100)
    (16, 96)
    """
    tokens = math.ceil(_words(texts, COVERED) * TOKENS_PER_WORD) + extra_tokens
    return min(LONGEST, 16 * math.ceil(tokens / 16))


def _words(texts: Collection[str], share: float) -> int:
    """Return the number of words that ``share`` of the texts do not exceed: their quantile."""
    lengths = sorted(len(text.split()) for text in texts)
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]


def _rates(draft: Draft, method: str) -> tuple[float | None, Tree]:
    """Return the learning rate and the fields of ``method`` that the task's demo chose."""
    demo = tomllib.loads((files("fedpeft") / draft.rates).read_text(encoding="utf-8"))
    chosen = demo["compare"]["settings"].get(method, {})
    return chosen.get("training", {}).get("lr"), chosen.get("method", {})


def _toml(path: Path, found: Found, data: Mapping[str, str], dataset: Dataset, method: str) -> str:
    """Return the text of the configuration.

    It holds the fields that differ from their defaults, and those that a user may well change.
    """
    draft = DRAFTS[found.task]
    clients = _clients(data, dataset)
    keys = len(set(dataset.train.keys)) or clients
    # It has to work with either partition of the file, the one in comments too.
    per_round = min(FederationSection.clients_per_round, clients, keys)
    texts = draft.texts(dataset.train)
    length, words = max_length(texts, draft.extra_tokens), _words(texts, COVERED)
    rate, method_fields = _rates(draft, method)
    name = path.stem if re.fullmatch(r"\w[\w .,=-]*", path.stem) else "run"
    columns = [f"{key} = {_quoted(value)}" for key, value in data.items()]
    if "test" not in data:
        columns.append(
            "# Without a test file, 20 % of the rows are held out; name one with: test = ..."
        )
    training = [] if rate is None else [f"lr = {rate}  # as for the demo: try others"]
    if draft.has_head:
        training.append("head_lr = 0.03")
    sections = {
        "task": [f"kind = {_quoted(found.task)}", *draft.settings(length)],
        "data": columns,
        "model": [
            draft.model,
            f"max_length = {length}  # tokens; 95 % of the texts have up to {words} words",
        ],
        "partition": _partition(_shared(found.task, data), data, dataset, clients, keys),
        "federation": [
            f"rounds = {FederationSection.rounds}",
            f"clients_per_round = {per_round}",
        ],
        "training": [
            *training,
            f"steps = {draft.steps}  # of a client in a round; left out: one pass over its texts",
            f"batch_size = {draft.batch_size}",
        ],
        "method": [
            f"name = {_quoted(method)}  # others: fedpeft methods",
            *(f"{key} = {value}" for key, value in method_fields.items()),
        ],
        "evaluation": draft.evaluation,
    }
    parts = [f"# Every field, explained: fedpeft config\nname = {_quoted(name)}  # of its folder\n"]
    for section, lines in sections.items():
        if lines:
            parts.append(f"[{section}]\n{_lines(lines)}")
    return "\n".join(parts)


def _clients(data: Mapping[str, str], dataset: Dataset) -> int:
    """Return how many clients the rows of train suffice for; BadInput where for none."""
    rows, least = len(dataset.train), PartitionSection.min_examples
    if rows < least:
        raise BadInput(
            f"{data['train']}: {rows} rows are left for training; a client needs {least} at least"
        )
    # With barely enough rows for two clients, hardly any draw of shares gives both their least.
    return 1 if rows <= 2 * least else min(CLIENTS, max(2, rows // ROWS_PER_CLIENT))


def _shared(task: str, data: Mapping[str, str]) -> str:
    """Return what clients have different shares of: labels of a column, or those of the task."""
    return "the labels" if "label" in data else DRAFTS[task].shared


def _partition(
    shared: str, data: Mapping[str, str], dataset: Dataset, clients: int, keys: int
) -> list[str]:
    """Return the lines of the section ``partition``: by labels where rows have any.

    ``shared``: what these are, in words.
    """
    lines = [
        'kind = "iid"  # clients that are alike; others: quantity, cluster, by_key, file',
        f"clients = {clients}",
    ]
    if dataset.train.labels:
        least = PartitionSection.min_examples
        lines = [
            f'kind = "dirichlet"  # clients with different shares of {shared}; others: iid, '
            "shards, by_key, file",
            f"clients = {clients}",
            "alpha = 0.1  # the smaller, the less alike the clients",
            f"min_examples = {least}  # training rows of every client, at least",
        ]
    if "key" in data:
        number = {2: "two", 4: "four"}[len(lines)]
        lines.insert(
            0,
            f'# kind = "by_key"  # instead of the next {number} lines: {keys} clients, one for '
            f"each {_quoted(data['key'])}",
        )
    return lines


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _quoted(value: str) -> str:
    """Return ``value`` as a string of TOML, on one line."""
    # Strings of JSON are strings of TOML, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _summary(
    path: Path, found: Found, data: Mapping[str, str], dataset: Dataset, checked: config.Config
) -> list[str]:
    """Return what was found, and how to go on, as lines for the user."""
    rows = f"{len(dataset.train)} rows to train on, {len(dataset.validation)} to choose by"
    columns = ", ".join(f"{role} from column {name!r}" for role, name in found.roles.items())
    lines = [
        f"{path}: written for {data['train']}: {rows}, {len(dataset.test)} to test on",
        f"task: {found.task}: {columns}; {checked.model.max_length} tokens of a text at most",
    ]
    clients = f"clients: {checked.partition.clients}"
    if dataset.labels:
        labels = [repr(label) for label in dataset.labels[:SHOWN]]
        if len(dataset.labels) > SHOWN:
            labels.append("...")
        shared = _shared(found.task, data)
        clients += f", with different shares of {shared}, {len(dataset.labels)} of them: "
        clients += ", ".join(labels)
    lines.append(clients)
    if "delimiter" in data:
        lines.append(f"columns are separated by {data['delimiter']!r}")
    if "key" in data:
        lines.append(f"column {data['key']!r} may name natural clients: see [partition] in {path}")
    name = shlex.quote(str(path))
    lines += ["go on with:", f"  fedpeft partition {name}", f"  fedpeft run {name}"]
    return lines
