"""A run's folder while the run is under way: the ledger grows, and after every round a checkpoint makes it good."""

import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

from pydantic_core import to_json

from fedpeft.errors import BadInput
from fedpeft.experiment.build import Federation
from fedpeft.federation import checkpoint
from fedpeft.federation.checkpoint import Checkpoint, Written
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Ledger, Row, RunRow, read
from fedpeft.types import State
from fedpeft.wire.durable import sync

CHECKPOINTS: Final = "checkpoints"
"""The folder of checkpoints inside a run's folder."""
CONFIG: Final = "config.json"
"""The settings inside a run's folder, as they were when it was started."""


@final
@dataclass(frozen=True)
class Progress:
    """Where a run stands: rounds done and planned, its last score (None before any), bytes so far.

    ``metric``: what the score is one of.
    """

    round: int
    rounds: int
    score: float | None = None
    bytes: int = 0
    metric: str = "accuracy"

    def after(self, row: Row) -> "Progress":
        """Return where the run stands once ``row`` is in the ledger."""
        match row:
            case RunRow(metric=metric):
                return replace(self, metric=metric)
            case ClientRow(down=down, up=up):
                return replace(self, bytes=self.bytes + down + up)
            case EvaluationRow(metrics=metrics):
                return replace(self, score=metrics[self.metric])


OnProgress = Callable[[Progress], None]


@final
class Recorder:
    """Takes down rows and states; a crash between two calls of ``save`` loses what came after the first.

    Opening cuts the ledger back to where ``begin`` left it; a run from its beginning writes its first row and state. A
    full disk raises BadInput and leaves the last checkpoint as it was.
    """

    def __init__(
        self, assembly: Federation, folder: Path, begin: Checkpoint, on_progress: OnProgress
    ) -> None:
        self._folder, self._memories, self._on_progress = folder, begin.memories, on_progress
        self._digest = settings_digests(folder)[0]
        self._written = Written({begin.state.round: begin.files} if begin.files else {})
        self._stand = Progress(begin.state.round, assembly.config.federation.rounds)
        try:
            self._ledger = _opened(folder / FILE, begin.ledger)
        except OSError as error:
            raise self._unsaved(error) from error
        for row in read(folder / FILE):
            self._stand = self._stand.after(row)
        if begin.ledger:
            on_progress(self._stand)
            return
        with ExitStack() as undo:
            undo.push(self)
            self.record(assembly.run_row())
            self.save(begin.state)
            sync(folder)
            undo.pop_all()

    def record(self, row: Row) -> None:
        """Add a row to the ledger."""
        try:
            self._ledger.append(row)
        except OSError as error:
            raise self._unsaved(error) from error
        self._stand = self._stand.after(row)

    def save(self, state: State) -> None:
        """Put the ledger and ``state`` on the disk, and tell the watcher where the run stands."""
        try:
            length = self._ledger.sync()
            place = self._folder / CHECKPOINTS
            checkpoint.save(place, state, self._memories, length, self._digest, self._written)
        except OSError as error:
            raise self._unsaved(error) from error
        self._stand = replace(self._stand, round=state.round)
        self._on_progress(self._stand)

    def _unsaved(self, error: OSError) -> BadInput:
        return BadInput(
            f"{self._folder}: what came after round {self._stand.round} cannot be saved ({error.strerror}); "
            f"what was there is intact: make the folder writable, with room, then: fedpeft resume {self._folder}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else nullcontext():  # a full disk has been told of already
            self._ledger.close()


def _opened(path: Path, length: int) -> Ledger:
    """Return the ledger cut back to ``length``; closed again when that fails."""
    with ExitStack() as undo:
        ledger = undo.enter_context(Ledger(path))
        ledger.cut(length)
        undo.pop_all()
    return ledger


def settings_digests(folder: Path) -> tuple[str, str]:
    """Return the digests by which checkpoints know their settings; new ones carry the first.

    Both are of what ``config.json`` says as it was written, so that fields which a later version
    adds or renames do not part a run from its checkpoints. The second is what version 0.1 wrote: it
    is of the same content as pydantic prints it.
    """
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return _digest(canonical), _digest(to_json(content, indent=1))


def _digest(text: bytes) -> str:
    return blake2b(text, digest_size=16).hexdigest()
