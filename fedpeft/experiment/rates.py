"""The file of picked rates: ``fedpeft tune`` writes it, ``fedpeft compare --rates`` reads it.

::

    task = "classification"
    optimizer = "adamw"
    metric = "accuracy"

    [work]
    "model.name" = "minilm"
    "federation.rounds" = 15

    [rates.slora]
    trials = 4
    rounds = 15
    score = 0.454
    training.lr = 0.003
    method.stage1_rate = 0.1
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, final, get_args

from annotated_types import Ge

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import Tree, checked, nearest
from fedpeft.experiment.config import Config, from_tree, merge, read
from fedpeft.experiment.sections import Reference
from fedpeft.methods import constructors
from fedpeft.wire.durable import write

FILE: Final = "rates.toml"
"""What the file is called in a folder of trials."""


@final
@dataclass(frozen=True)
class Picked:
    """What was picked for one method or yardstick, among ``trials`` that began.

    ``score``: of the best trial on the validation texts, after ``rounds`` rounds. ``training`` and
    ``method``: the fields that were tuned, as in a configuration.
    """

    trials: Annotated[int, Ge(1)]
    rounds: Annotated[int, Ge(1)]
    score: float
    training: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Rates:
    """All that was picked, by label, and what it holds for.

    ``work``: what the trials were of, as far as a rate depends on it, by dotted key; empty in files
    that do not tell.
    """

    task: str
    optimizer: str
    metric: str
    rates: dict[str, Picked] = field(default_factory=dict)
    work: dict[str, Any] = field(default_factory=dict)


def work_of(config: Config) -> dict[str, Any]:
    """Return what rates tuned with ``config`` were tuned for; None and paths are left out.

    >>> work_of(from_tree({}))["model.name"], work_of(from_tree({}))["federation.rounds"]
    ('minilm', 20)
    """
    data, partition = config.data, config.partition
    federation, training = config.federation, config.training
    work: dict[str, Any] = {
        "model.name": config.model.name,
        # Of a path the last part: the same data may lie elsewhere.
        "data.train": data.train.name if data.train else data.name or data.source,
        "partition.kind": partition.kind,
        "partition.clients": partition.clients,
        "partition.alpha": partition.alpha,
        "federation.rounds": federation.rounds,
        "federation.clients_per_round": federation.clients_per_round,
        "training.steps": training.steps,
        "training.epochs": training.epochs,
        "training.batch_size": training.batch_size,
        "training.head_lr": training.head_lr,
    }
    return {key: value for key, value in work.items() if value is not None}


def write_rates(path: Path, rates: Rates) -> None:
    """Write ``rates`` as a file that ``read_rates`` reads; BadInput where the disk refuses."""
    lines = [
        "# Picked by fedpeft tune on validation texts; for fedpeft compare --rates.",
        f"task = {_as_toml(rates.task)}",
        f"optimizer = {_as_toml(rates.optimizer)}",
        f"metric = {_as_toml(rates.metric)}",
    ]
    if rates.work:
        lines += ["", "[work]"]
    for key, value in rates.work.items():
        lines.append(f"{_as_toml(key)} = {_as_toml(value)}")
    for label, picked in rates.rates.items():
        lines += ["", f"[rates.{_key(label)}]"]
        for name in ("trials", "rounds", "score"):
            lines.append(f"{name} = {_as_toml(getattr(picked, name))}")
        for section, fields in (("training", picked.training), ("method", picked.method)):
            for name, value in fields.items():
                lines.append(f"{section}.{_key(name)} = {_as_toml(value)}")
    try:
        write(path, "\n".join([*lines, ""]).encode())
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from error


def read_rates(path: Path) -> Rates:
    """Return what is in a file of rates; BadInput, with its name, for what is none."""
    tree = read(path)
    try:
        return checked(Rates, tree, "")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def check_rates(path: Path, rates: Rates, config: Config, labels: Sequence[str]) -> None:
    """Raise BadInput where ``rates`` are of other work than ``config``, or name no method.

    ``labels``: the rows of the comparison, for hints.
    """
    for key, then, now in (
        ("task.kind", rates.task, config.task.kind),
        ("training.optimizer", rates.optimizer, config.training.optimizer),
    ):
        if then != now:
            raise BadInput(f"{path}: was tuned with {key} = {then!r}, and here it is {now!r}")
    known = {*labels, *constructors(), *get_args(Reference)}
    for label in rates.rates:
        if label not in known:
            raise BadInput(f"{path}: rates.{label} is not a method; {nearest(label, labels)}")


def picked_over(tree: Tree, path: Path, rates: Rates, label: str) -> Tree:
    """Return the settings of row ``label`` with what was picked for it laid over them.

    Rows for which nothing was picked come back as they are. BadInput where a field does not exist.
    """
    picked = rates.rates.get(label)
    if picked is None:
        return tree
    then, here = rates.work, work_of(from_tree(tree))
    # Of a file that does not tell nothing is known.
    other = [key for key in sorted(then | here) if then and then.get(key) != here.get(key)]
    source = {"trials": picked.trials, "source": f"{path.parent.name}/{path.name}", "other": other}
    merged = merge(tree, {"training": picked.training, "method": picked.method, "tuned": source})
    try:
        from_tree(merged)
    except BadInput as error:
        raise BadInput(f"{path}: rates.{label}: {error}") from error
    return merged


def _key(name: str) -> str:
    """Return a key of TOML, in quotes where it needs them."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _as_toml(name)


def _as_toml(value: object) -> str:
    """Return a number, a text or a truth as TOML writes it.

    >>> _as_toml(1e-05), _as_toml(float("nan")), _as_toml(True), _as_toml("a")
    ('1e-05', 'nan', 'true', '"a"')
    """
    # Python writes numbers as TOML does, nan and inf too; JSON's texts and truths are TOML's.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if is_number else json.dumps(value, ensure_ascii=False)
