"""What a run writes down: one row for the run, one per (round, client), one per evaluation."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, final

_LEAST, _MOST = "least", "most"
"""Under these a field of ``Measured`` says which values are believed."""


def _figure(default: Any, most: float, least: int = 0) -> Any:
    """Return a field of ``Measured`` that is believed from ``least`` to ``most``."""
    return field(default=default, metadata={_LEAST: least, _MOST: most})


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a client measured in one round; it travels whole from the client to the ledger.

    ``examples``: what it trained or was scored on. ``steps`` of the optimizer. ``trained``: number
    of parameters. ``loss``: mean over the steps, None where there is none. ``seconds``: wall time,
    of clients side by side each one's share by its steps. ``seconds_alone``: what the same steps
    take a client that trains alone. ``peak_memory``: bytes, of clients side by side that of all at
    once. ``shared_by``: how many trained side by side.

    A client may say anything: ``faults`` tells what of it cannot be true.
    """

    examples: int = _figure(0, most=10**12, least=1)
    steps: int = _figure(0, most=10**12)
    trained: int = _figure(0, most=10**15)
    loss: float | None = _figure(None, most=1e300)
    seconds: float = _figure(0.0, most=1e9)
    seconds_alone: float = _figure(0.0, most=1e9)
    peak_memory: int = _figure(0, most=10**15)
    shared_by: int = _figure(1, most=10**6, least=1)

    def faults(self, held: int = 0) -> dict[str, str]:
        """Return the figures that cannot be true, each with why; none where all are sound.

        ``held``: how many examples the client is known to hold, 0 where nobody knows.

        >>> Measured(examples=7, loss=0.5).faults(held=5)
        {'examples': 'examples = 7: the client holds 5'}
        """
        found: dict[str, str] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            least, most = part.metadata[_LEAST], part.metadata[_MOST]
            if value is None or not least <= value <= most:  # NaN is in no range
                found[part.name] = f"{part.name} = {value}: must be from {least} to {most:g}"
        if self.loss is None or self.loss == math.inf:
            found["loss"] = f"diverged: its loss is {self.loss or 'not a number'}"
        if held and self.examples > held:
            found["examples"] = f"examples = {self.examples}: the client holds {held}"
        return found

    def sound(self, held: int = 0) -> "Measured":
        """Return the figures without those in ``faults``, as if these had not been measured."""
        blank: dict[str, Any] = {name: getattr(Measured(), name) for name in self.faults(held)}
        return dataclasses.replace(self, **blank)


COUNTS = tuple(part.name for part in fields(Measured) if part.type is int)
"""The fields of ``Measured`` that are whole numbers, in their order."""
REALS = tuple(part.name for part in fields(Measured) if part.type is not int)
"""The fields of ``Measured`` that are real numbers, in their order."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """The first row of a ledger: what was run on what.

    The digests are those of the texts, of the pre-trained weights and of who holds what.
    ``metric``: the primary one, by which runs are compared, and ``higher_is_better`` its direction.
    ``metric_is_share``: whether it, as the others beside it but the loss, is a share of 1.
    ``majority``: what an answer that ignores the text reaches in it, such as always saying the
    commonest label; None where there is no such answer. ``reference``: a yardstick (all data in one
    place, no exchange) whose bytes are no real traffic.
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


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One client in one round. ``down`` and ``up`` are bytes; ``measured`` is what the client says.

    ``lost``: why its reply was not used; what it measured is then kept as far as it could be read
    and can be true. In the ledger's file the fields of ``measured`` stand beside the others.
    """

    kind: ClassVar[str] = "client"
    round: int
    client: int
    down: int
    up: int
    measured: Measured = Measured()
    lost: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One evaluation after ``round`` rounds.

    ``metrics``: by name, the primary one and others, and ``loss``. The two client fields are filled
    with the primary metric where per-client scores were asked for.
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


Row = RunRow | ClientRow | EvaluationRow
MEASURED = frozenset({"seconds", "seconds_alone", "peak_memory"})
"""The fields that differ between two runs of the same thing."""


def to_json(row: Row) -> dict[str, object]:
    """Return the row as plain JSON values, its kind first; what a client measured is laid flat."""
    content = dataclasses.asdict(row)
    measured = content.pop("measured", {})
    return {"kind": row.kind, **content, **measured}


def from_json(content: Mapping[str, Any]) -> Row:
    """Return the row that ``to_json`` gave; KeyError or TypeError where it is none."""
    rest = dict(content)
    return _READERS[rest.pop("kind")](rest)


def _client_row(content: Mapping[str, Any]) -> ClientRow:
    names = {part.name for part in fields(Measured)}
    measured = {name: value for name, value in content.items() if name in names}
    rest = {name: value for name, value in content.items() if name not in names}
    if "seconds_alone" not in measured and "seconds" in measured:
        measured["seconds_alone"] = measured["seconds"]  # a ledger from before there was the figure
    return ClientRow(measured=Measured(**measured), **rest)


def _evaluation_row(content: Mapping[str, Any]) -> EvaluationRow:
    rest = dict(content)
    if "metrics" not in rest:  # a ledger from before metrics had names
        rest["metrics"] = {name: rest.pop(name) for name in ("accuracy", "macro_f1", "loss")}
    return EvaluationRow(**rest)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Row]] = {
    RunRow.kind: lambda content: RunRow(**content),
    ClientRow.kind: _client_row,
    EvaluationRow.kind: _evaluation_row,
}
