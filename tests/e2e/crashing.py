"""Crashes on demand: a forked child plays a run and kills itself at a chosen instant, half-way through what it was doing.

Nothing is forced to the disk here: what a killed process has written stays in the system's cache. What a power cut would
take away, half of a file that was not yet durable, is taken away by hand.
"""

import contextlib
import json
import os
import signal
import stat
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fedpeft.experiment import run as runs
from fedpeft.experiment.build import Federation
from fedpeft.experiment.recorder import CHECKPOINTS, CONFIG, settings_digests
from fedpeft.federation import checkpoint
from fedpeft.federation.client import Worker
from fedpeft.ledger import FILE, MEASURED, Ledger, Row, read, to_json
from fedpeft.types import State

from .builders import assert_same

ROUNDS = 4
"""Of every run that is disturbed."""


@dataclass
class Instants:
    """Counts the instants at which a crash would hurt, and dies at number ``fatal`` of them (None: at none).

    Instants are: before a cohort trains, in the middle of a row of the ledger, before a file or folder is made durable
    (a file is then cut to half, as if the disk had got no further), before and after a rename, before a deletion.
    """

    fatal: int | None = None
    count: int = 0
    configured: int = 0
    """The count when the last of the files that make a folder a run was in place."""

    def reached(self, damage: Callable[[], object] = lambda: None) -> None:
        """Count an instant, and if it is the fatal one do ``damage`` and die of SIGKILL."""
        self.count += 1
        if self.count == self.fatal:
            damage()
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def watched(instants: Instants) -> Iterator[Instants]:
    """Let everything that changes the disk, and training, report to ``instants``."""
    replace, unlink, append, handle = Path.replace, Path.unlink, Ledger.append, Worker.handle

    def on_fsync(descriptor: int) -> None:
        instants.reached(lambda: _halve(descriptor))

    def on_replace(path: Path, target: Path) -> Path:
        instants.reached()
        moved = replace(path, target)
        instants.reached()
        if moved.name == CONFIG:
            instants.configured = instants.count
        return moved

    def on_unlink(path: Path, missing_ok: bool = False) -> None:
        instants.reached()
        unlink(path, missing_ok)

    def on_append(ledger: Ledger, row: Row) -> None:
        append(ledger, row)
        instants.reached(lambda: _half_row(ledger))

    def on_handle(worker: Worker, *arguments: Any) -> Any:
        instants.reached()
        return handle(worker, *arguments)

    with (
        mock.patch.object(os, "fsync", on_fsync),
        mock.patch.object(Path, "replace", on_replace),
        mock.patch.object(Path, "unlink", on_unlink),
        mock.patch.object(Ledger, "append", on_append),
        mock.patch.object(Worker, "handle", on_handle),
    ):
        yield instants


def die_while(play: Callable[[], object], fatal: int) -> None:
    """Call ``play`` in a forked child that dies of SIGKILL at instant ``fatal``; an end of any other kind is an error."""
    child = os.fork()
    if child == 0:
        try:
            with watched(Instants(fatal)):
                play()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (
        f"instant {fatal}: the child ended with {os.waitstatus_to_exitcode(status)}, unharmed"
    )
    assert os.WTERMSIG(status) == signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """What an undisturbed run ends in; a disturbed one must end in the same."""

    folder: Path
    state: State
    rows: list[dict[str, object]]
    files: dict[str, str]
    instants: Instants

    @staticmethod
    def of(assembly: Federation, folder: Path) -> "Outcome":
        """Play ``assembly`` undisturbed in ``folder``."""
        with watched(Instants()) as instants:
            state = runs.start(assembly, folder)
        return Outcome(folder, state, unmeasured(folder), _last_files(folder), instants)

    def assert_equal(self, assembly: Federation, folder: Path, state: State) -> None:
        """Assert that the run in ``folder``, which ended in ``state``, is equal: tensors, ledger, checkpoint, no litter."""
        assert_same(state, self.state)
        assert unmeasured(folder) == self.rows
        assert _last_files(folder) == self.files
        assert not [*folder.rglob("*.tmp")]


def assert_resumes(
    folder: Path, assembly: Federation, undisturbed: Outcome, says: Sequence[str] = ()
) -> None:
    """Resume the run in ``folder`` and assert that it ends as the undisturbed one; ``says``: what it must say meanwhile."""
    told: list[str] = []
    with watched(Instants()):
        state = runs.resume(folder, reuse=assembly, on_warning=told.append)
    undisturbed.assert_equal(assembly, folder, state)
    assert len(told) == len(says)
    for line, part in zip(told, says, strict=True):
        assert part in line


def unmeasured(folder: Path) -> list[dict[str, object]]:
    """Return the rows of a run's ledger without the fields that differ between two runs of the same thing."""
    found = []
    for row in read(folder / FILE):
        content = to_json(row)
        found.append({name: value for name, value in content.items() if name not in MEASURED})
    return found


def _last_files(folder: Path) -> dict[str, str]:
    """Return name -> digest of what the last checkpoint consists of, having checked that it is whole."""
    told: list[str] = []
    found = checkpoint.load(folder / CHECKPOINTS, settings_digests(folder), told.append)
    assert found is not None
    assert not told
    manifest = checkpoint.manifest(folder / CHECKPOINTS, found.state.round)
    return dict(json.loads(manifest.read_bytes())["files"])


def _halve(descriptor: int) -> None:
    """Leave half of a file that was being written; a ledger keeps all but half of its last row."""
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode):
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == FILE:
            _cut_last_row(descriptor)
        else:
            os.ftruncate(descriptor, about.st_size // 2)


def _half_row(ledger: Ledger) -> None:
    """Leave half of the row that was appended last."""
    ledger._file.flush()
    _cut_last_row(ledger._file.fileno())


def _cut_last_row(descriptor: int) -> None:
    path = Path(f"/proc/self/fd/{descriptor}")
    last = path.read_bytes().splitlines(keepends=True)[-1]
    os.ftruncate(descriptor, os.fstat(descriptor).st_size - 1 - len(last) // 2)
