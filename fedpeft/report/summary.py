"""One run in numbers: its ledger folded once into a frozen value that comparisons read."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import final

from fedpeft.errors import BadInput
from fedpeft.ledger import (
    FILE,
    ClientRow,
    EvaluationRow,
    Measured,
    PrivacyRow,
    Row,
    RunRow,
    read,
)
from fedpeft.report.cost import Cost, cost_of
from fedpeft.report.metric import Metric, metric_of

LOSS = "loss"
"""The metric that every run has; it is never compared."""


@final
@dataclass(frozen=True)
class Point:
    """One evaluation on a run's curve, after ``round`` rounds, and what had been spent by then.

    ``score``: the run's metric. ``others``: its other metrics by name, without the loss.
    ``personal``: whether these are means over the clients' own models, as there is no global one.
    ``client_score`` and ``client_worst_tenth``: the metric of each client's model on the client's
    own texts, the mean over all clients and that over the worst tenth; None where not scored.
    """

    round: int
    score: float
    others: Mapping[str, float]
    cost: Cost
    personal: bool = False
    client_score: float | None = None
    client_worst_tenth: float | None = None


@final
@dataclass(frozen=True)
class Answers:
    """What became of the requests to the ``clients`` of one class of devices.

    ``used``: replies that were used; ``dropped`` and ``late``: clients that dropped out, and whose
    replies came too late; ``lost``: replies that were lost for another reason.

    >>> Answers(clients=3, used=4, late=1).asked
    5
    """

    clients: int
    used: int = 0
    dropped: int = 0
    late: int = 0
    lost: int = 0

    @property
    def asked(self) -> int:
        """How many requests there were."""
        return self.used + self.dropped + self.late + self.lost

    def __add__(self, other: "Answers") -> "Answers":
        return Answers(
            clients=max(self.clients, other.clients),
            used=self.used + other.used,
            dropped=self.dropped + other.dropped,
            late=self.late + other.late,
            lost=self.lost + other.lost,
        )

    def after(self, row: ClientRow) -> "Answers":
        """Return what became of them with one more ``row``."""
        if row.lost is None:
            return replace(self, used=self.used + 1)
        if row.dropped:
            return replace(self, dropped=self.dropped + 1)
        if row.late:
            return replace(self, late=self.late + 1)
        return replace(self, lost=self.lost + 1)


@dataclass(frozen=True)
class Summary:
    """One run in numbers; None where the ledger has no such number (no evaluation, no reply).

    ``curve``: the evaluations on ``split``, the split of the last evaluation. ``cost``: of the
    whole run; ``down`` and ``up`` are its bytes. ``rounds``: rounds done. ``steps``: local steps of
    all clients. ``seconds``: mean per client and round. ``peak_memory``: bytes, the largest of all
    replies. ``side_by_side``: the most clients that trained in one stack. ``trained_first`` and
    ``trained_last``: parameters that the largest client trained in the first and in the last round
    with a reply. ``lost``: reason -> number of lost replies. ``devices``: by class of a simulated
    fleet, what became of the requests. ``privacy``: unit -> the last row of what it is promised by
    differential privacy.
    """

    run: RunRow
    split: str | None
    curve: tuple[Point, ...]
    cost: Cost
    down: int
    up: int
    rounds: int
    steps: int
    seconds: float | None
    peak_memory: int | None
    side_by_side: int
    trained_first: int | None
    trained_last: int | None
    lost: Mapping[str, int]
    devices: Mapping[str, Answers]
    privacy: Mapping[str, PrivacyRow] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """The metric that ``Point.score`` is one of."""
        return metric_of(self.run)

    @property
    def final(self) -> Point | None:
        """The last evaluation."""
        return self.curve[-1] if self.curve else None

    @property
    def start(self) -> Point | None:
        """The evaluation before the first round."""
        return self.after(0)

    @property
    def best(self) -> Point | None:
        """The evaluation with the best score, of equal ones the first."""
        return min(self.curve, key=lambda point: self.metric.rank(point.score), default=None)

    @property
    def federated(self) -> bool:
        """Whether anything was exchanged; a reference (all data in one place) moves no bytes."""
        return not self.run.reference

    def reached(self, target: float | None) -> Point | None:
        """Return the first evaluation with a score as good as ``target``; without one, none."""
        if target is None:
            return None
        for point in self.curve:
            if self.metric.reaches(point.score, target):
                return point
        return None

    def after(self, rounds: int | None) -> Point | None:
        """Return the evaluation after exactly this many rounds."""
        # From the end, so that of repeated evaluations of a round the last counts.
        for point in reversed(self.curve):
            if point.round == rounds:
                return point
        return None

    def within(self, budget: int | None) -> Point | None:
        """Return the last evaluation before the traffic exceeded ``budget`` bytes."""
        if budget is None:
            return None
        # Traffic only grows, so from the end the first point within the budget is the last one.
        for point in reversed(self.curve):
            if point.cost.bytes <= budget:
                return point
        return None


def summarise(folder: Path) -> Summary:
    """Return the summary of the run in ``folder``.

    Raises BadInput for a ledger that does not open with its run, or whose evaluations lack the
    run's metric.
    """
    run, rows = _opened(folder / FILE)
    asked, evaluations = _by_kind(rows)
    replies, lost = _replies(asked)
    last = evaluations[-1] if evaluations else None
    split = last.split if last else None
    down, up, rounds_asked = _traffic(asked)
    trained = _trained(asked)
    return Summary(
        run=run,
        split=split,
        curve=_curve(rows, split, run, folder / FILE),
        cost=cost_of(asked),
        down=down,
        up=up,
        rounds=max(rounds_asked, last.round) if last else rounds_asked,
        steps=sum(reply.steps for reply in replies),
        seconds=fmean(reply.seconds for reply in replies) if replies else None,
        peak_memory=max((reply.peak_memory for reply in replies), default=None),
        side_by_side=max((reply.shared_by for reply in replies), default=1),
        trained_first=trained[0] if trained else None,
        trained_last=trained[-1] if trained else None,
        lost=lost,
        devices=_devices(run, asked),
        privacy={row.unit: row for row in rows if isinstance(row, PrivacyRow)},
    )


def _opened(path: Path) -> tuple[RunRow, list[Row]]:
    """Return a ledger's first row and all its rows; for a reference, with 0 bytes in each."""
    rows = read(path)
    run = rows[0] if rows else None
    if not isinstance(run, RunRow):
        raise BadInput(f"{path}: does not open with the row of its run; was the run started here?")
    # A reference runs through the same code, so its ledger counts bytes; but they are no traffic.
    if run.reference:
        for index, row in enumerate(rows):
            if isinstance(row, ClientRow):
                rows[index] = replace(row, down=0, up=0)
    return run, rows


