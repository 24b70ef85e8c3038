"""Many runs from one configuration: every method with every seed, or every value of a sweep; each in a folder of its own."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final, get_args

from fedpeft import parallel
from fedpeft.assembly import Assembly, assemble
from fedpeft.choices import CLIENTS, CompareChoice, Reference
from fedpeft.config import Config, Tree, differences, from_tree, merge, nearest, nested
from fedpeft.hardware import Hardware
from fedpeft.journal import Watch
from fedpeft.methods import constructors
from fedpeft.parallel import Job, processes
from fedpeft.runs import CONFIG, Say, finished, read_settings, refuse_existing, resume, start
from fedpeft.types import BadInput


@final
@dataclass(frozen=True)
class Planned:
    """One run to be: what to call it, and its settings."""

    label: str
    config: Config

    def folder(self, root: Path) -> Path:
        """Return where it goes under ``root``."""
        return root / f"{self.label.replace(' ', '-')}-s{self.config.seed}"


def plan(tree: Tree) -> list[Planned]:
    """Return the runs of a comparison: methods, then references, for every seed; all settings are checked here."""
    rows, seeds = _rows(tree), from_tree(tree).compare.seeds
    return [
        Planned(label, _alone(merge(settings, {"label": label, "seed": seed}))) for seed in seeds for label, settings in rows
    ]


def grid(tree: Tree, values: Mapping[str, Sequence[Any]], methods: bool) -> list[Planned]:
    """Return the runs of a sweep, scored on validation: every combination of ``values``, dotted key -> values.

    With ``methods`` it is made for each method of the comparison, on that method's settings.
    """
    for key, tried in values.items():
        if any(value in tried[:number] for number, value in enumerate(tried)):
            raise BadInput(f"{key} = {', '.join(map(str, tried))}: name each value once")
    planned = []
    for label, settings in _rows(tree) if methods else [("", tree)]:
        for chosen in itertools.product(*values.values()):
            pairs = dict(zip(values, chosen, strict=True))
            name = " ".join([*filter(None, [label]), *(f"{key}={value}" for key, value in pairs.items())])
            overrides = [nested(key, value) for key, value in pairs.items()]
            scored = {"label": name, "evaluation": {"split": "validation"}}
            planned.append(Planned(name, _alone(merge(settings, *overrides, scored))))
    return planned


def _alone(tree: Tree) -> Config:
    """Return the settings of one run, which do not depend on what it is compared with."""
    return replace(from_tree(tree), compare=CompareChoice())


def play(
    runs: Sequence[Planned],
    root: Path,
    *,
    overwrite: bool = False,
    go_on: bool = False,
    watch: Callable[[Planned], Watch] = lambda _: lambda _: None,
    say: Say = lambda _: None,
    jobs: int = 1,
) -> list[Path]:
    """Play every run in its folder under ``root`` and return the folders.

    ``go_on`` resumes what is there; without it, and without ``overwrite``, a folder that exists raises BadInput before
    anything starts. ``say`` is told of a damaged checkpoint that is passed over, and the notes on
    partitions. ``jobs``: how many run at once, each on its share of the cores; 0 for as many as the
    machine has cores.
    """
    last, hardware = _at_the_door(runs, root, say, overwrite=overwrite, go_on=go_on)
    left = [run for run in runs if run.folder(root).name in hardware or not finished(run.folder(root), run.config)]
    planned = [Job(run.config.to_json(), run.folder(root), hardware.get(run.folder(root).name)) for run in left]
    count = processes(planned, jobs, last and last.hardware, any(run.config.machine.threads for run in left))
    if count > 1:
        shares = [replace(job, hardware=job.hardware and job.hardware.shared_by(count)) for job in planned]
        watches = [watch(run) for run in left]
        parallel.play(shares, count, lambda number, progress: watches[number](progress), say)
    else:
        for run, job in zip(left, planned, strict=True):
            if job.hardware is None:
                resume(job.folder, like=last, watch=watch(run), say=say)
            else:
                last = assemble(run.config, job.hardware, last)
                start(last, job.folder, overwrite=True, watch=watch(run))
    return [run.folder(root) for run in runs]


def _at_the_door(
    runs: Sequence[Planned], root: Path, say: Say, *, overwrite: bool, go_on: bool
) -> tuple[Assembly | None, dict[str, Hardware]]:
    """Raise BadInput for what would stop any of ``runs`` after others have trained.

    ``say`` is told, once each, the notes on partitions.

    Returns the last that was assembled, and the choices for this machine by folder of all that begin anew.
    """
    assembly: Assembly | None = None
    hardware: dict[str, Hardware] = {}
    for run in runs:
        folder = run.folder(root)
        if go_on and (folder / CONFIG).exists():
            found = json.loads(read_settings(folder)[0].to_json())
            now = json.loads(run.config.to_json())
            if found != now:
                apart = next(differences(found, now))
                raise BadInput(f"{folder}: was made with other settings ({apart}); remove it, or choose another name")
            continue
        refuse_existing(folder, overwrite or go_on)
    fitting: set[str] = set()
    said: set[str] = set()
    for run in runs:
        if go_on and (run.folder(root) / CONFIG).exists():
            continue
        assembly = assemble(run.config, like=assembly)
        hardware[run.folder(root).name] = assembly.hardware
        for note in assembly.partition.notes:
            if note not in said:
                say(note)
                said.add(note)
        if run.label not in fitting:
            assembly.first_state()  # fails where the method does not fit the model
            fitting.add(run.label)
    return assembly, hardware


def _rows(tree: Tree) -> list[tuple[str, Tree]]:
    """Return the rows of a comparison, methods then references, with the settings of each."""
    choice = from_tree(tree).compare
    for what, given in (("methods", choice.methods), ("references", choice.references), ("seeds", choice.seeds)):
        if len(set(given)) < len(given) or not (given or what == "references"):
            raise BadInput(f"compare.{what} = {list(given)}: name at least one, and each once")
    rows = [(name, _playing(tree, choice, name)) for name in choice.methods]
    rows += [(reference, _reference(tree, choice, reference)) for reference in choice.references]
    labels = [label for label, _ in rows]
    for name in choice.settings.keys() - set(labels) - constructors().keys() - set(get_args(Reference)):
        raise BadInput(f"unknown key 'compare.settings.{name}'; choose from: {', '.join(labels)}")
    return [(label, merge(settings, choice.settings.get(label, {}))) for label, settings in rows]


def _playing(tree: Tree, choice: CompareChoice, name: str) -> Tree:
    """Return ``tree`` with method ``name``; at an equal recipe with the common targets and starting rank.

    Where ``compare`` does not name these, those of the section ``method`` are common; its other fields stay its method's.
    """
    known = constructors()
    if name not in known:
        raise BadInput(f"compare.methods: {name!r} is not a method; {nearest(name, list(known))}")
    written, section = tree.get("method", {}), tree.get("compare", {})
    own = {field.name for field in fields(known[name])}  # type: ignore[arg-type]
    mine = {key: value for key, value in written.items() if written.get("name") == name}
    if choice.recipe == "equal":
        default = {"targets": choice.targets, "rank": choice.rank}
        common = {key: section.get(key, written.get(key, value)) for key, value in default.items()}
        mine |= {key: value for key, value in common.items() if key in own}
    rest = {key: value for key, value in tree.items() if key != "method"}
    return merge(rest, {"method": {**mine, "name": name}})


def _reference(tree: Tree, choice: CompareChoice, name: str) -> Tree:
    """Return the settings of a yardstick: clients that never exchange anything, or all data at one client.

    Centralised training takes as many examples a round as the federation's cohort does together.
    """
    if name == "local-only":
        return merge(_playing(tree, choice, "local_only"), {"reference": True})
    name = choice.reference_method
    settings = merge(_playing(tree, choice, name), choice.settings.get(name, {}))
    config = from_tree(settings)
    federation, steps = config.federation, config.training.steps
    together = {
        "reference": True,
        "partition": {"kind": "iid", "clients": 1},
        "federation": {"clients_per_round": 1, "min_replies": 1},
    }
    if steps is None:
        share = federation.clients_per_round / (config.partition.clients or CLIENTS)
        longer = nested("federation.rounds", max(1, round(federation.rounds * share)))
    else:
        longer = nested("training.steps", steps * federation.clients_per_round)
    return merge(settings, together, longer)
