"""Which methods fit a federation: what each costs here, and what is known of it under such skew."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, final

import torch

from fedpeft.data.heterogeneity import Heterogeneity, heterogeneity
from fedpeft.errors import BadInput, WireError
from fedpeft.experiment.build import Federation, build
from fedpeft.experiment.checking import Tree, nearest
from fedpeft.experiment.client_cost import ClientCost, Group, cost_of_client
from fedpeft.experiment.compare import plan
from fedpeft.experiment.config import Config, from_tree, merge
from fedpeft.experiment.findings import Study, of_like_skew, studies
from fedpeft.experiment.limits import Limits
from fedpeft.experiment.rehearsal import shortened
from fedpeft.federation.fleet import Fleet
from fedpeft.methods import constructors

YARDSTICKS: Final = frozenset({"local_only"})
"""Methods that are tried only where they are named: they exchange nothing."""
NO_LIMITS: Final = Limits()


@final
@dataclass(frozen=True)
class Judged:
    """A method with what it costs a client.

    ``cost`` is None where it cannot train. ``seconds``: of a round, modelled, by class of clients;
    None where none of the class was drawn. ``out``: the limit that is broken, or why it cannot
    train; None where it fits. ``levels``: whether it sends weak clients as much as any other.
    """

    method: str
    cost: ClientCost | None = None
    seconds: tuple[float | None, ...] = ()
    out: str | None = None
    levels: bool = False

    @property
    def moved(self) -> int:
        """Return the most bytes that a client moves in a round, both ways; 0 where none does."""
        groups = self.cost.groups if self.cost is not None else ()
        return max((group.moved or 0 for group in groups), default=0)


@final
@dataclass(frozen=True)
class Advice:
    """What is known before a run: who differs how, what each method costs, what it did elsewhere.

    ``parameters``: of the model. ``rehearsed``: rounds that were played of each method. ``fleet``:
    the names of the classes of clients; empty where all are alike. ``machine``: where seconds and
    memory were measured. ``studies``: runs of this repository under like skew, the nearest first;
    ``others``: those of the same task under another skew.
    """

    name: str
    task: str
    data: str
    model: str
    parameters: int
    clients: int
    clients_per_round: int
    rounds: int
    rehearsed: int
    skew: Heterogeneity
    fleet: tuple[str, ...]
    machine: str
    limits: Limits
    methods: tuple[Judged, ...]
    studies: tuple[Study, ...]
    others: tuple[Study, ...]

    @property
    def fitting(self) -> tuple[Judged, ...]:
        """Return the methods that fit: best known under like skew first, then by bytes."""
        fitting = [one for one in self.methods if one.out is None]
        return tuple(sorted(fitting, key=self._order))

    @property
    def left_out(self) -> tuple[Judged, ...]:
        """Return the methods that do not fit, or cannot train."""
        return tuple(one for one in self.methods if one.out is not None)

    def known(self, method: str) -> tuple[Study, ...]:
        """Return the studies of like skew in which ``method`` was run."""
        return tuple(study for study in self.studies if method in study.scores)

    def to_json(self) -> dict[str, Any]:
        """Return it as what ``json`` writes, each figure under the name of its source."""
        return {
            "name": self.name,
            "task": self.task,
            "data": self.data,
            "model": self.model,
            "parameters": self.parameters,
            "clients": self.clients,
            "clients_per_round": self.clients_per_round,
            "rounds": self.rounds,
            "rehearsed_rounds": self.rehearsed,
            "heterogeneity": self.skew.to_json(),
            "machine": self.machine,
            "limits": asdict(self.limits),
            "methods": [self._method_json(one) for one in (*self.fitting, *self.left_out)],
            "studies": [asdict(study) for study in self.studies],
        }

    def _method_json(self, one: Judged) -> dict[str, Any]:
        figures = _figures_json(one, one.cost) if one.cost is not None else {}
        found: list[dict[str, str]] = []
        for study in self.known(one.method):
            found.append({"study": study.name, study.metric: study.scores[one.method]})
        return {"method": one.method, "left_out": one.out, **figures, "found": found}

    def _order(self, one: Judged) -> tuple[float, int]:
        """Return the place in the nearest study, last where there is none; then the bytes."""
        found = self.known(one.method)
        place = found[0].place(one.method) if found else None
        return (float("inf") if place is None else place), one.moved


def _figures_json(one: Judged, cost: ClientCost) -> dict[str, Any]:
    """Return what a method costs, each figure under the name of its source."""
    classes: list[dict[str, Any]] = []
    for group, seconds in zip(cost.groups, one.seconds, strict=True):
        classes.append({**asdict(group), "round_seconds": seconds})
    return {
        "counted": {
            "down": cost.down,
            "up": cost.up,
            "moved": one.moved,
            "trained": cost.trained,
        },
        "measured": {
            "step_seconds": cost.step_seconds,
            "of_steps": cost.timed_steps,
            "median": cost.step,
            "peak_memory": cost.peak_memory,
        },
        "modelled": {"classes": classes},
    }


def advise(
    tree: Tree,
    methods: Sequence[str] = (),
    limits: Limits = NO_LIMITS,
    on_method: Callable[[str], None] = lambda _: None,
) -> Advice:
    """Return what each of ``methods``, all but yardsticks by default, costs in a federation.

    Every method takes the settings that ``fedpeft compare`` gives it. ``on_method`` is told of each
    one before it is rehearsed. Raises BadInput for settings that do not work, whatever the method.
    """
    names = _names(methods)
    # In this process, one client after another: each is to have a machine of its own.
    alone = merge(tree, {"engine": {"kind": "local", "stack": 1}})
    federation = build(from_tree(alone))
    config, dataset = federation.config, federation.dataset
    skew = heterogeneity(dataset, federation.partition)
    judged: list[Judged] = []
    for name in names:
        on_method(name)
        judged.append(_judged(name, alone, federation, limits))
    kind = config.task.kind
    alike = of_like_skew(studies(), kind, _label_variation(skew))
    return Advice(
        name=config.name,
        task=kind,
        data=dataset.name,
        model=config.model.name,
        parameters=sum(p.numel() for p in federation.loaded.base.parameters.values()),
        clients=len(federation.clients),
        clients_per_round=config.federation.clients_per_round,
        rounds=config.federation.rounds,
        rehearsed=shortened(config).federation.rounds,
        skew=skew,
        fleet=tuple(federation.fleet.devices),
        machine=_machine(federation),
        limits=limits,
        methods=tuple(judged),
        studies=alike,
        others=tuple(one for one in studies() if one.task == kind and one not in alike),
    )


def _names(methods: Sequence[str]) -> list[str]:
    """Return the methods to try; BadInput for unknown ones, and for one that is named twice."""
    known = constructors()
    for name in methods:
        if name not in known:
            raise BadInput(f"--methods: {name!r} is not a method; {nearest(name, list(known))}")
    if len(set(methods)) < len(methods):
        raise BadInput(f"--methods {','.join(methods)}: name each once")
    return list(methods) or [name for name in known if name not in YARDSTICKS]


def _judged(name: str, tree: Tree, federation: Federation, limits: Limits) -> Judged:
    """Return what the method ``name`` costs, and whether that is within the limits."""
    try:
        config = _config_of(name, tree, federation.config)
        own = build(shortened(config), federation.hardware, federation)
        cost = cost_of_client(own)
    except (BadInput, WireError) as error:
        return Judged(name, out=f"cannot train: {error}")
    except (MemoryError, torch.OutOfMemoryError):
        return Judged(name, out="cannot train: this machine has not memory enough")
    seconds: list[float | None] = []
    out: str | None = None
    for group in cost.groups:
        of_round, broken = _of_class(group, own.fleet, cost, limits)
        seconds.append(of_round)
        out = out or broken
    return Judged(name, cost, tuple(seconds), out, levels=bool(own.fleet_notes))


def _of_class(
    group: Group, fleet: Fleet, cost: ClientCost, limits: Limits
) -> tuple[float | None, str | None]:
    """Return the modelled seconds of a round for a class of clients, and the limit it breaks.

    None for the seconds where no client was drawn, and for the limit where all are kept.
    """
    if group.moved is None:
        return None, None
    bounds, step = _limits_of(group, fleet, limits), _step_seconds(group, fleet, cost)
    training = group.steps * step
    broken = bounds.broken(group.moved, training, cost.peak_memory)
    # The deadline that is typed is for a round, a fleet's for each of its exchanges.
    if broken is None and limits.deadline is None:
        broken = _late(group, Limits(bounds.rate, deadline=fleet.deadline), step)
    if broken is not None and group.name:
        broken = f"{group.name}: {broken}"
    return bounds.seconds(group.moved, training), broken


def _limits_of(group: Group, fleet: Fleet, limits: Limits) -> Limits:
    """Return the limits of a class of clients for a round: those given, over its own link."""
    if not fleet.devices:
        return limits
    # What a client may move in a round, where that is given, says nothing of its rate.
    rate = limits.rate or fleet.devices[group.name].bandwidth
    return replace(limits, rate=rate)


def _late(group: Group, bounds: Limits, step: float) -> str | None:
    """Return which exchange breaks ``bounds``, in words; None where all keep them.

    ``step``: seconds of a step.
    """
    what = "an exchange of a round" if len(group.exchanges) > 1 else "a round"
    for exchange in group.exchanges:
        why = bounds.broken(exchange.moved, exchange.steps * step, memory=0, what=what)
        if why is not None:
            return why
    return None


def _step_seconds(group: Group, fleet: Fleet, cost: ClientCost) -> float:
    """Return the seconds of a step: as the fleet says, otherwise as it was measured here."""
    return fleet.devices[group.name].step_seconds if fleet.devices else cost.step


def _config_of(name: str, tree: Tree, base: Config) -> Config:
    """Return the settings that a comparison gives a method."""
    alone = {"compare": {"methods": [name], "references": [], "seeds": [base.seed]}}
    [planned] = plan(merge(tree, alone))
    return planned.config


def _label_variation(skew: Heterogeneity) -> float | None:
    """Return the total variation of two clients' labels; None where there are no labels."""
    for one in skew.skews:
        if one.what == "label":
            return one.total_variation
    return None


def _machine(federation: Federation) -> str:
    hardware = federation.hardware
    processor = platform.processor() or platform.machine()
    return f"{processor}, {hardware.device}, {hardware.precision}, threads: {hardware.threads}"
