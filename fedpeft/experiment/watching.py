"""A run as it looks from outside while another process writes it: its folder is read, no more.

The ledger says what has been; checkpoints say how many rounds are done, and when; ``now.json``, of
a run on sites, says who is there and who has answered in the round under way.
"""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, final

from fedpeft.experiment.claim import is_written
from fedpeft.experiment.recorder import CHECKPOINTS
from fedpeft.experiment.run_folder import NOW
from fedpeft.federation.checkpoint import manifests
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Follower, Row, RunRow

WINDOW: Final = 10
"""Rounds over which the time of one is averaged."""
CLIENTS: Final = 1 << 31
"""What is said of clients with another number is not believed."""


@final
@dataclass
class Traffic:
    """Replies and bytes, added up; ``late`` are those of ``lost`` that did not come in time."""

    replied: int = 0
    lost: int = 0
    late: int = 0
    down: int = 0
    up: int = 0

    def add(self, row: ClientRow) -> None:
        """Add what a row says."""
        if row.lost is None:
            self.replied += 1
        else:
            self.lost += 1
        self.late += row.late
        self.down += row.down
        self.up += row.up


@final
@dataclass
class Summed:
    """What a ledger says so far.

    ``clients``: of each client that was ever asked. ``latest``: the rows of the exchange that was
    recorded last, by client. ``score``: the last evaluation; ``best``: of the primary metric.
    """

    run: RunRow | None = None
    total: Traffic = field(default_factory=Traffic)
    clients: dict[int, Traffic] = field(default_factory=dict)
    latest: dict[int, ClientRow] = field(default_factory=dict)
    score: EvaluationRow | None = None
    best: float | None = None
    _exchange: tuple[int, int] = (-1, -1)  # round and phase of ``latest``

    def add(self, row: Row) -> None:
        """Add a row.

        >>> summed = Summed()
        >>> summed.add(ClientRow(round=0, client=7, down=300, up=200))
        >>> summed.total.down, summed.clients[7].replied
        (300, 1)
        """
        match row:
            case RunRow():
                self.run = row
            case ClientRow(client=client):
                self.total.add(row)
                self.clients.setdefault(client, Traffic()).add(row)
                # A round that is played again asks a client a second time.
                if self._exchange != (row.round, row.phase) or client in self.latest:
                    self._exchange = (row.round, row.phase)
                    self.latest = {}
                self.latest[client] = row
            case EvaluationRow():
                self.score = row
                self.best = self._better(row)

    def _better(self, row: EvaluationRow) -> float | None:
        """Return the best score so far."""
        if self.run is None:
            return None
        score = row.metrics.get(self.run.metric)
        if score is None or self.best is None:
            return score
        return max(score, self.best) if self.run.higher_is_better else min(score, self.best)


class Stage(Enum):
    """Where a run stands."""

    WAITING = "waiting to begin"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"


@final
@dataclass(frozen=True)
class Now:
    """What the server of sites says of this moment: clients by number.

    ``asked``, ``replied`` and ``lost`` are of the exchange under way, or the last one.
    """

    online: frozenset[int] = frozenset()
    asked: frozenset[int] = frozenset()
    replied: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()

    def to_json(self) -> str:
        """Return it as ``now.json`` holds it."""
        content = {name: sorted(getattr(self, name)) for name in _WHO}
        return json.dumps(content)


_WHO: Final = ("online", "asked", "replied", "lost")


def read_now(folder: Path) -> Now | None:
    """Return what the server of a run's folder says of this moment; None where it says nothing."""
    try:
        content = json.loads((folder / NOW).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, Mapping):
        return None
    return Now(**{name: _numbers(content.get(name)) for name in _WHO})


def _numbers(value: Any) -> frozenset[int]:
    """Return the clients' numbers in a list; none where it is no list."""
    listed = value if isinstance(value, list) else []
    return frozenset(one for one in listed if type(one) is int and 0 <= one < CLIENTS)


@final
@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    ``done``: rounds. ``round_seconds``: of the last round, 0 where it is not known. ``pace``:
    seconds a round, over the last ones. ``now``: of a run on sites.
    """

    folder: Path
    stage: Stage
    done: int
    summed: Summed
    round_seconds: float
    pace: float | None
    now: Now | None

    @property
    def rounds(self) -> int | None:
        """Return how many rounds there will be; None while it is not known."""
        return self.summed.run.rounds if self.summed.run else None

    @property
    def left(self) -> float | None:
        """Return how many seconds are left, as the last rounds went; None while nothing is known.

        0 once all rounds are done.
        """
        if self.rounds is None:
            return None
        left = max(0, self.rounds - self.done)
        if left == 0:
            return 0.0
        return None if self.pace is None else left * self.pace

    @property
    def metric(self) -> tuple[str, float] | None:
        """Return name and value of the last score; None before there is one."""
        run, score = self.summed.run, self.summed.score
        if run is None or score is None or run.metric not in score.metrics:
            return None
        return run.metric, score.metrics[run.metric]


@final
class Watch:
    """Looks at a run's folder again and again, and reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._follower = Follower(folder / FILE)
        self._summed = Summed()
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)  # (rounds done, when)

    def look(self) -> Standing:
        """Return where the run stands now; BadInput where its ledger is damaged."""
        # Before the rest is read: a run that has ended by now has written all that it ever will.
        written = is_written(self.folder)
        # And checkpoints before the ledger, which has all rows of a round before its checkpoint is.
        done = self._look_at_checkpoints()
        self._follower.look(self._add, self._forget)
        rounds = self._summed.run.rounds if self._summed.run else None
        stage = Stage.RUNNING if written else Stage.STOPPED
        if rounds is not None and done >= rounds:
            stage = Stage.FINISHED
        elif rounds is None and written:
            stage = Stage.WAITING
        pace: float | None = None
        last = 0.0
        if len(self._times) > 1:
            (first_round, first), (last_round, latest) = self._times[0], self._times[-1]
            pace = max(0.0, latest - first) / (last_round - first_round)
            before, moment = self._times[-2]
            last = max(0.0, latest - moment) / (last_round - before)
        return Standing(
            folder=self.folder,
            stage=stage,
            done=done,
            summed=self._summed,
            round_seconds=last,
            pace=pace,
            now=read_now(self.folder),
        )

    def _add(self, row: Row) -> None:
        self._summed.add(row)

    def _forget(self) -> None:
        self._summed = Summed()

    def _look_at_checkpoints(self) -> int:
        """Return how many rounds are done, and note when; the moment is that of the manifest."""
        done = 0
        for path in manifests(self.folder / CHECKPOINTS):
            try:
                moment = path.stat().st_mtime
            except FileNotFoundError:  # dropped this very moment: there is a newer one
                continue
            done = int(path.stem)
            # A run that fell back to an earlier checkpoint, or began anew, counts from there.
            while self._times and self._times[-1][0] >= done and self._times[-1] != (done, moment):
                self._times.pop()
            if not self._times or self._times[-1][0] < done:
                self._times.append((done, moment))
        return done
