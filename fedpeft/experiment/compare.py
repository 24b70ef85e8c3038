"""Many runs from one configuration: every method with every seed, or every value of a sweep; each in a folder of its own."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, final, get_args

from fedpeft.errors import BadInput
from fedpeft.experiment.build import divide, read_data
from fedpeft.experiment.checking import Tree, nearest
from fedpeft.experiment.config import METHOD, Config, from_tree, merge, nested
from fedpeft.experiment.sections import CLIENTS, CompareSection, Reference
from fedpeft.methods import constructors

SETTLED: Final = ("name", "label", "reference", "seed", "compare")
"""Fields that ``[compare.settings.<label>]`` cannot set, as the comparison itself does."""


@final
@dataclass(frozen=True)
class Planned:
    """One run to be: what to call it, and its settings."""

    label: str
    config: Config

    def folder(self, root: Path) -> Path:
        """Return where it goes under ``root``, by a name that any system takes for a folder."""
        name = re.sub(r'[\s\\/:*?"<>|]', "-", self.label)
        return root / f"{name}-s{self.config.seed}"


def plan(tree: Tree) -> list[Planned]:
    """Return the runs of a comparison: methods, then references, for every seed; all settings are checked here."""
    rows, seeds = _rows(tree), from_tree(tree).compare.seeds
    return [
        Planned(label, _alone(merge(settings, {"label": label, "seed": seed})))
        for seed in seeds
        for label, settings in rows
    ]


def grid(tree: Tree, values: Mapping[str, Sequence[Any]], methods: bool) -> list[Planned]:
    """Return the runs of a sweep, scored on validation: every combination of ``values``, dotted key -> values.

    With ``methods`` it is made for each method of the comparison, on that method's settings.
    """
    for key, tried in values.items():
        if key in ("name", "label", "reference", "evaluation.split") or key.startswith("compare."):
            raise BadInput(f"{key}: the sweep itself settles that; sweep another field")
        if any(value in tried[:number] for number, value in enumerate(tried)):
            raise BadInput(f"{key} = {', '.join(map(str, tried))}: name each value once")
    planned = []
    for label, settings in _rows(tree) if methods else [("", tree)]:
        for chosen in itertools.product(*values.values()):
            pairs = dict(zip(values, chosen, strict=True))
            name = " ".join(
                [*filter(None, [label]), *(f"{key}={value}" for key, value in pairs.items())]
            )
            overrides = [nested(key, value) for key, value in pairs.items()]
            scored = {"label": name, "evaluation": {"split": "validation"}}
            try:
                config = _alone(merge(settings, *overrides, scored))
            except BadInput as error:
                raise BadInput(f"{label}: {error}" if label else str(error)) from error
            planned.append(Planned(name, config))
    _check_apart(planned)
    return planned


def _check_apart(planned: Sequence[Planned]) -> None:
    """Raise BadInput where two runs would go into one folder."""
    labels: dict[Path, str] = {}
    for run in planned:
        other = labels.setdefault(run.folder(Path()), run.label)
        if other != run.label:
            raise BadInput(f"{run.label!r} and {other!r} would share a folder; sweep them apart")


def _alone(tree: Tree) -> Config:
    """Return the settings of one run, which do not depend on what it is compared with."""
    return replace(from_tree(tree), compare=CompareSection())


def _rows(tree: Tree) -> list[tuple[str, Tree]]:
    """Return the rows of a comparison, methods then references, with the settings of each."""
    choice = from_tree(tree).compare
    for what, given in (
        ("methods", choice.methods),
        ("references", choice.references),
        ("seeds", choice.seeds),
    ):
        if len(set(given)) < len(given) or not (given or what == "references"):
            raise BadInput(f"compare.{what} = {list(given)}: name at least one, and each once")
    rows = [(name, _playing(tree, choice, name)) for name in choice.methods]
    rows += [(reference, _reference(tree, choice, reference)) for reference in choice.references]
    labels = [label for label, _ in rows]
    for name in (
        choice.settings.keys() - set(labels) - constructors().keys() - set(get_args(Reference))
    ):
        raise BadInput(f"unknown key 'compare.settings.{name}'; {nearest(name, labels)}")
    return [(label, _with_own_settings(settings, choice, label)) for label, settings in rows]


def _with_own_settings(tree: Tree, choice: CompareSection, label: str) -> Tree:
    """Return a row's settings with those of ``compare.settings.<label>`` laid over them.

    What is wrong in that section raises BadInput with its name.
    """
    own = choice.settings.get(label, {})
    if not own:
        return tree
    where = f"compare.settings.{label}"
    for key in set(own).intersection(SETTLED):
        raise BadInput(f"{where}.{key}: the comparison itself settles that; take it out")
    method = from_tree(tree).method["name"]  # raises what is not this section's fault
    merged = merge(tree, own)
    try:
        chosen = from_tree(merged).method["name"]
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    if chosen != method:
        field = f"{where}.method.name = {chosen!r}"
        raise BadInput(f"{field}: these are settings of {method!r}; take that out")
    return merged


def _playing(tree: Tree, choice: CompareSection, name: str, field: str = "methods") -> Tree:
    """Return ``tree`` with method ``name``; at an equal recipe with the common targets and starting rank.

    Where ``compare`` does not name these, those of the section ``method`` are common; its other fields stay its method's.
    ``field``: the one of ``compare`` that names the method.
    """
    known = constructors()
    if name not in known:
        raise BadInput(f"compare.{field}: {name!r} is not a method; {nearest(name, list(known))}")
    written, section = {"name": METHOD, **tree.get("method", {})}, tree.get("compare", {})
    own = {part.name for part in fields(known[name])}  # type: ignore[arg-type]
    mine = {key: value for key, value in written.items() if written.get("name") == name}
    if choice.recipe == "equal":
        default = {"targets": choice.targets, "rank": choice.rank}
        common = {key: section.get(key, written.get(key, value)) for key, value in default.items()}
        mine |= {key: value for key, value in common.items() if key in own}
    rest = {key: value for key, value in tree.items() if key != "method"}
    return merge(rest, {"method": {**mine, "name": name}})


def _reference(tree: Tree, choice: CompareSection, name: str) -> Tree:
    """Return the settings of a yardstick: clients that never exchange anything, or all data at one client.

    Centralised training takes as many examples a round as the federation's cohort does together, and
    its one optimizer goes on from round to round, as that of ordinary training does.
    """
    if name == "local-only":
        return merge(_playing(tree, choice, "local_only"), {"reference": True})
    name = choice.reference_method
    settings = _with_own_settings(_playing(tree, choice, name, "reference_method"), choice, name)
    config = from_tree(settings)
    federation, steps = config.federation, config.training.steps
    together = {
        "reference": True,
        "partition": {"kind": "iid", "clients": 1},
        "federation": {"clients_per_round": 1, "min_replies": 1},
        "training": {"keep_optimizer": True},
    }
    if steps is None:
        share = federation.clients_per_round / _clients(config)
        longer = nested("federation.rounds", max(1, round(federation.rounds * share)))
    else:
        longer = nested("training.steps", steps * federation.clients_per_round)
    return merge(settings, together, longer)


def _clients(config: Config) -> int:
    """Return how many clients there are; where the data or a file names them, by counting them."""
    partition = config.partition
    if partition.kind == "file" or (partition.kind == "by_key" and partition.clients is None):
        return len(divide(config, read_data(config.data)).train)
    return partition.clients or CLIENTS
