"""What a run writes down: one row for the run, one per (round, client), one per evaluation."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class RunRow:
    """The first row of a ledger: what was run on what.

    The digests are those of the texts, of the pre-trained weights and of who holds what. ``majority``: accuracy of always
    saying the commonest label, on the texts that are scored. ``reference``: a yardstick (all data in one place, no
    exchange) whose bytes are no real traffic.
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
    majority: float
    reference: bool
    settings: Mapping[str, object]
    resolved: Mapping[str, object]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class ClientRow:
    """One client in one round, measured. ``down`` and ``up`` are bytes, ``seconds`` its training time, ``peak_memory`` bytes.

    ``shared_by``: how many clients trained side by side; ``seconds`` is then the client's share, by steps, of the time
    that all took, and ``peak_memory`` that of all at once. ``lost``: why its reply was not used; of a reply that came and
    could not be read all measured fields are 0.
    """

    kind: ClassVar[str] = "client"
    round: int
    client: int
    down: int
    up: int
    examples: int = 0
    steps: int = 0
    trained: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0
    shared_by: int = 1
    lost: str | None = None


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation after ``round`` rounds. The two client fields are filled when per-client scores were asked for."""

    kind: ClassVar[str] = "evaluation"
    round: int
    split: str
    examples: int
    loss: float
    accuracy: float
    macro_f1: float
    client_mean: float | None = None
    client_worst_tenth: float | None = None
    clients_scored: int = 0
    seconds: float = 0.0


Row = RunRow | ClientRow | EvaluationRow
MEASURED = frozenset({"seconds", "peak_memory"})
"""The fields that differ between two runs of the same thing."""

_KINDS: Mapping[str, type[RunRow] | type[ClientRow] | type[EvaluationRow]] = {
    row.kind: row for row in (RunRow, ClientRow, EvaluationRow)
}


def to_json(row: Row) -> dict[str, object]:
    """Return the row as plain JSON values, its kind first."""
    return {"kind": row.kind, **dataclasses.asdict(row)}


def from_json(fields: Mapping[str, object]) -> Row:
    """Return the row that ``to_json`` turned into ``fields``; unknown kinds and missing fields raise KeyError or TypeError."""
    rest = dict(fields)
    return _KINDS[str(rest.pop("kind"))](**rest)  # type: ignore[arg-type]
