"""What a run records: a row for the run, one per (round, client), per evaluation, per promise."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Final, final, get_args, get_origin

_LEAST, _MOST = "least", "most"
"""The keys of a field's metadata in ``Measured``: the range of values that can be true."""


def _figure(default: Any, most: float, least: int = 0) -> Any:
    """Return a field of ``Measured`` whose values can be true from ``least`` to ``most``."""
    return field(default=default, metadata={_LEAST: least, _MOST: most})


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a client measured in one round; it travels whole from the client to the ledger.

    ``examples``: how many it trained or was scored on. ``steps``: of the optimizer. ``trained``:
    number of parameters. ``loss``: mean over the steps, None where there is none. ``seconds``: wall
    time; clients that train side by side share it in proportion to their steps.
    ``seconds_alone``: what the same steps take a client that trains alone. ``peak_memory``: bytes;
    of clients side by side, that of all together. ``shared_by``: how many trained side by side.

    A client may claim anything: ``faults`` tells which figures cannot be true.
    """

    # The bounds are far beyond any real client; they keep nonsense out of sums and reports.
    examples: int = _figure(0, most=10**12, least=1)
    steps: int = _figure(0, most=10**12)
    trained: int = _figure(0, most=10**15)
    loss: float | None = _figure(None, most=1e300)
    seconds: float = _figure(0.0, most=1e9)
    seconds_alone: float = _figure(0.0, most=1e9)
    peak_memory: int = _figure(0, most=10**15)
    shared_by: int = _figure(1, most=10**6, least=1)

    def faults(self, held: int = 0) -> dict[str, str]:
        """Return the figures that cannot be true, each with the reason; empty where all can.

        ``held``: how many examples the client is known to hold (0: unknown).

        >>> Measured(examples=7, loss=0.5).faults(held=5)
        {'examples': 'examples = 7: the client holds 5'}
        """
        reasons: dict[str, str] = {}
        for figure in fields(self):
            value = getattr(self, figure.name)
            least, most = figure.metadata[_LEAST], figure.metadata[_MOST]
            if value is None or not least <= value <= most:  # NaN is in no range
                reasons[figure.name] = f"{figure.name} = {value}: must be from {least} to {most:g}"
        # A loss that is missing was NaN (see ``Response.decode``): training diverged.
        if self.loss is None or self.loss == math.inf:
            reasons["loss"] = f"diverged: its loss is {self.loss or 'not a number'}"
        if held and self.examples > held:
            reasons["examples"] = f"examples = {self.examples}: the client holds {held}"
        return reasons

    def sound(self, held: int = 0) -> "Measured":
        """Return the figures with those in ``faults`` set back to their defaults."""
        unmeasured = Measured()
        defaults: dict[str, Any] = {}
        for name in self.faults(held):
            defaults[name] = getattr(unmeasured, name)
        return dataclasses.replace(self, **defaults)


COUNTS = tuple(figure.name for figure in fields(Measured) if figure.type is int)
"""The fields of ``Measured`` that are whole numbers, in their order."""
REALS = tuple(figure.name for figure in fields(Measured) if figure.type is not int)
"""The fields of ``Measured`` that are real numbers, in their order."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """The first row of a ledger: what was run on what.

    ``data_digest``, ``model_digest`` and ``partition_digest`` are those of the texts, of the
    pre-trained weights and of who holds what. ``metric``: the primary one, by which runs are
    compared; ``higher_is_better``: its direction. ``metric_is_share``: whether it and all other
    metrics but the loss are shares of 1. ``majority``: the primary metric of an answer that ignores
    the text, such as always the commonest label; None where there is no such answer.
    ``reference``: whether the run is a yardstick (all data in one place, no exchange), whose bytes
    are no real traffic. ``devices``: the clients of each class of devices of a simulated fleet.
    ``trace_digest``: of the file that says which clients are there in which rounds.
    """

    kind: ClassVar[str] = "run"
    name: str
    method: str
    seed: int
    model: str
    data: str
    data_digest: str
    model_digest: str
    partition_digest: str
    clients: int
    clients_per_round: int
    rounds: int
    majority: float | None
    reference: bool
    settings: Mapping[str, object]
    resolved: Mapping[str, object]
    versions: Mapping[str, str]
    metric: str = "accuracy"
    higher_is_better: bool = True
    metric_is_share: bool = True
    devices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    trace_digest: str = ""


LATE: Final = "no answer within"
"""How the reason of a reply begins that was lost because it did not come in time."""
DROPPED: Final = "dropped out"
"""The reason of a client that, by its device in a simulated fleet, leaves a request unanswered."""


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One client in one round, or in one phase of it where a round has several exchanges.

    ``down`` and ``up``: bytes. ``measured``: what the client says. ``lost``: why its reply was not
    used; ``measured`` then keeps those figures that could be read and can be true. ``device``: the
    class of its device in a simulated fleet, and ``modelled``: the seconds from request to reply by
    that; None where no reply came. In the ledger's file, the fields of ``measured`` stand beside
    the others.
    """

    kind: ClassVar[str] = "client"
    round: int
    client: int
    down: int
    up: int
    measured: Measured = Measured()
    lost: str | None = None
    phase: int = 0
    device: str = ""
    modelled: float | None = None

    @property
    def late(self) -> bool:
        """Return whether the reply was lost because it did not come in time.

        >>> ClientRow(round=0, client=1, down=5, up=0, lost="no answer within 3 s").late
        True
        """
        return self.lost is not None and self.lost.startswith(LATE)

    @property
    def dropped(self) -> bool:
        """Return whether the client's device left the request unanswered."""
        return self.lost == DROPPED


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One evaluation after ``round`` rounds.

    ``metrics``: by name, the primary one, others, and ``loss``; of the global model, or, where
    ``personal``, means over the clients' own models, as there is no global one. ``client_mean`` and
    ``client_worst_tenth`` are of the primary metric, each client's model on the client's own texts,
    and None unless per-client scores were asked for.
    """

    kind: ClassVar[str] = "evaluation"
    round: int
    split: str
    examples: int
    metrics: Mapping[str, float]
    client_mean: float | None = None
    client_worst_tenth: float | None = None
    clients_scored: int = 0
    seconds: float = 0.0
    personal: bool = False


@dataclass(frozen=True, kw_only=True)
class PrivacyRow:
    """What ``round`` rounds have told, by differential privacy.

    ``unit``: whose presence is hidden, a whole ``client`` or a single ``example``. All that was
    released so far is (``epsilon``, ``delta``)-differentially private for the one that is in most
    of it: in ``releases`` of them, each with noise multiplier ``noise``. ``sampling``: the
    probability of being in one, drawn in secret, where epsilon reckons with it; otherwise None.
    ``clip``: the bound on what the unit adds to a round's sum; one that moves, as it is after this
    round.
    """

    kind: ClassVar[str] = "privacy"
    round: int
    unit: str
    epsilon: float
    delta: float
    noise: float
    clip: float
    releases: int
    sampling: float | None = None


Row = RunRow | ClientRow | EvaluationRow | PrivacyRow
MEASURED = frozenset({"seconds", "seconds_alone", "peak_memory"})
"""The fields that differ between two runs of the same thing."""


def to_json(row: Row) -> dict[str, object]:
    """Return the row as plain JSON values, its kind first, without nesting for ``measured``."""
    content = dataclasses.asdict(row)
    measured = content.pop("measured", {})
    return {"kind": row.kind, **content, **measured}


def from_json(content: Mapping[str, Any]) -> Row:
    """Return the row that ``to_json`` turned into ``content``; KeyError or TypeError for others."""
    row_fields = dict(content)
    row = _READERS[row_fields.pop("kind")](row_fields)
    _check_kinds(row)
    return row


def _check_kinds(row: Row | Measured) -> None:
    """Raise TypeError where a field holds something of another kind than it should."""
    kind: Any = type(row)
    for name, kinds in _kinds_of(kind).items():
        value = getattr(row, name)
        if not isinstance(value, kinds):
            raise TypeError(f"{name} = {value!r:.40}")
        if isinstance(value, Measured):
            _check_kinds(value)
    if isinstance(row, RunRow):
        for name, clients in row.devices.items():
            if not isinstance(clients, list | tuple):
                raise TypeError(f"devices of {name} = {clients!r:.40}")
    if isinstance(row, EvaluationRow):
        for name, score in row.metrics.items():
            if not isinstance(score, int | float):
                raise TypeError(f"{name} = {score!r:.40}")


@cache
def _kinds_of(kind: type) -> dict[str, tuple[type, ...]]:
    """Return the classes of what each field of a dataclass may hold."""
    kinds: dict[str, tuple[type, ...]] = {}
    for one in fields(kind):
        parts = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
        classes = [get_origin(part) or part for part in parts]  # Mapping[str, float] -> Mapping
        if float in classes:
            classes.append(int)
        kinds[one.name] = tuple(classes)
    return kinds


def _client_row(content: Mapping[str, Any]) -> ClientRow:
    """Return the row of one client; the measured fields, which lie flat, are put together again."""
    row_fields = dict(content)
    measured: dict[str, Any] = {}
    for figure in fields(Measured):
        if figure.name in row_fields:
            measured[figure.name] = row_fields.pop(figure.name)
    if "seconds_alone" not in measured and "seconds" in measured:
        measured["seconds_alone"] = measured["seconds"]  # a ledger from before there was the figure
    return ClientRow(measured=Measured(**measured), **row_fields)


def _evaluation_row(content: Mapping[str, Any]) -> EvaluationRow:
    """Return the row of one evaluation."""
    row_fields = dict(content)
    if "metrics" not in row_fields:  # a ledger from before metrics had names
        metrics: dict[str, float] = {}
        for name in ("accuracy", "macro_f1", "loss"):
            metrics[name] = row_fields.pop(name)
        row_fields["metrics"] = metrics
    return EvaluationRow(**row_fields)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Row]] = {
    RunRow.kind: lambda content: RunRow(**content),
    ClientRow.kind: _client_row,
    EvaluationRow.kind: _evaluation_row,
    PrivacyRow.kind: lambda content: PrivacyRow(**content),
}
