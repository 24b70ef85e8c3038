"""TOML -> checked settings.

A mistake becomes one line that names the key, the value and the nearest valid choice.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

from annotated_types import Ge, Le

from fedpeft.errors import BadInput
from fedpeft.experiment.checking import Tree, adapter, check_finite, checked, nearest
from fedpeft.experiment.proposals import with_rate
from fedpeft.experiment.sections import (
    CompareSection,
    DataSection,
    EngineSection,
    EvaluationSection,
    FederationSection,
    PartitionSection,
    ServerSection,
    TunedSection,
)
from fedpeft.experiment.wrapping import told, wrapped
from fedpeft.methods import constructors
from fedpeft.models import ModelSection
from fedpeft.tasks import TaskSection
from fedpeft.training.hardware import Machine
from fedpeft.training.loop import Training
from fedpeft.types import Method

METHOD: Final = "lora"
"""The method where a configuration names none."""

UNMEASURED: Final = frozenset(["quantise", "top_k", "scaffold", "dp"])
"""Wrappers whose replies hold codes, differences or more than what was trained."""
RENAMED: Final[Mapping[str, str | None]] = {"engine.cohort": "engine.stack"}
"""What fields were called by older versions: dotted name then -> now, None for one that is gone.

They are read under these names for one release, wherever settings come from. A new field needs no
entry: an old run takes its default, which therefore has to be what the old version did. The old
names in ``hardware.json`` are known to ``Hardware``.
"""

OnWarning = Callable[[str], None]


@dataclass(frozen=True)
class Config:
    """Everything a run is made from."""

    name: str = "run"
    """Names the run and its folder: letters, digits, `-` and `_`, also blanks and `.,=` inside."""
    label: str = ""
    """What reports call the run; the method's name where empty."""
    reference: bool = False
    """Whether the run is a yardstick, whose exchange is no real traffic."""
    seed: Annotated[int, Ge(0), Le(2**62)] = 0
    """All that is drawn in a run follows from it."""
    task: TaskSection = field(default_factory=TaskSection)
    """What is learnt."""
    model: ModelSection = field(default_factory=ModelSection)
    """Which model is tuned."""
    machine: Machine = field(default_factory=Machine)
    """What of the hardware is used."""
    data: DataSection = field(default_factory=DataSection)
    """Which texts."""
    partition: PartitionSection = field(default_factory=PartitionSection)
    """Who holds which texts."""
    federation: FederationSection = field(default_factory=FederationSection)
    """How server and clients take turns."""
    training: Training = field(default_factory=Training)
    """How a client trains."""
    method: dict[str, Any] = field(default_factory=lambda: {"name": METHOD})
    """The method's `name`, and the fields of that method."""
    wrap: tuple[dict[str, Any], ...] = ()
    """Wrappers around the method, the outermost first, as `[[wrap]]` tables: `name`, and its
    fields."""
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    """When the model is scored, and on what."""
    engine: EngineSection = field(default_factory=EngineSection)
    """How messages travel."""
    compare: CompareSection = field(default_factory=CompareSection)
    """What `fedpeft compare` runs."""
    server: ServerSection = field(default_factory=ServerSection)
    """How sites reach the server, with `fedpeft serve`."""
    tuned: TunedSection = field(default_factory=TunedSection)
    """Where the learning rate comes from."""

    def to_json(self) -> str:
        """Return the settings as JSON that ``from_tree`` reads back."""
        return adapter(Config).dump_json(self, indent=1).decode()

    def build_method(self) -> Method:
        """Return the method that ``method`` describes, inside the wrappers of ``wrap``.

        It is told the number of rounds where its schedule needs it.
        """
        fields = dict(self.method)
        known = constructors()
        name = fields.pop("name", METHOD)
        if not isinstance(name, str) or name not in known:
            raise BadInput(
                f"method.name = {name!r} is not a method; {nearest(str(name), list(known))}"
            )
        constructor = known[name]
        # A schedule that ends with the run needs its length: such a method has a field `rounds`.
        known_fields = dataclasses.fields(constructor)  # type: ignore[arg-type]  # a dataclass
        if any(part.name == "rounds" for part in known_fields):
            fields.setdefault("rounds", self.federation.rounds)
        method: Method = checked(constructor, fields, "method", also=("name",))
        return wrapped(method, self.told_wraps())

    def told_wraps(self) -> list[dict[str, Any]]:
        """Return the tables of ``wrap``, with what wrappers have to know of the federation."""
        return told(self.wrap, self.federation.clients_per_round)


