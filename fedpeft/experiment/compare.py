"""Many runs from one configuration: every method with every seed, or every value of a sweep."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, final, get_args

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import Tree, nearest
from fedpeft.experiment.config import METHOD, Config, from_tree, merge, nested
from fedpeft.experiment.proposals import with_rate
from fedpeft.experiment.rates import check_rates, picked_over, read_rates
from fedpeft.experiment.reading import divide, read_data
from fedpeft.experiment.sections import CLIENTS, CompareSection, Reference
from fedpeft.methods import constructors
from fedpeft.tasks import Metric, make_task

SETTLED: Final = ("name", "label", "reference", "seed", "compare")
"""Fields that ``[compare.settings.<label>]`` cannot set, as the comparison itself does."""


@final
@dataclass(frozen=True)
class Planned:
    """One run to be: what to call it, its settings, and where it stops before its end, if it does.

    ``until``: the round after which to stop; it can be resumed from there.

    >>> Planned("lora training.lr=0.01", Config(seed=3)).folder(Path("runs")).name
    'lora-training.lr=0.01-s3'
    """

    label: str
    config: Config
    until: int | None = None

    def folder(self, root: Path) -> Path:
        """Return the run's folder under ``root``, a valid name on any system."""
        # A sweep's values may be paths, or hold blanks and quotes.
        name = re.sub(r'[\s\\/:*?"<>|]', "-", self.label)
        return root / f"{name}-s{self.config.seed}"


def plan(tree: Tree) -> list[Planned]:
    """Return the runs of a comparison: methods, then references, for every seed.

    All settings are checked here; those that do not work raise BadInput.

    >>> runs = plan({"compare": {"methods": ["lora", "federa"], "seeds": [0, 1]}})
    >>> [(run.label, run.config.seed) for run in runs]
    [('lora', 0), ('federa', 0), ('lora', 1), ('federa', 1)]
    """
    rows = rows_of(tree)
    seeds = from_tree(tree).compare.seeds
    planned: list[Planned] = []
    # Seed by seed: a comparison that is stopped half-way has all methods with the first seeds.
    for seed in seeds:
        for label, settings in rows:
            config = _alone(merge(settings, {"label": label, "seed": seed}))
            planned.append(Planned(label, config))
    return planned


def grid(tree: Tree, values: Mapping[str, Sequence[Any]], methods: bool) -> list[Planned]:
    """Return the runs of a sweep, scored on validation: every combination of ``values``.

    ``values``: dotted key -> what to try. With ``methods`` the sweep is made for each method of the
    comparison, on that method's settings. Settings that do not work raise BadInput.

    >>> runs = grid({}, {"training.lr": [0.01, 0.02], "seed": [0]}, methods=False)
    >>> [run.label for run in runs]
    ['training.lr=0.01 seed=0', 'training.lr=0.02 seed=0']
    >>> runs[1].config.training.lr
    0.02
    """
    for key, tried in values.items():
        _check_swept(key, tried)
    rows = rows_of(tree) if methods else [("", tree)]
    # A rate that is swept is neither the one that was proposed nor the one that was picked.
    own = {"tuned": {"trials": 0, "source": ""}} if "training.lr" in values else {}
    planned: list[Planned] = []
    for label, settings in rows:
        for combination in itertools.product(*values.values()):
            chosen = dict(zip(values, combination, strict=True))
            planned.append(swept(label, settings, chosen, own))
    _check_apart(planned)
    return planned


def metric_of(config: Config) -> Metric:
    """Return the metric that compares runs with these settings; it needs no data.

    >>> metric_of(from_tree({"task": {"kind": "causal_lm"}})).higher_is_better
    False
    """
    return make_task(config.task, (), config.model.max_length).metric


def _check_swept(key: str, tried: Sequence[Any]) -> None:
    """Raise BadInput for a field that cannot be swept, and for a value that is given twice."""
    if key in ("name", "label", "reference", "evaluation.split") or key.startswith("compare."):
        raise BadInput(f"{key}: the sweep itself settles that; sweep another field")
    for index, value in enumerate(tried):
        if value in tried[:index]:
            raise BadInput(f"{key} = {', '.join(map(str, tried))}: name each value once")


def swept(label: str, settings: Tree, chosen: Mapping[str, Any], others: Tree) -> Planned:
    """Return the run of one combination of values, ``chosen``: dotted key -> value.

    ``label``: the method's, which goes before an error; empty for a sweep of no method. ``others``:
    what else is settled. The run is scored on validation.
    """
    words = [label] if label else []
    overrides: list[Tree] = []
    for key, value in chosen.items():
        words.append(f"{key}={value}")
        overrides.append(nested(key, value))
    name = " ".join(words)
    # A sweep chooses values, so it must not see the test split.
    scored = {"label": name, "evaluation": {"split": "validation"}}
    try:
        config = _alone(merge(settings, *overrides, scored, others))
    except BadInput as error:
        raise BadInput(f"{label}: {error}" if label else str(error)) from error
    return Planned(name, config)


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


