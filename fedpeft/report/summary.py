"""One run in numbers: its ledger folded once into a frozen value that comparisons read and nothing recomputes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import final

from fedpeft.errors import BadInput
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Row, RunRow, read


@dataclass(frozen=True)
class Cost:
    """What a run had spent by some moment.

    ``bytes``: all traffic, down and up. ``slowest_bytes``: per round the most that any one client moved, down and up,
    summed over rounds. ``slowest_seconds``: per round the longest measured training of a client, summed over rounds.
    ``slowest_alone``: the same of clients that train alone, as on a machine of their own.
    """

    bytes: int = 0
    slowest_bytes: int = 0
    slowest_seconds: float = 0.0
    slowest_alone: float = 0.0

    def __add__(self, later: "Cost") -> "Cost":
        return Cost(
            bytes=self.bytes + later.bytes,
            slowest_bytes=self.slowest_bytes + later.slowest_bytes,
            slowest_seconds=self.slowest_seconds + later.slowest_seconds,
            slowest_alone=self.slowest_alone + later.slowest_alone,
        )

    def network(self, bandwidth: float) -> float:
        """Return the modelled seconds on the network at ``bandwidth`` bytes per second, the same down as up.

        Every client has a link of its own, so the clients of a round transfer side by side and the slowest one counts.
        SLoRA's printed minutes fit Gbit * 1024 / 5 + rounds * s_per_epoch (methods.md, section 1 [D]): all the traffic
        of its tables through one link of 5 Mbit/s. Those tables count the traffic of one client, not of all [D]: down
        and up in 250 rounds, 11.68 M weights of ALBERT are its 174 Gbit and 66.97 M of DistilBERT its 997. So where all
        messages of a round have one size, as in SLoRA, its formula is this one at ``SLORA_LINK``. They differ where
        sizes differ (SLoRA's knows no slowest client) and in its constant s_per_epoch, which ``modelled`` measures.
        """
        return self.slowest_bytes / bandwidth

    def modelled(self, bandwidth: float) -> float:
        """Return the modelled seconds so far: ``network`` plus each round's longest training alone.

        A client's share of what several side by side took would make methods whose clients can
        train so look faster than others, though every client has a machine of its own.
        """
        return self.network(bandwidth) + self.slowest_alone


@final
@dataclass(frozen=True)
class Point:
    """One evaluation on a run's curve, after ``round`` rounds, and what had been spent by then."""

    round: int
    accuracy: float
    macro_f1: float
    cost: Cost


@dataclass(frozen=True)
class Summary:
    """One run in numbers. None stands for what the ledger does not tell (no evaluation, no reply).

    ``curve``: the evaluations on ``split``, the split of the last evaluation. ``cost``: of the whole run; ``down`` and
    ``up`` are its bytes. ``rounds``: rounds done. ``steps``: local steps of all clients. ``seconds``: mean per client
    and round. ``peak_memory``: bytes, the largest of any reply; ``side_by_side``:
    the largest cohort that shared one. ``trained_first``, ``trained_last``: parameters trained by the largest client of
    the first and of the last round that got replies. ``lost``: how many replies for which reason.
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

    @property
    def final(self) -> Point | None:
        """The last evaluation."""
        return self.curve[-1] if self.curve else None

    @property
    def federated(self) -> bool:
        """Whether anything was exchanged; a reference (all data in one place, no exchange) moves no bytes."""
        return not self.run.reference

    def reached(self, target: float) -> Point | None:
        """Return the first evaluation with at least this accuracy."""
        return next((point for point in self.curve if point.accuracy >= target), None)

    def after(self, rounds: int | None) -> Point | None:
        """Return the evaluation after exactly this many rounds."""
        return next((point for point in reversed(self.curve) if point.round == rounds), None)

    def within(self, budget: int | None) -> Point | None:
        """Return the last evaluation before the traffic exceeded ``budget`` bytes."""
        fits = (
            point
            for point in reversed(self.curve)
            if budget is not None and point.cost.bytes <= budget
        )
        return next(fits, None)


def summarise(folder: Path) -> Summary:
    """Return the summary of the run in ``folder``; a ledger that does not open with its run raises BadInput."""
    rows = read(folder / FILE)
    run = rows[0] if rows else None
    if not isinstance(run, RunRow):
        raise BadInput(
            f"{folder / FILE}: does not open with the row of its run; was the run started here?"
        )
    if run.reference:
        rows = [replace(row, down=0, up=0) if isinstance(row, ClientRow) else row for row in rows]
    asked = [row for row in rows if isinstance(row, ClientRow)]
    replies = [row for row in asked if row.lost is None]
    evaluations = [row for row in rows if isinstance(row, EvaluationRow)]
    split = evaluations[-1].split if evaluations else None
    trained = _trained(replies)
    return Summary(
        run=run,
        split=split,
        curve=_curve(rows, split),
        cost=_cost(asked),
        down=sum(row.down for row in asked),
        up=sum(row.up for row in asked),
        rounds=max(len({row.round for row in asked}), evaluations[-1].round if evaluations else 0),
        steps=sum(row.measured.steps for row in replies),
        seconds=fmean(row.measured.seconds for row in replies) if replies else None,
        peak_memory=max((row.measured.peak_memory for row in replies), default=None),
        side_by_side=max((row.measured.shared_by for row in replies), default=1),
        trained_first=trained[0] if trained else None,
        trained_last=trained[-1] if trained else None,
        lost=Counter(row.lost for row in asked if row.lost is not None),
    )


def _trained(replies: Sequence[ClientRow]) -> list[int]:
    """Return the parameters that the largest client of every round trained, by round."""
    most: dict[int, int] = {}
    for row in replies:
        most[row.round] = max(most.get(row.round, 0), row.measured.trained)
    return [most[number] for number in sorted(most)]


def _cost(asked: Sequence[ClientRow]) -> Cost:
    by_round: dict[int, list[ClientRow]] = {}
    for row in asked:
        by_round.setdefault(row.round, []).append(row)
    total = Cost()
    for rows in by_round.values():
        total += Cost(
            bytes=sum(row.down + row.up for row in rows),
            slowest_bytes=max(row.down + row.up for row in rows),
            slowest_seconds=max(row.measured.seconds for row in rows),
            slowest_alone=max(row.measured.seconds_alone for row in rows),
        )
    return total


def _curve(rows: Sequence[Row], split: str | None) -> tuple[Point, ...]:
    """Return the evaluations on ``split``. Rows are written as things happen: what stands above one came before it."""
    spent = Cost()
    since: list[ClientRow] = []  # who was asked since the last evaluation; no round straddles one
    points = []
    for row in rows:
        if isinstance(row, ClientRow):
            since.append(row)
        elif isinstance(row, EvaluationRow):
            spent, since = spent + _cost(since), []
            if row.split == split:
                metrics = row.metrics
                points.append(Point(row.round, metrics["accuracy"], metrics["macro_f1"], spent))
    return tuple(points)