def read(path: Path) -> Tree:
    """Return the settings in a TOML file; a missing or malformed one raises BadInput."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        others: list[str] = []
        if path.parent.is_dir():
            others = [str(other) for other in path.parent.glob("*.toml")]
        raise BadInput(f"{path}: no such file; {nearest(str(path), others)}") from error
    except IsADirectoryError as error:
        raise BadInput(f"{path}: is a folder, not a TOML file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path}: not a TOML file: {error}") from error
    return beside(tree, path.parent)


def beside(tree: dict[str, Any], folder: Path) -> Tree:
    """Return ``tree``, which is changed, with full paths where they were relative to ``folder``."""
    # A mistake in the form of ``tree`` is passed over here: ``from_tree`` explains it.
    for section, key in (
        ("data", "train"),
        ("data", "validation"),
        ("data", "test"),
        ("partition", "file"),
        ("federation", "trace"),
        ("server", "certificate"),
        ("server", "key"),
        ("server", "sites"),
        ("server", "state"),
        ("compare", "rates"),
    ):
        if isinstance(tree.get(section), dict) and isinstance(tree[section].get(key), str):
            tree[section][key] = str(_full(Path(tree[section][key]), folder))
    # Names of a model and of a data set are paths only where they name a folder: else they are
    # names on the hub, or ours.
    for section in ("model", "data"):
        name = tree[section].get("name") if isinstance(tree.get(section), dict) else None
        if isinstance(name, str) and _full(Path(name), folder).is_dir():
            tree[section]["name"] = str(_full(Path(name), folder))
    return tree


def parse_set(assignment: str) -> Tree:
    """Return the tree that ``a.b=value`` sets; see ``value``.

    >>> parse_set("training.lr=0.003")
    {'training': {'lr': 0.003}}
    """
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise BadInput(
            f"--set {assignment}: write it as section.field=value, such as training.lr=0.001"
        )
    return nested(key, value(text))


def value(text: str) -> Any:
    """Return what ``text`` says in TOML, and ``text`` itself where it is none.

    >>> value("3e-3"), value("[1, 2]"), value("lora")
    (0.003, [1, 2], 'lora')
    """
    # A word without quotes is no TOML, but nobody quotes words on a command line.
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def nested(key: str, value: object) -> dict[str, Any]:
    """Return the tree in which dotted ``key`` is ``value``: ``a.b`` -> ``{"a": {"b": value}}``."""
    first, _, inner_key = key.partition(".")
    return {first: nested(inner_key, value) if inner_key else value}


def merge(*trees: Tree) -> dict[str, Any]:
    """Return the trees laid over each other, later ones on top.

    A method of another name starts from its own defaults.

    >>> merge({"method": {"name": "lora", "rank": 4}}, {"method": {"name": "full"}})
    {'method': {'name': 'full'}}
    """
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            below = merged.get(key)
            if not isinstance(value, Mapping) or not isinstance(below, Mapping):
                merged[key] = value
            elif key == "method" and value.get("name", below.get("name")) != below.get("name"):
                merged[key] = dict(value)  # another method need not have the fields of this one
            else:
                merged[key] = merge(below, value)
    return merged


def from_tree(tree: Tree, on_warning: OnWarning = lambda _: None) -> Config:
    """Return checked settings; the method's own fields are checked too.

    A learning rate that is left out is the one proposed for the method, where there is one.
    ``on_warning`` is told of a field that is given by an old name.
    """
    # 1. Each field by itself: its name, its type and its bounds.
    tree = with_rate(renamed(tree, on_warning), _method_name(tree))
    config = _absolute(checked(Config, tree, ""))
    check_finite(tree, "")  # TOML has nan and inf, which bounds need not catch
    if "name" not in config.method:
        config = replace(config, method={"name": METHOD, **config.method})

    # 2. What no type says, and what fields say together.
    if not re.fullmatch(r"\w[\w .,=-]*", config.name):
        raise BadInput(
            f"name = {config.name!r}: names a folder; "
            "choose letters, digits, '-' and '_', such as 'run'"
        )
    federation = config.federation
    if federation.min_replies > federation.clients_per_round:
        raise BadInput(
            f"federation.min_replies = {federation.min_replies} can never come from "
            f"federation.clients_per_round = {federation.clients_per_round}; "
            f"choose at most {federation.clients_per_round}"
        )
    _check_fleet(federation, on_sites=config.engine.kind == "sites")
    config.build_method()  # checks the fields of method and wrappers, which are mere tables so far
    masks = any(table["name"] == "secagg" for table in config.wrap)
    if federation.largest_update is not None and masks:
        raise BadInput(
            f"federation.largest_update = {federation.largest_update}: no update can be measured "
            "under the masks of wrap.name = 'secagg', whose `range` bounds every number of it; "
            "leave one of the two out"
        )
    coded = [table["name"] for table in config.wrap if table["name"] in UNMEASURED]
    if federation.largest_update is not None and coded:
        raise BadInput(
            f"federation.largest_update = {federation.largest_update}: what replies hold under "
            f"wrap.name = {coded[0]!r} is not what was trained, and cannot be measured so; leave "
            "one of the two out"
        )
    _check_source(config.data, has_train=config.engine.kind != "sites")
    if config.partition.kind == "file" and config.partition.file is None:
        raise BadInput(
            "partition.file is missing: with partition.kind = 'file', "
            "name the JSON file of client -> rows"
        )
    flower_class = config.partition.flower.get("name")
    if config.partition.kind == "flower" and not isinstance(flower_class, str):
        raise BadInput(
            "partition.flower.name is missing: with partition.kind = 'flower', "
            "name the class of a partitioner, such as 'PathologicalPartitioner'"
        )
    return config


def _method_name(tree: Tree) -> str:
    """Return the name of the method in ``tree``; a section in a wrong form has none."""
    section = tree.get("method", {})
    name = section.get("name", METHOD) if isinstance(section, Mapping) else ""
    return name if isinstance(name, str) else ""


def _check_fleet(federation: FederationSection, *, on_sites: bool) -> None:
    """Raise BadInput for a fleet whose shares do not add up, and for one of real sites."""
    if on_sites:
        instead = {
            "fleet": "sites have the devices that they have",
            "deadline": "set server.deadline, in seconds of the clock",
            "trace": "those sites are drawn that are online",
        }
        for name, why in instead.items():
            if getattr(federation, name):
                raise BadInput(f"federation.{name}: is for simulations, not for sites; {why}")
    fleet = federation.fleet
    if federation.deadline is not None and not fleet:
        raise BadInput(
            f"federation.deadline = {federation.deadline:g}: time is modelled by "
            "federation.fleet, and there is none; add a table such as [federation.fleet.phone]"
        )
    total = sum(device.share for device in fleet.values())
    if fleet and abs(total - 1) > 1e-6:
        shares = ", ".join(f"{name} {device.share:g}" for name, device in fleet.items())
        raise BadInput(
            f"federation.fleet: the shares {shares} add to {total:g}; choose shares that add to 1"
        )


def _check_source(data: DataSection, *, has_train: bool) -> None:
    """Raise BadInput where the source lacks what it needs, or there is what another one needs.

    ``has_train``: whether training texts are wanted; a server of sites has none.
    """
    if has_train and data.source == "files" and data.train is None:
        raise BadInput(
            "data.train is missing: with data.source = 'files', name the file of the training texts"
        )
    if data.source == "hub" and data.name is None:
        raise BadInput(
            "data.name is missing: with data.source = 'hub', name the set, as 'fancyzhx/ag_news'"
        )
    others: list[tuple[str, str]] = []  # fields that the source does not use, and whose they are
    if data.source == "pydocs":
        others.append(("train", "files"))
    if data.source == "hub":
        others += [("train", "files"), ("validation", "files"), ("test", "files")]
    else:
        others += [("name", "hub"), ("config", "hub")]
        others += [("validation_split", "hub"), ("test_split", "hub")]
    for name, source in others:
        setting = getattr(data, name)
        if setting is not None:
            raise BadInput(
                f"data.{name} = {str(setting)!r} is not used by data.source = {data.source!r}; "
                f"did you mean {source!r}?"
            )
    if data.labels is not None and data.source == "pydocs":
        raise BadInput("data.labels is not used by data.source = 'pydocs', whose labels are known")
    if data.labels == ():
        raise BadInput("data.labels = []: name all labels, such as ['neg', 'pos'], or leave it out")


def from_json(text: str, on_warning: OnWarning = lambda _: None) -> Config:
    """Return the settings that ``Config.to_json`` of this version or an older one wrote."""
    return from_tree(json.loads(text), on_warning)


def renamed(tree: Tree, on_warning: OnWarning) -> dict[str, Any]:
    """Return settings under the names of today (see ``RENAMED``); ``on_warning`` is told of others.

    Those of single rows of a comparison are renamed, too. Raises BadInput where a field is there
    under both names.
    """
    today = _renamed(tree, "", on_warning)
    # Each ``compare.settings.<label>`` is a whole tree of settings again.
    compare = today.get("compare")
    rows = compare.get("settings") if isinstance(compare, Mapping) else None
    if isinstance(compare, Mapping) and isinstance(rows, Mapping):
        settings: dict[str, Any] = {}
        for label, row in rows.items():
            where = f"compare.settings.{label}."
            settings[label] = _renamed(row, where, on_warning) if isinstance(row, Mapping) else row
        today["compare"] = {**compare, "settings": settings}
    return today


def _renamed(tree: Tree, where: str, on_warning: OnWarning) -> dict[str, Any]:
    """Return ``tree``, whose keys stand under the prefix ``where``, under the names of today."""
    today = dict(tree)
    for then, now in RENAMED.items():
        today, removed = _without(today, then.split("."))
        if not removed:
            continue
        if now is None:
            on_warning(f"{where}{then} is gone: it is left out of account")
            continue
        [old] = removed
        if _without(today, now.split("."))[1]:
            raise BadInput(
                f"{where}{then} = {old!r}: is the old name of {where}{now}, "
                f"which is given as well; take {where}{then} out"
            )
        on_warning(_rename_warning(f"{where}{then}", f"{where}{now}"))
        today = merge(today, nested(now, old))
    return today


def name_today(name: str, on_warning: OnWarning) -> str:
    """Return what the field with dotted ``name`` is called today.

    ``on_warning`` is told of an old name.
    """
    now = RENAMED.get(name)
    if now is None:
        return name
    on_warning(_rename_warning(name, now))
    return now


def _rename_warning(then: str, now: str) -> str:
    return f"{then} is called {now} now; the old name is read for one release"


def _without(tree: Tree, keys: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """Return ``tree`` without the value at the nested ``keys``, and that value, if there is one.

    The value comes in a list, which is empty where there is none: None is a value, too.
    """
    key, *inner_keys = keys
    remaining = dict(tree)
    if key not in remaining:
        return remaining, []
    if not inner_keys:
        return remaining, [remaining.pop(key)]
    if not isinstance(remaining[key], Mapping):
        return remaining, []
    remaining[key], removed = _without(remaining[key], inner_keys)
    return remaining, removed


def _absolute(config: Config) -> Config:
    """Return the settings with full paths, so that a run can be resumed from any folder."""
    data, partition, model = config.data, config.partition, config.model
    data = replace(
        data,
        train=data.train and _full(data.train),
        validation=data.validation and _full(data.validation),
        test=data.test and _full(data.test),
    )
    if data.name is not None and _full(Path(data.name)).is_dir():
        data = replace(data, name=str(_full(Path(data.name))))
    partition = replace(partition, file=partition.file and _full(partition.file))
    federation = config.federation
    federation = replace(federation, trace=federation.trace and _full(federation.trace))
    server = config.server
    server = replace(
        server,
        certificate=server.certificate and _full(server.certificate),
        key=server.key and _full(server.key),
        sites=server.sites and _full(server.sites),
        state=server.state and _full(server.state),
    )
    compare = replace(config.compare, rates=config.compare.rates and _full(config.compare.rates))
    place = _full(Path(model.name))  # a folder or a GGUF file
    if place.exists():
        model = replace(model, name=str(place))
    return replace(
        config,
        data=data,
        partition=partition,
        federation=federation,
        model=model,
        server=server,
        compare=compare,
    )


def _full(path: Path, folder: Path = Path()) -> Path:
    """Return ``path`` as seen from ``folder`` as a full path, a leading ``~`` as the user's home.

    Raises BadInput where ``~name`` names nobody.
    """
    try:
        return (folder / path.expanduser()).absolute()
    except RuntimeError as error:
        raise BadInput(f"{path}: no home folder is known for {path.parts[0]!r}") from error


def differences(one: Tree, other: Tree, prefix: str = "") -> Iterator[str]:
    """Yield every field in which two trees of settings differ, as ``a.b: 3 there, 4 now``."""
    for key in {**one, **other}:  # all keys, in the order in which they come
        then, now = one.get(key), other.get(key)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            yield from differences(then, now, f"{prefix}{key}.")
        elif then != now:
            yield f"{prefix}{key}: {then} there, {now} now"