def _by_kind(rows: Iterable[Row]) -> tuple[list[ClientRow], list[EvaluationRow]]:
    """Return the rows of clients and those of evaluations, each in their order."""
    asked: list[ClientRow] = []
    evaluations: list[EvaluationRow] = []
    for row in rows:
        if isinstance(row, ClientRow):
            asked.append(row)
        elif isinstance(row, EvaluationRow):
            evaluations.append(row)
    return asked, evaluations


def _traffic(asked: Iterable[ClientRow]) -> tuple[int, int, int]:
    """Return the bytes down, the bytes up, and the number of rounds in which clients were asked."""
    down = up = 0
    rounds: set[int] = set()
    for row in asked:
        down += row.down
        up += row.up
        rounds.add(row.round)
    return down, up, len(rounds)


def _replies(asked: Sequence[ClientRow]) -> tuple[list[Measured], Counter[str]]:
    """Return the figures of the replies that were used, and reason -> number of lost replies."""
    replies: list[Measured] = []
    lost: Counter[str] = Counter()
    for row in asked:
        if row.lost is None:
            replies.append(row.measured)
        else:
            lost[row.lost] += 1
    return replies, lost


def _devices(run: RunRow, asked: Iterable[ClientRow]) -> dict[str, Answers]:
    """Return what became of the requests, by class of devices."""
    devices = {name: Answers(len(clients)) for name, clients in run.devices.items()}
    for row in asked:
        if row.device:
            before = devices.get(row.device, Answers(clients=0))
            devices[row.device] = before.after(row)
    return devices


def _trained(asked: Sequence[ClientRow]) -> list[int]:
    """Return the parameters that the largest client of every round trained, by round.

    Rounds without a reply are left out.
    """
    largest: dict[int, int] = {}
    for row in asked:
        if row.lost is None:
            largest[row.round] = max(largest.get(row.round, 0), row.measured.trained)
    return [largest[round_number] for round_number in sorted(largest)]


def _curve(rows: Sequence[Row], split: str | None, run: RunRow, path: Path) -> tuple[Point, ...]:
    """Return the evaluations on ``split``.

    Rows are written as things happen: what stands above an evaluation came before it.
    """
    spent = Cost()
    # Clients asked since the last evaluation. Evaluations stand between rounds, so these are whole
    # rounds, whose costs add.
    since: list[ClientRow] = []
    points: list[Point] = []
    for row in rows:
        if isinstance(row, ClientRow):
            since.append(row)
        elif isinstance(row, EvaluationRow):
            spent += cost_of(since)
            since = []
            if row.split == split:
                points.append(_point(row, run.metric, spent, path))
    return tuple(points)


def _point(row: EvaluationRow, metric: str, spent: Cost, path: Path) -> Point:
    others = dict(row.metrics)
    others.pop(LOSS, None)
    score = row.metrics.get(metric)
    if score is None:
        raise BadInput(
            f"{path}: the evaluation after round {row.round} has no {metric}, by which the run is "
            f"scored; it has {', '.join(row.metrics) or 'nothing'}"
        )
    others.pop(metric, None)
    return Point(
        row.round,
        score,
        others,
        spent,
        personal=row.personal,
        client_score=row.client_mean,
        client_worst_tenth=row.client_worst_tenth,
    )