def rows_of(tree: Tree) -> list[tuple[str, Tree]]:
    """Return the rows of a comparison, methods then references, with the settings of each.

    What a file of rates has for a row is laid over its settings.
    """
    choice = from_tree(tree).compare
    _check_named("methods", choice.methods)
    _check_named("references", choice.references, may_be_empty=True)
    _check_named("seeds", choice.seeds)
    rows: list[tuple[str, Tree]] = []
    for name in choice.methods:
        rows.append((name, _with_method(tree, choice, name)))
    for name in choice.references:
        rows.append((name, _reference(tree, choice, name)))

    # Settings of a method that is left out this time are no mistake.
    labels = [label for label, _ in rows]
    known = {*labels, *constructors(), *get_args(Reference)}
    for unknown in choice.settings.keys() - known:
        raise BadInput(f"unknown key 'compare.settings.{unknown}'; {nearest(unknown, labels)}")
    own: list[tuple[str, Tree]] = []
    for label, settings in rows:
        # A yardstick may have a rate proposed that is not its method's.
        own.append((label, with_rate(_with_own_settings(settings, choice, label), label)))
    if choice.rates is None:
        return own
    rates = read_rates(choice.rates)
    check_rates(choice.rates, rates, from_tree(tree), labels)
    return [(label, picked_over(row, choice.rates, rates, label)) for label, row in own]


def _check_named(field: str, names: Sequence[object], *, may_be_empty: bool = False) -> None:
    """Raise BadInput where ``compare.<field>`` names something twice, or nothing."""
    repeats = len(set(names)) < len(names)
    if repeats or not (names or may_be_empty):
        raise BadInput(f"compare.{field} = {list(names)}: name at least one, and each once")


def _with_own_settings(tree: Tree, choice: CompareSection, label: str) -> Tree:
    """Return a row's settings with those of ``compare.settings.<label>`` laid over them.

    What is wrong in that section raises BadInput with its name.
    """
    overrides = choice.settings.get(label, {})
    if not overrides:
        return tree
    where = f"compare.settings.{label}"
    for key in set(overrides).intersection(SETTLED):
        raise BadInput(f"{where}.{key}: the comparison itself settles that; take it out")
    method = from_tree(tree).method["name"]  # raises what is not this section's fault
    merged = merge(tree, overrides)
    try:
        chosen = from_tree(merged).method["name"]
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    if chosen != method:
        field = f"{where}.method.name = {chosen!r}"
        raise BadInput(f"{field}: these are settings of {method!r}; take that out")
    return merged


def _with_method(tree: Tree, choice: CompareSection, name: str, field: str = "methods") -> Tree:
    """Return ``tree`` with method ``name``; at an equal recipe with the common targets and rank.

    Targets and rank come from ``compare``, or else from the section ``method``, or else they are
    the defaults of ``compare``. Other fields of the section ``method`` are for the method that it
    names. ``field``: the one of ``compare`` that names the method, for errors.
    """
    known = constructors()
    if name not in known:
        raise BadInput(f"compare.{field}: {name!r} is not a method; {nearest(name, list(known))}")
    section: Tree = {"name": METHOD, **tree.get("method", {})}
    chosen = dict(section) if section["name"] == name else {}
    if choice.recipe == "equal":
        written = tree.get("compare", {})  # without defaults, unlike ``choice``
        accepted = {field.name for field in fields(known[name])}  # type: ignore[arg-type]
        for key, default in (("targets", choice.targets), ("rank", choice.rank)):
            if key in accepted:
                chosen[key] = written.get(key, section.get(key, default))
    # The section is replaced, not merged: of the old one ``chosen`` has all that is to stay.
    return {**tree, "method": {**chosen, "name": name}}


def _reference(tree: Tree, choice: CompareSection, name: str) -> Tree:
    """Return the settings of a yardstick.

    That is either clients that never exchange anything, or all data at one client. In a round,
    centralised training takes as many examples as the federation's cohort does together. Its one
    optimizer goes on from round to round, as that of ordinary training does. Wrappers are left out:
    there is no exchange that they could change; and the one client is no device of a fleet.
    """
    if name == "local-only":
        return merge(_with_method(tree, choice, "local_only"), {"reference": True, "wrap": []})
    method = choice.reference_method
    plain = _with_method(tree, choice, method, "reference_method")
    settings = _without_fleet(_with_own_settings(plain, choice, method))
    config = from_tree(settings)
    federation, steps = config.federation, config.training.steps
    together = {
        "reference": True,
        "wrap": [],
        "partition": {"kind": "iid", "clients": 1},
        "federation": {"clients_per_round": 1, "min_replies": 1},
        "training": {"keep_optimizer": True},
    }
    if steps is None:
        # A centralised epoch takes all data, where a round of the federation takes the cohort's
        # share of them: so this share of the rounds is enough.
        share = federation.clients_per_round / _clients(config)
        longer = nested("federation.rounds", max(1, round(federation.rounds * share)))
    else:
        # The one client takes as many steps as the whole cohort does.
        longer = nested("training.steps", steps * federation.clients_per_round)
    return merge(settings, together, longer)


def _without_fleet(tree: Tree) -> Tree:
    """Return ``tree`` for a client that is no device of a fleet: always there, whole and alone."""
    federation = dict(tree.get("federation", {}))
    for name in ("fleet", "deadline", "trace", "sampling"):
        federation.pop(name, None)
    return {**tree, "federation": federation}


def _clients(config: Config) -> int:
    """Return how many clients there are; where the data or a file names them, by counting them."""
    partition = config.partition
    all_keys = partition.kind == "by_key" and partition.clients is None and not partition.group
    if partition.kind in ("file", "flower") or all_keys:
        return len(divide(config, read_data(config)).train)
    return partition.clients or CLIENTS
