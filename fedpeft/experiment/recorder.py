"""A run under way: its ledger grows, and a checkpoint after every round makes it good."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

from pydantic_core import to_json

from fedpeft.errors import BadInput
from fedpeft.experiment.server_side import ServerSide
from fedpeft.federation import checkpoint
from fedpeft.federation.checkpoint import Checkpoint, Written
from fedpeft.ledger import FILE, ClientRow, EvaluationRow, Ledger, PrivacyRow, Row, RunRow, read
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

    >>> stand = Progress(round=1, rounds=10)
    >>> stand.after(ClientRow(round=1, client=0, down=300, up=200)).bytes
    500
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
            case PrivacyRow():
                return self


OnProgress = Callable[[Progress], None]


@final
class Recorder:
    """Writes down rows and states; a crash loses what came after the last call of ``save``.

    Opening cuts the ledger back to where ``begin`` left it. A run that starts from its beginning
    also writes its first row and state. A full disk raises BadInput and leaves the last checkpoint
    as it was.
    """

    def __init__(
        self, side: ServerSide, folder: Path, begin: Checkpoint, on_progress: OnProgress
    ) -> None:
        self._folder = folder
        self._memories = begin.memories
        self._on_progress = on_progress
        self._digest = settings_digests(folder)[0]
        # Files of the checkpoint that was read need not be written, or hashed, once more.
        self._written = Written({begin.state.round: begin.files} if begin.files else {})
        self._progress = Progress(begin.state.round, side.config.federation.rounds)
        try:
            self._ledger = _opened(folder / FILE, begin.ledger)
        except OSError as error:
            raise self._unsaved(error) from error
        # Score and bytes so far; for a run from its beginning the ledger is empty.
        for row in read(folder / FILE):
            self._progress = self._progress.after(row)
        if begin.ledger:  # the run is resumed, and its ledger has a first row
            on_progress(self._progress)
            return
        with ExitStack() as undo:
            undo.push(self)  # nobody else closes the ledger where ``__init__`` fails
            self.record(side.run_row())
            self.save(begin.state)
            sync(folder)  # the names of the new files, too, are to outlive a power cut
            undo.pop_all()

    def record(self, row: Row) -> None:
        """Add a row to the ledger."""
        try:
            self._ledger.append(row)
        except OSError as error:
            raise self._unsaved(error) from error
        self._progress = self._progress.after(row)

    def save(self, state: State) -> None:
        """Put the ledger and ``state`` on the disk, and tell the watcher where the run stands."""
        try:
            # The ledger first: a checkpoint must not know of rows that a crash can take away.
            length = self._ledger.sync()
            folder = self._folder / CHECKPOINTS
            checkpoint.save(folder, state, self._memories, length, self._digest, self._written)
        except OSError as error:
            raise self._unsaved(error) from error
        # Only now: what a watcher is told of can be resumed from.
        self._progress = replace(self._progress, round=state.round)
        self._on_progress(self._progress)

    def _unsaved(self, error: OSError) -> BadInput:
        return BadInput(
            f"{self._folder}: what came after round {self._progress.round} cannot be saved "
            f"({error.strerror}); what was there is intact: make the folder writable, with room, "
            f"then: fedpeft resume {self._folder}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self._ledger.close()
        except OSError:
            if error is None:  # otherwise a full disk has been told of already
                raise


def _opened(path: Path, length: int) -> Ledger:
    """Return the ledger cut back to ``length``; closed again when that fails."""
    with ExitStack() as undo:
        ledger = undo.enter_context(Ledger(path))
        ledger.cut(length)
        undo.pop_all()
    return ledger


def settings_digests(folder: Path) -> tuple[str, str]:
    """Return the digests by which checkpoints know the configuration in ``folder``.

    New checkpoints carry the first. The second is what version 0.1 wrote: the digest of the same
    content in pydantic's form. Both are taken from ``config.json`` as it was written. So a run
    keeps its checkpoints when a later version adds or renames fields.
    """
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # One form for equal settings, whatever their order and layout in the file.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return _digest(canonical), _digest(to_json(content, indent=1))


def _digest(text: bytes) -> str:
    return blake2b(text, digest_size=16).hexdigest()
